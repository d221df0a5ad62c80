"""Pieces that the backbones share: the common shape of a model, its normalisation, its initial weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fedstill.errors import InputError

Norm = Literal["gn", "bn", "none"]


class Backbone(nn.Module):
    """A feature extractor ``body`` followed by one linear layer ``head``.

    Parameters
    ----------
    body : nn.Module
        Maps a batch (B, ...) to features (B, ``feature_width``).
    feature_width : int
        Width D of the features.
    num_classes : int
        Number of logits.
    """

    def __init__(self, body: nn.Module, feature_width: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(feature_width, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the features (B, D) of a batch, the input of ``head``."""
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of a batch."""
        out: Tensor = self.head(self.features(x))
        return out


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that also accepts channels-last activations inside ``torch.func.vmap``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, C, ...) normalised within each group of channels."""
        # Group norm asks whether its input is contiguous as channels-last, a question vmap cannot answer.
        return super().forward(x.contiguous())


def make_norm(norm: Norm, channels: int, groups: int) -> nn.Module:
    """Return the normalisation layer for ``channels`` feature maps; ``groups`` counts for "gn" only.

    Raises
    ------
    InputError
        ``groups`` does not divide ``channels``.
    """
    if norm == "bn":
        return nn.BatchNorm2d(channels)
    if norm == "none":
        return nn.Identity()
    if groups < 1 or channels % groups:
        raise InputError(f"model.norm_groups: {groups} groups do not divide {channels} channels")
    return GroupNorm(groups, channels)


def check_norm(name: str, norm: str, norm_groups: int | None, allowed: Sequence[str]) -> None:
    """Raise InputError if model ``name`` lacks this ``norm``, or if it makes no use of ``norm_groups``."""
    if norm not in allowed:
        raise InputError(f"model.norm: {name!r} takes {' or '.join(allowed)}, not {norm!r}")
    if norm != "gn" and norm_groups is not None:
        raise InputError(f"model.norm_groups: only norm 'gn' has groups, and model.norm is {norm!r}; remove it")


def image_shape(name: str, input_shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    """Return ``input_shape`` as (C, H, W).

    Raises
    ------
    InputError
        It is not three positive numbers, or H or W is below ``smallest``.
    """
    if len(input_shape) != 3 or min(input_shape) < 1 or min(input_shape[1:]) < smallest:
        raise InputError(
            f"model.name: {name!r} needs images (C, H, W) of at least {smallest}x{smallest}, "
            f"but one sample of the data has shape {input_shape}"
        )
    channels, height, width = input_shape
    return channels, height, width


@contextmanager
def initial_weights(generator: torch.Generator) -> Iterator[None]:
    """Within the block, default initialisations on the CPU draw from ``generator`` alone.

    One number is drawn from ``generator``; the global CPU stream is seeded with it and put back afterwards,
    so that the block neither sees nor moves the global stream. Not thread safe.
    """
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would also reseed the accelerators, whose streams are not put back.
        torch.default_generator.manual_seed(seed)
        yield
