"""Random augmentation of a whole batch on its device, from an explicit generator."""

from __future__ import annotations

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


def augment(x: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Flip and crop every image of a batch at random.

    Parameters
    ----------
    x : Tensor, (B, C, H, W)
        Normalised images, unchanged; the padding is 0, the mean of the data.
    kind : str
        One of :func:`list_augmentations`.
    generator : torch.Generator
        Advanced by an amount that depends on ``kind`` and B alone. It may lie on another device than ``x``:
        one on the CPU makes the same draws for every executor.

    Returns
    -------
    Tensor, (B, C, H, W)
        A new batch; for ``none`` it is ``x`` itself.

    Raises
    ------
    InputError
        For an unknown kind.
    """
    if kind not in _KINDS:
        raise unknown("augmentation", kind, _KINDS)
    if kind == "none":
        return x
    batch, device = len(x), generator.device
    flip = torch.rand(batch, generator=generator, device=device) < 0.5
    offset = torch.randint(2 * PADDING + 1, (batch, 2), generator=generator, device=device)
    if kind == "flip-crop-half":
        still = torch.rand(batch, generator=generator, device=device) < 0.5
        offset = torch.where(still[:, None], PADDING, offset)
    return _flip_and_crop(x, flip.to(x.device), offset.to(x.device))


def _flip_and_crop(x: Tensor, flip: Tensor, offset: Tensor) -> Tensor:
    """Mirror the images where ``flip`` (B,), pad them with zeros, cut at ``offset`` (B, 2) rows and columns.

    ``offset`` is counted from the corner of the padded image: (4, 4) leaves the image where it was.
    """
    batch, _, height, width = x.shape
    rows = offset[:, 0, None] + torch.arange(height, device=x.device)
    columns = offset[:, 1, None] + torch.arange(width, device=x.device)
    # The padding is the same on both sides, so a column of the flipped image is the mirrored column.
    columns = torch.where(flip[:, None], width + 2 * PADDING - 1 - columns, columns)
    images = torch.arange(batch, device=x.device)[:, None, None]
    padded = F.pad(x, (PADDING,) * 4)
    cut = padded[images, :, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()
