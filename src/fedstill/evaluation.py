"""How good models are: accuracy over all, by class and by client; and the ensembles that bound any refinement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedstill.data.dataset import Samples
from fedstill.distill.teachers import Teachers, ensemble_accuracy
from fedstill.distill.weighting import TeacherWeights
from fedstill.models.stateless import Stateless
from fedstill.weights import Weights

Record = dict[str, Any]


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

    def record(self) -> Record:
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


@dataclass(frozen=True)
class Evaluation:
    """What models are measured on, and how.

    Parameters
    ----------
    sets : dict
        Name -> samples: ``test``, ``validation``.
    clients : list of Samples or None
        Each client's own held-out part.
    ensembles : Samples or None
        Those on which ensembles are measured.
    num_classes, batch_size : int
    label_counts : sequence
        n_k^y of each client, (clients, classes), for the accuracy on the client's own mix of labels.
    """

    sets: dict[str, Samples]
    clients: list[Samples] | None
    ensembles: Samples | None
    num_classes: int
    batch_size: int
    label_counts: Sequence[Sequence[int]]

    def score(self, model: Stateless, weights: Weights, samples: Samples) -> Score:
        """Measure one model on some samples."""
        return evaluate(model, weights, samples, self.num_classes, self.batch_size)

    def shared(self, model: Stateless, weights: Weights) -> Record:
        """Return the scores of a model that all clients share, on every set."""
        record: Record = {}
        for name, samples in self.sets.items():
            score = self.score(model, weights, samples)
            record[name] = score.record()
            if name == "test":
                record["by_client_label_mix"] = by_label_mix(score, self.label_counts)
        if self.clients is not None:
            record["clients"] = by_client([self.score(model, weights, part) for part in self.clients])
        return record

    def personal(self, models: Sequence[tuple[Stateless, Weights]]) -> Record:
        """Return the scores of every client's own model, on every set: the mean over clients, and each client's."""
        record: Record = {}
        for name, samples in self.sets.items():
            scores = [self.score(model, weights, samples) for model, weights in models]
            record[name] = {
                "accuracy": sum(score.accuracy for score in scores) / len(scores),
                "loss": sum(score.loss for score in scores) / len(scores),
                "per_client": [score.accuracy for score in scores],
            }
        if self.clients is not None:
            pairs = zip(models, self.clients, strict=True)
            record["clients"] = by_client([self.score(model, weights, part) for (model, weights), part in pairs])
        return record

    def ensemble_accuracies(self, teachers: Teachers) -> Record:
        """Return the accuracy of the cohort's ensembles: the ceiling of any refinement.

        ``uniform`` averages probabilities, ``logits`` averages logits (FedEnsemble in FedGen's table),
        ``class_weighted`` weighs class by class.
        """
        samples = self.ensembles
        if samples is None:
            return {}
        kinds: dict[str, TeacherWeights] = {"uniform": "uniform", "logits": "logits", "class_weighted": "class"}
        x, y = samples.x, samples.y
        return {name: ensemble_accuracy(teachers, x, y, kind, self.batch_size) for name, kind in kinds.items()}


def by_client(scores: Sequence[Score]) -> Record:
    """Return the accuracy over all clients' own samples, and each client's (None for one without samples)."""
    right, seen = sum(int(s.right.sum()) for s in scores), sum(int(s.seen.sum()) for s in scores)
    return {
        "accuracy": right / max(seen, 1),
        "per_client": [score.accuracy if int(score.seen.sum()) else None for score in scores],
    }


def over_architectures(records: Mapping[str, Record], clients: Sequence[int]) -> Record:
    """Return one record for a federation of several models: means weighted by each model's clients, and each model's.

    Parameters
    ----------
    records : mapping
        Model's name -> its scores.
    clients : sequence of int
        How many clients use each model.
    """
    total = sum(clients)
    joined: Record = {}
    for name, first in next(iter(records.values())).items():
        if isinstance(first, dict) and "accuracy" in first:
            parts = [record[name] for record in records.values()]
            joined[name] = {
                key: sum(part[key] * count for part, count in zip(parts, clients, strict=True)) / total
                for key in ("accuracy", "loss")
                if key in first
            }
    return {**joined, "by_model": dict(records)}
