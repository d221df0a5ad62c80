"""The ensembles that bound a refinement, and the distance from BatchNorm statistics, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedstill.distill.teachers import ModuleTeachers, StackedTeachers, ensemble_accuracies
from fedstill.models import Stateless, split_state
from fedstill.weights import Weights


class Says(nn.Module):
    """A teacher with the same probabilities for every sample."""

    def __init__(self, *probabilities: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(probabilities).log())

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer("logits").expand(len(x), -1)


def test_ensembles_by_hand() -> None:
    # Uniform: (0.55, 0.325, 0.125), class 0. By class, only the second knows class 0 and only the first class 1:
    # q is proportional to (0.3, 0.15, 0), class 0 again.
    teachers = ModuleTeachers([Says(0.8, 0.15, 0.05), Says(0.3, 0.5, 0.2)], torch.tensor([[0, 5, 0], [5, 0, 0]]))
    x = torch.zeros(4, 1)
    y = torch.tensor([0, 0, 1, 2])
    assert ensemble_accuracies(teachers, x, y, ["uniform", "class"]) == pytest.approx([0.5, 0.5])
    other = ModuleTeachers([Says(0.8, 0.15, 0.05), Says(0.3, 0.5, 0.2)], torch.tensor([[1, 0, 0], [9, 5, 0]]))
    # q_0 = 0.1 * 0.8 + 0.9 * 0.3 = 0.35, q_1 = 0.5: class 1, which uniform weights do not say.
    assert ensemble_accuracies(other, x, y, ["class", "uniform"], batch_size=3) == pytest.approx([0.25, 0.5])
    # Probabilities average to (0.534, 0.466), logits to those of 0.001 * 0.8 ** 2 against 0.999 * 0.2 ** 2.
    sure = ModuleTeachers([Says(0.001, 0.999), Says(0.8, 0.2), Says(0.8, 0.2)], torch.ones(3, 2).long())
    assert ensemble_accuracies(sure, x, y, ["uniform", "logits"], batch_size=3) == pytest.approx([0.5, 0.25])


def test_a_label_weighted_ensemble_is_refused() -> None:
    teachers = ModuleTeachers([Says(0.5, 0.5)], torch.ones(1, 2).long())
    with pytest.raises(ValueError, match="labels it predicts"):
        ensemble_accuracies(teachers, torch.zeros(1, 1), torch.zeros(1), ["label"])


def test_distance_from_batchnorm_statistics_by_hand() -> None:
    # Two channels; the batch has means (1, 2) and population variances (1, 4); running statistics (0, 2) and (1, 1).
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    layer = nn.BatchNorm1d(2)
    layer.get_buffer("running_mean").copy_(torch.tensor([0.0, 2.0]))
    model = nn.Sequential(layer, nn.Linear(2, 3))
    expected = math.hypot(1, 0) + math.hypot(0, 3)
    params, buffers = split_state(model)
    stacked = StackedTeachers.of(Stateless(model), [Weights(params, buffers)] * 2, torch.ones(2, 3).long())
    for teachers in (ModuleTeachers([model], torch.ones(1, 3).long()), stacked):
        logits, gaps = teachers.statistics_gap(x)
        assert gaps.tolist() == pytest.approx([expected] * len(teachers))
        assert torch.equal(logits, teachers.logits(x))
