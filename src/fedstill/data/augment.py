"""Random augmentation of a whole batch on its device, from an explicit generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedstill.names import unknown

PADDING = 4

_KINDS = {
    "none": "no augmentation",
    "flip-crop-half": "flip with probability 1/2; pad by 4 and crop with probability 1/2 (FedFTG)",
    "flip-crop": "flip with probability 1/2; always pad by 4 and crop",
}


def list_augmentations() -> list[tuple[str, str]]:
    """Return (name, one-line summary) of every kind of augmentation."""
    return list(_KINDS.items())


@dataclass(frozen=True)
class Moves:
    """What happens to the images of a batch.

    Parameters
    ----------
    flip : Tensor, (B,) bool
        Which are mirrored.
    offset : Tensor, (B, 2) int64
        Rows and columns at which they are cut after padding, from the corner: (4, 4) leaves an image where it was.
    """

    flip: Tensor
    offset: Tensor

    @staticmethod
    def joined(several: Sequence[Moves]) -> Moves:
        """Return the moves of several batches as those of one."""
        return Moves(torch.cat([one.flip for one in several]), torch.cat([one.offset for one in several]))


def draw_moves(kind: str, sizes: Sequence[int], generator: torch.Generator, device: torch.device) -> list[Moves]:
    """Draw what happens to several batches of ``sizes`` images, one after another, and bring it to ``device`` at once.

    Parameters
    ----------
    kind : str
        One of :func:`list_augmentations`, but not ``none``.
    generator : torch.Generator
        Advanced for each batch by an amount that depends on ``kind`` and its size alone. It may lie on another device:
        one on the CPU makes the same draws for every executor.

    Raises
    ------
    InputError
        For an unknown kind.
    """
    if kind not in _KINDS:
        raise unknown("augmentation", kind, _KINDS)
    if not sizes:
        return []
    all_moves = Moves.joined([_draw(kind, size, generator) for size in sizes])
    flips, offsets = (torch.split(one.to(device), list(sizes)) for one in (all_moves.flip, all_moves.offset))
    return [Moves(flip, offset) for flip, offset in zip(flips, offsets, strict=True)]


def _draw(kind: str, batch: int, generator: torch.Generator) -> Moves:
    device = generator.device
    flip = torch.rand(batch, generator=generator, device=device) < 0.5
    offset = torch.randint(2 * PADDING + 1, (batch, 2), generator=generator, device=device)
    if kind == "flip-crop-half":
        still = torch.rand(batch, generator=generator, device=device) < 0.5
        offset = torch.where(still[:, None], PADDING, offset)
    return Moves(flip, offset)


def augment(x: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Flip and crop every image of a batch at random.

    Parameters
    ----------
    x : Tensor, (B, C, H, W)
        Normalised images, unchanged; the padding is 0, the mean of the data.
    kind : str
        One of :func:`list_augmentations`.
    generator : torch.Generator
        As for :func:`draw_moves`.

    Returns
    -------
    Tensor, (B, C, H, W)
        A new batch; for ``none`` it is ``x`` itself.

    Raises
    ------
    InputError
        For an unknown kind.
    """
    return x if kind == "none" else moved(x, draw_moves(kind, [len(x)], generator, x.device)[0])


def moved(x: Tensor, moves: Moves) -> Tensor:
    """Return images (B, C, H, W) mirrored, padded with zeros and cut, as ``moves`` says."""
    batch, _, height, width = x.shape
    rows = moves.offset[:, 0, None] + torch.arange(height, device=x.device)
    columns = moves.offset[:, 1, None] + torch.arange(width, device=x.device)
    # The padding is the same on both sides, so a column of the flipped image is the mirrored column.
    columns = torch.where(moves.flip[:, None], width + 2 * PADDING - 1 - columns, columns)
    images = torch.arange(batch, device=x.device)[:, None, None]
    padded = F.pad(x, (PADDING,) * 4)
    cut = padded[images, :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()
