"""The cohort's models as one ensemble of teachers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from fedstill.distill.weighting import TeacherWeights, class_shares, mixture
from fedstill.models.anatomy import batch_norms
from fedstill.models.layout import channels_innermost
from fedstill.models.stateless import Stateless
from fedstill.weights import Tensors, Weights


class Teachers(Protocol):
    """Frozen models and what each knows: n_k^y, (teachers, classes)."""

    @property
    def counts(self) -> Tensor:
        """n_k^y, int64 (teachers, classes)."""

    def __len__(self) -> int:
        """Return S."""

    def logits(self, x: Tensor) -> Tensor:
        """Return every teacher's logits on a batch, (teachers, batch, classes)."""

    def logits_of(self, teacher: int, x: Tensor) -> Tensor:
        """Return one teacher's logits, (batch, classes)."""

    def statistics_gap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and, per teacher, the distance of the batch from its BatchNorm statistics."""


@dataclass(frozen=True)
class StackedTeachers:
    """Models of one architecture, held as one stack of tensors.

    Parameters
    ----------
    model : Stateless
        The architecture; run in eval mode.
    params, buffers : dict
        Name -> (teachers, ...).
    counts : Tensor
        n_k^y, int64 (teachers, classes).
    batched : bool
        One ``vmap`` call for all teachers (faster on a GPU), or one call each on slices of the stack
        (faster on a CPU, where a batched convolution with weights of its own per teacher is slow).
    """

    model: Stateless
    params: Tensors
    buffers: Tensors
    counts: Tensor
    batched: bool = False

    @staticmethod
    def of(model: Stateless, weights: Sequence[Weights], counts: Tensor) -> StackedTeachers:
        """Stack ``weights``; batched where they lie on a GPU."""
        first = weights[0]
        params = {name: torch.stack([one.params[name] for one in weights]) for name in first.params}
        buffers = {name: torch.stack([one.buffers[name] for one in weights]) for name in first.buffers}
        device = next(iter(params.values())).device
        return StackedTeachers(model, params, buffers, counts, batched=device.type != "cpu")

    def __len__(self) -> int:
        return len(self.counts)

    def logits(self, x: Tensor) -> Tensor:
        """Return (teachers, batch, classes); gradients flow to ``x`` alone."""
        if not self.batched:
            return torch.stack([self.logits_of(teacher, x) for teacher in range(len(self))])

        def one(params: Tensors, buffers: Tensors) -> Tensor:
            return self.model(params, buffers, x, train=False)

        stacked: Tensor = torch.func.vmap(one)(self.params, self.buffers)
        return stacked

    def logits_of(self, teacher: int, x: Tensor) -> Tensor:
        """Return (batch, classes)."""
        params = {name: value[teacher] for name, value in self.params.items()}
        buffers = {name: value[teacher] for name, value in self.buffers.items()}
        return self.model(params, buffers, x, train=False)

    def statistics_gap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (teachers, batch, classes) and the gap (teachers,)."""
        pairs = []
        for teacher in range(len(self)):
            with recorded_gap(self.model.module) as gap:
                pairs.append((self.logits_of(teacher, x), gap))
        return torch.stack([logits for logits, _ in pairs]), torch.stack([gap.total(x) for _, gap in pairs])


@dataclass(frozen=True)
class GroupedTeachers:
    """Models of several architectures: one stack for each, their outputs side by side."""

    groups: Sequence[StackedTeachers]

    @property
    def counts(self) -> Tensor:
        """n_k^y, int64 (teachers, classes), in the order of the groups."""
        return torch.cat([group.counts for group in self.groups])

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    def logits(self, x: Tensor) -> Tensor:
        """Return (teachers, batch, classes); gradients flow to ``x`` alone."""
        return torch.cat([group.logits(x) for group in self.groups])

    def logits_of(self, teacher: int, x: Tensor) -> Tensor:
        """Return (batch, classes)."""
        for group in self.groups:
            if teacher < len(group):
                return group.logits_of(teacher, x)
            teacher -= len(group)
        raise IndexError(f"there are {len(self)} teachers")

    def statistics_gap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (teachers, batch, classes) and the gap (teachers,)."""
        pairs = [group.statistics_gap(x) for group in self.groups]
        return torch.cat([logits for logits, _ in pairs]), torch.cat([gap for _, gap in pairs])


@dataclass(frozen=True)
class ModuleTeachers:
    """Any trained modules as teachers, whatever their architectures; each is called by itself in eval mode."""

    modules: Sequence[nn.Module]
    counts: Tensor

    def __post_init__(self) -> None:
        for module in self.modules:
            module.eval().requires_grad_(False)

    def __len__(self) -> int:
        return len(self.modules)

    def logits(self, x: Tensor) -> Tensor:
        """Return (teachers, batch, classes)."""
        return torch.stack([self.logits_of(teacher, x) for teacher in range(len(self))])

    def logits_of(self, teacher: int, x: Tensor) -> Tensor:
        """Return (batch, classes)."""
        logits: Tensor = self.modules[teacher](x)
        return logits

    def statistics_gap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (teachers, batch, classes) and the gap (teachers,)."""
        pairs = []
        for module in self.modules:
            with recorded_gap(module) as gap:
                pairs.append((module(x), gap))
        return torch.stack([logits for logits, _ in pairs]), torch.stack([gap.total(x) for _, gap in pairs])


