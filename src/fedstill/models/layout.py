"""How images and the kernels of convolutions lie in memory; convolutions follow the layout that they are given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedstill.models.stateless import Stateless
from fedstill.weights import Weights

Layout = Callable[[Tensor], Tensor]


def layout_of(channels_last: bool) -> Layout:
    """Return what copies images or kernels into the layout that convolutions are to follow."""
    return channels_innermost if channels_last else torch.clone


def channels_innermost(value: Tensor) -> Tensor:
    """Return a copy of images or of a convolution's kernel in which the channels are the innermost dimension.

    Also of a single channel, for which the strides alone tell convolutions which layout is meant: PyTorch's own
    conversion leaves those as they are, and the first layer, the largest of all, is then computed the slow way.
    """
    if value.dim() != 4:
        return value.clone()
    _, channels, height, width = value.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def channels_outermost(value: Tensor) -> Tensor:
    """Return a tensor in the usual layout."""
    return value.clone(memory_format=torch.contiguous_format) if value.dim() == 4 else value


def predictor(model: Stateless, weights: Weights, channels_last: bool) -> Callable[[Tensor], Tensor]:
    """Return the function from a batch to the model's logits in eval mode, computed in a layout."""
    if not channels_last:
        return lambda x: model(weights.params, weights.buffers, x, train=False)
    params = {name: channels_innermost(value) for name, value in weights.params.items()}
    return lambda x: model(params, weights.buffers, channels_innermost(x), train=False)
