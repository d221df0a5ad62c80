"""How good a model is: accuracy over all, by class and by client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedstill.data.dataset import Samples
from fedstill.models.stateless import Stateless
from fedstill.weights import Weights


@dataclass(frozen=True)
class Score:
    """Right answers and samples by class, and the mean cross-entropy."""

    right: Tensor
    seen: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return int(self.right.sum()) / max(int(self.seen.sum()), 1)

    @property
    def per_class(self) -> list[float | None]:
        """Share of right answers by class; None for a class without samples."""
        pairs = zip(self.right.tolist(), self.seen.tolist(), strict=True)
        return [right / seen if seen else None for right, seen in pairs]

    def record(self) -> dict[str, object]:
        """Return the score for the metrics file."""
        return {"accuracy": self.accuracy, "loss": self.loss, "per_class": self.per_class}


@torch.no_grad()
def evaluate(model: Stateless, weights: Weights, samples: Samples, num_classes: int, batch_size: int) -> Score:
    """Measure a model in eval mode on un-augmented samples."""
    right = torch.zeros(num_classes, dtype=torch.int64, device=samples.y.device)
    loss = torch.zeros((), dtype=torch.float64, device=samples.y.device)
    for x, y in zip(torch.split(samples.x, batch_size), torch.split(samples.y, batch_size), strict=True):
        logits = model(weights.params, weights.buffers, x, train=False)
        right += torch.bincount(y[logits.argmax(-1) == y], minlength=num_classes)
        loss += F.cross_entropy(logits, y, reduction="sum").double()
    seen = torch.bincount(samples.y, minlength=num_classes)
    return Score(right.cpu(), seen.cpu(), float(loss) / max(len(samples), 1))


def by_label_mix(score: Score, counts: Sequence[Sequence[int]]) -> list[float | None]:
    """Return the accuracy each client would see on test samples mixed like its own labels.

    The mean of the accuracies by class, weighted by the client's class counts (clients, classes). None where
    a client's classes have no test sample.
    """
    by_class = [accuracy if accuracy is not None else float("nan") for accuracy in score.per_class]
    found = torch.tensor(by_class, dtype=torch.float64)
    known = ~torch.isnan(found)
    weights = torch.tensor(counts, dtype=torch.float64) * known
    mixed = (weights * torch.nan_to_num(found)).sum(1) / weights.sum(1)
    return [None if value != value else value for value in mixed.tolist()]