@dataclass(frozen=True)
class SomeTeachers:
    """Those of an ensemble whose places are named."""

    teachers: Teachers
    places: Sequence[int]

    @property
    def counts(self) -> Tensor:
        """n_k^y, int64 (teachers, classes)."""
        return self.teachers.counts[list(self.places)]

    def __len__(self) -> int:
        return len(self.places)

    def logits(self, x: Tensor) -> Tensor:
        """Return (teachers, batch, classes)."""
        return torch.stack([self.teachers.logits_of(place, x) for place in self.places])

    def logits_of(self, teacher: int, x: Tensor) -> Tensor:
        """Return (batch, classes)."""
        return self.teachers.logits_of(self.places[teacher], x)

    def statistics_gap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (teachers, batch, classes) and the gap (teachers,)."""
        logits, gaps = self.teachers.statistics_gap(x)
        return logits[list(self.places)], gaps[list(self.places)]


@dataclass
class Gap:
    """Sum over BatchNorm layers of ``||mean - running mean|| + ||var - running var||``."""

    terms: list[Tensor] = field(default_factory=list)

    def record(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add one layer's distance; a forward pre-hook."""
        x = inputs[0]
        dims = [0, *range(2, x.dim())]
        mean, var = x.mean(dims), x.var(dims, unbiased=False)
        running_mean, running_var = layer.running_mean, layer.running_var
        assert isinstance(running_mean, Tensor)
        assert isinstance(running_var, Tensor)
        self.terms.append(torch.linalg.vector_norm(mean - running_mean) + torch.linalg.vector_norm(var - running_var))

    def total(self, x: Tensor) -> Tensor:
        """Return the sum, 0 without BatchNorm."""
        return torch.stack(self.terms).sum() if self.terms else x.new_zeros(())


@contextmanager
def recorded_gap(module: nn.Module) -> Iterator[Gap]:
    """Record the distance of what passes through ``module`` from its BatchNorm layers' running statistics."""
    gap = Gap()
    parts = dict(module.named_modules())
    hooks = [parts[name].register_forward_pre_hook(gap.record) for name in batch_norms(module)]
    try:
        yield gap
    finally:
        for hook in hooks:
            hook.remove()


def teacher_accuracies(teachers: Teachers, x: Tensor, y: Tensor, batch_size: int = 500) -> list[float]:
    """Return each teacher's own accuracy."""
    right = torch.zeros(len(teachers), dtype=torch.int64, device=y.device)
    with torch.no_grad():
        for inputs, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size)):
            right += (teachers.logits(inputs).argmax(-1) == labels).sum(1)
    return [count / len(y) for count in right.tolist()]


def ensemble_accuracies(
    teachers: Teachers,
    x: Tensor,
    y: Tensor,
    kinds: Sequence[TeacherWeights],
    batch_size: int = 500,
    *,
    channels_last: bool = False,
) -> list[float]:
    """Return the test accuracy of each of the teachers' mixtures: the ceilings of any refinement.

    ``uniform`` averages probabilities, ``logits`` averages logits; ``class`` weighs each output by the teacher's
    share of that class. ``label`` would need the very label that is to be predicted and is refused.
    """
    if "label" in kinds:
        raise ValueError("a label-weighted ensemble needs the labels it predicts")
    shares = class_shares(teachers.counts).to(x.device)
    right = torch.zeros(len(kinds), dtype=torch.int64, device=y.device)
    with torch.no_grad():
        for inputs, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size)):
            logits = teachers.logits(channels_innermost(inputs) if channels_last else inputs)
            for place, kind in enumerate(kinds):
                right[place] += (mixture(logits, shares, labels, kind).argmax(-1) == labels).sum()
    return [count / len(y) for count in right.tolist()]
