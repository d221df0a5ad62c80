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
    bias : bool
        Whether the head adds a bias, by default True.
    """

    def __init__(self, body: nn.Module, feature_width: int, num_classes: int, *, bias: bool = True) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(feature_width, num_classes, bias=bias)

    def features(self, x: Tensor) -> Tensor:
        """Return the features (B, D) of a batch, the input of ``head``."""
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes) of a batch."""
        out: Tensor = self.head(self.features(x))
        return out


def with_projection(model: Backbone, width: int) -> Backbone:
    """Return ``model`` with MOON's projection between its body and a new head: linear - ReLU - linear.

    The features are the projection's output; the hidden layer is as wide as the old features, D, and so has D^2
    weights: too many where the features are a flattened map, as in FedMD's models. The body is taken over, not
    copied; the new layers start from PyTorch's initialisation, and the head has a bias where the old one had.

    Parameters
    ----------
    model : Backbone
        The model without a projection.
    width : int
        Width of the projection, 256 in MOON.

    Raises
    ------
    InputError
        ``width`` is below 1.
    """
    if width < 1:
        raise InputError(f"model.projection: must be at least 1, not {width}")
    old = model.head
    hidden = old.in_features
    body = nn.Sequential(model.body, nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width))
    return Backbone(body, width, old.out_features, bias=old.bias is not None)


class Dropout(nn.Module):
    """Dropout whose mask comes from a generator of its own, so that threads do not share a stream.

    In train mode every element is zeroed with probability ``p`` and the others are scaled by 1 / (1 - p); in
    eval mode, and with ``p`` 0, the input is returned. A copy of the layer continues with a copy of the
    generator, from the same state.

    Parameters
    ----------
    p : float
        Probability in [0, 1), by default 0.5.

    Attributes
    ----------
    generator : torch.Generator or None
        Where masks are drawn, on the device of the input; None, the default, is PyTorch's global stream.
        It belongs to no state dict; :func:`fedstill.models.randomness.layers_draw_from` sets it.

    Raises
    ------
    InputError
        ``p`` is not in [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise InputError(f"dropout: the probability must be in [0, 1), not {p}")
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, in train mode with elements dropped."""
        if not self.training or self.p == 0:
            return x
        # Always float32, so that the mask depends on the stream alone and not on the dtype of the model.
        draws = torch.rand(x.shape, generator=self.generator, device=x.device, dtype=torch.float32)
        # In the memory order of x, in which the product is several times faster.
        kept = torch.empty_like(x, dtype=torch.bool).copy_(draws >= self.p)
        return x * kept.to(x.dtype).div_(1 - self.p)

    def extra_repr(self) -> str:
        """Return the probability, for ``print``."""
        return f"p={self.p}"


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
