"""A model's state as plain tensors, and the one weighted average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
State = dict[str, Tensors]
"""State that a method keeps between rounds: group -> name -> tensor."""


@dataclass(frozen=True)
class Weights:
    """The tensors of one model: trainable ``params`` and ``buffers`` (BatchNorm statistics), by name."""

    params: Tensors
    buffers: Tensors

    def clone(self) -> Weights:
        """Return a copy that shares no memory with this one."""
        return self.map(torch.clone)

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """Apply ``function`` to every tensor."""
        return Weights(
            {name: function(value) for name, value in self.params.items()},
            {name: function(value) for name, value in self.buffers.items()},
        )

    def to(self, device: torch.device | str) -> Weights:
        """Return the same tensors on ``device``."""
        return self.map(lambda value: value.to(device))

    def all_finite(self) -> bool:
        """Say whether no tensor holds a NaN or an infinity."""
        return finite([*self.params.values(), *self.buffers.values()])


def finite(tensors: Iterable[Tensor]) -> bool:
    """Say whether no tensor holds a NaN or an infinity; integers never do.

    Smallest and largest values tell, NaN included; that is one fast pass and one answer for all tensors.
    """
    floats = [value for value in tensors if value.is_floating_point() and value.numel()]
    ends = [end.double() for value in floats for end in torch.aminmax(value)]
    return not ends or bool(torch.isfinite(torch.stack(ends)).all())


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``sum_k weights[k] * tensors[k]``, added in the order given.

    The sum is taken in float64 so that an average of equal tensors is that tensor again; integer tensors
    (BatchNorm's batch counter) are truncated, as the FedFTG code does.
    """
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor.to(torch.float64), alpha=weight)
    return _rounded(total, tensors[0])


def _rounded(total: Tensor, like: Tensor) -> Tensor:
    if not like.is_floating_point():
        total += 1e-9  # a mean of equal integers may come out a hair below; truncation must not lose one
    return total.to(like.dtype)


def weighted_mean(models: Iterable[Weights], weights: Sequence[float]) -> Weights:
    """Return the average of ``models`` with ``weights`` normalised to one, parameters and buffers alike.

    The sums of :func:`weighted_sum`, taken one model after another, so that models that are read from a disk need
    not be in memory together.
    """
    whole = float(sum(weights))
    others = iter(models)
    first = next(others)
    sums = first.map(lambda value: torch.zeros_like(value, dtype=torch.float64))
    for model, weight in zip(chain([first], others), weights, strict=True):
        for totals, own in ((sums.params, model.params), (sums.buffers, model.buffers)):
            for name, total in totals.items():
                total.add_(own[name].to(torch.float64), alpha=weight / whole)
    return Weights(
        {name: _rounded(total, first.params[name]) for name, total in sums.params.items()},
        {name: _rounded(total, first.buffers[name]) for name, total in sums.buffers.items()},
    )


def zeros_like(tensors: Tensors) -> Tensors:
    """Return tensors of zeros with the same names and shapes."""
    return {name: torch.zeros_like(value) for name, value in tensors.items()}
