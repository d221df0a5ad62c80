"""Models whose layers draw random numbers as they run: PyTorch's own take them from one stream for the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def random_layers(module: nn.Module) -> list[str]:
    """Return the kinds of layers in a model that draw from the one random stream of the whole process."""
    stock = (_DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
    found = {
        type(part).__name__
        for part in module.modules()
        if isinstance(part, stock) or (isinstance(part, nn.MultiheadAttention) and part.dropout > 0)
    }
    return sorted(found)


@contextmanager
def layers_draw_from(module: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Give the random layers of a model, where it has any, a stream of their own; not thread safe with them."""
    if not random_layers(module):
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
