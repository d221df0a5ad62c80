"""Models whose layers draw random numbers as they run: PyTorch's own take them from one stream for the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from fedstill.models.layers import Dropout


def random_layers(module: nn.Module) -> list[str]:
    """Return the kinds of layers in a model that draw from the one random stream of the whole process.

    :class:`fedstill.models.layers.Dropout` is none of them: it can have a stream of its own.
    """
    stock = (_DropoutNd, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
    found = {
        type(part).__name__
        for part in module.modules()
        if isinstance(part, stock) or (isinstance(part, nn.MultiheadAttention) and part.dropout > 0)
    }
    return sorted(found)


def draws_random_numbers(module: nn.Module) -> bool:
    """Say whether any layer of a model does in train mode, from whichever stream."""
    return bool(random_layers(module)) or any(isinstance(part, Dropout) for part in module.modules())


def own_stream(module: nn.Module) -> torch.Generator | None:
    """Return the generator that a model's Dropout layers share within :func:`layers_draw_from`; None without any."""
    return next((part.generator for part in module.modules() if isinstance(part, Dropout)), None)


@contextmanager
def layers_draw_from(module: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Give the random layers of a model, where it has any, a stream of their own within the block.

    fedstill's Dropout layers share one fresh generator, in the order in which they run; the global stream is
    not touched, so threads may do this at once, each with its own copy of the model. PyTorch's own layers
    draw from the global stream, which is put back afterwards; not thread safe with those.

    Parameters
    ----------
    module : nn.Module
        The model; a copy made within the block continues with a copy of the generator.
    device : torch.device
        Where the model runs.
    seed : int
        Seed of the stream.
    """
    with _own_generator(module, device, seed), _forked_global_stream(module, device, seed):
        yield


@contextmanager
def _own_generator(module: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    own = [(part, part.generator) for part in module.modules() if isinstance(part, Dropout)]
    generator = torch.Generator(device).manual_seed(seed) if own else None
    try:
        for part, _ in own:
            part.generator = generator
        yield
    finally:
        for part, before in own:
            part.generator = before


@contextmanager
def _forked_global_stream(module: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    if not random_layers(module):
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
