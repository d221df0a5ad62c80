"""The one local SGD loop that every method's clients run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from fedstill.data.augment import Moves, moved
from fedstill.models.layout import channels_innermost, channels_outermost, layout_of
from fedstill.models.stateless import Stateless
from fedstill.weights import State, Tensors, Weights

if TYPE_CHECKING:
    from fedstill.methods.base import LocalObjective

LastBatch = Literal["keep", "drop"]

CLIP_EPSILON = 1e-6
"""Added to the gradient norm before the division, as ``torch.nn.utils.clip_grad_norm_`` does."""


@dataclass(frozen=True)
class SGD:
    """Plain SGD with the order of the FedDyn and FedFTG code: clip, then weight decay, then momentum.

    Parameters
    ----------
    lr : float
        Learning rate of this round, eta_t.
    momentum, weight_decay : float
        0 switches them off. Weight decay is added after the clip and is not clipped.
    clip_norm : float or None
        Largest global norm of the gradient over all parameters.
    """

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def clip(self, grads: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """Return the clipped gradients and their global norm before the clip."""
        if self.clip_norm is None:
            return grads, None
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        factor = torch.clamp(self.clip_norm / (norm + CLIP_EPSILON), max=1.0)
        return list(torch._foreach_mul(grads, factor)), norm

    @torch.no_grad()
    def update(self, params: list[Tensor], grads: list[Tensor], velocity: list[Tensor]) -> list[Tensor]:
        """Step ``params`` in place and return the new velocity (empty without momentum)."""
        if self.weight_decay:
            grads = list(torch._foreach_add(grads, params, alpha=self.weight_decay))
        if self.momentum:
            if velocity:
                torch._foreach_mul_(velocity, self.momentum)
                torch._foreach_add_(velocity, grads)
            else:
                velocity = [grad.clone() for grad in grads]
            grads = velocity
        torch._foreach_add_(params, grads, alpha=-self.lr)
        return velocity


@dataclass(frozen=True)
class Trained:
    """What local training gave: the new weights, the steps taken, each step's loss, and the labels it saw.

    ``sums`` has what the objective's ``loss_and_sums`` noted, added up over the steps.
    """

    weights: Weights
    steps: int
    losses: Tensor
    grad_norms: Tensor | None
    labels: Tensor
    sums: Tensors = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean training loss over the steps."""
        return float(self.losses.mean()) if len(self.losses) else math.nan


def used_in_epoch(samples: int, batch_size: int, last_batch: LastBatch) -> int:
    """Return how many of a client's samples an epoch uses: all, or those that fill batches, where one can be filled."""
    return samples if last_batch == "keep" or samples < batch_size else samples - samples % batch_size


def step_count(samples: int, batch_size: int, epochs: int, steps: int | None, last_batch: LastBatch = "keep") -> int:
    """Return how many SGD steps ``epochs`` over ``samples`` take, or ``steps`` where that is given."""
    if steps is not None:
        return steps
    return epochs * math.ceil(used_in_epoch(samples, batch_size, last_batch) / batch_size)


def batches(
    samples: int,
    batch_size: int,
    steps: int,
    generator: torch.Generator,
    last_batch: LastBatch = "keep",
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    """Yield ``steps`` index batches: a new shuffle each epoch, its last smaller batch kept or dropped.

    Shuffles are drawn on the CPU and brought to ``device`` whole: a GPU would be waited for at every batch.
    """
    done = 0
    while done < steps:
        shuffled = torch.randperm(samples, generator=generator)[: used_in_epoch(samples, batch_size, last_batch)]
        for batch in torch.split(shuffled.to(device), batch_size):
            if done == steps:
                return
            done += 1
            yield batch


def train_locally(
    model: Stateless,
    objective: LocalObjective,
    start: Weights,
    extras: State,
    x: Tensor,
    y: Tensor,
    order: Iterable[Tensor],
    sgd: SGD,
    *,
    draws: Tensors | None = None,
    moves: Sequence[Moves] | None = None,
    channels_last: bool = False,
) -> Trained:
    """Run SGD on one client's data.

    Parameters
    ----------
    model : Stateless
        The architecture.
    objective : LocalObjective
        Its ``loss`` is differentiated, its ``adjust`` corrects the gradient inside the clip.
    start : Weights
        Where training starts; not changed.
    extras : dict
        What ``objective.prepare`` returned.
    x, y : Tensor
        The client's samples (n, ...) and labels (n,), on the device.
    order : iterable of Tensor
        The index batch of each step.
    sgd : SGD
        Step size, clip, weight decay, momentum.
    draws : dict, optional
        What ``objective.draws`` returned, each tensor (steps, ...); a step's rows stand in ``extras["draws"]``.
    moves : sequence of Moves, optional
        How the images of each step are augmented.
    channels_last : bool
        Hold the kernels of convolutions with the channels as the innermost dimension, which convolutions follow.

    Returns
    -------
    Trained
        Its weights are contiguous, whatever they were while they were trained.
    """
    names = list(start.params)
    layout = layout_of(channels_last)
    params = {name: layout(value.detach()).requires_grad_() for name, value in start.params.items()}
    buffers = {name: value.detach().clone() for name, value in start.buffers.items()}
    leaves = [params[name] for name in names]
    velocity: list[Tensor] = []
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    labels = [y[:0]]
    sums: Tensors = {}
    for step, batch in enumerate(order):
        inputs = x.index_select(0, batch)  # far faster than x[batch] on a CPU
        inputs = moved(inputs, moves[step]) if moves else inputs
        inputs = channels_innermost(inputs) if channels_last else inputs
        given = {**extras, "draws": {name: value[step] for name, value in draws.items()}} if draws else extras
        labels.append(y[batch])
        loss, noted = objective.loss_and_sums(model, params, buffers, inputs, labels[-1], given)
        grads = gradients(loss, leaves)
        sums = {name: sums[name] + value if name in sums else value for name, value in noted.items()}
        with torch.no_grad():
            grads = objective.adjust(grads, params, extras)
        grads, norm = sgd.clip(grads)
        velocity = sgd.update(leaves, grads, velocity)
        losses.append(loss.detach())
        if norm is not None:
            norms.append(norm)
    weights = Weights({name: value.detach() for name, value in params.items()}, buffers)
    weights = weights.map(channels_outermost) if channels_last else weights
    stacked = torch.stack(losses) if losses else torch.zeros(0)
    return Trained(weights, len(losses), stacked, torch.stack(norms) if norms else None, torch.cat(labels), sums)


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return d loss / d leaves; a leaf the loss does not reach gets zeros."""
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))
