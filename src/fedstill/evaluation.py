"""How good models are: accuracy over all, by class and by client; and the ensembles that bound any refinement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedstill.data.dataset import IntArray, Samples
from fedstill.distill.teachers import Teachers, ensemble_accuracies
from fedstill.distill.weighting import TeacherWeights
from fedstill.models.layout import predictor
from fedstill.models.stateless import Stateless
from fedstill.weights import Weights

Record = dict[str, Any]

LISTED_CLIENTS = 200
"""Up to how many clients a record has a value for each; of more it has the mean and the worst tenth's."""


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
def evaluate(
    model: Stateless,
    weights: Weights,
    samples: Samples,
    num_classes: int,
    batch_size: int,
    *,
    channels_last: bool = False,
) -> Score:
    """Measure a model in eval mode on un-augmented samples, computed with the channels innermost where asked for."""
    right = torch.zeros(num_classes, dtype=torch.int64, device=samples.y.device)
    loss = torch.zeros((), dtype=torch.float64, device=samples.y.device)
    predict = predictor(model, weights, channels_last)
    for x, y in zip(torch.split(samples.x, batch_size), torch.split(samples.y, batch_size), strict=True):
        logits = predict(x)
        right += torch.bincount(y[logits.argmax(-1) == y], minlength=num_classes)
        loss += F.cross_entropy(logits, y, reduction="sum").double()
    seen = torch.bincount(samples.y, minlength=num_classes)
    return Score(right.cpu(), seen.cpu(), float(loss) / max(len(samples), 1))


class Parts(Sequence[Samples]):
    """Each client's own part of some samples, taken when it is asked for.

    Parameters
    ----------
    samples : Samples
    rows : sequence of int64 array
        By client, the positions of its part.
    """

    def __init__(self, samples: Samples, rows: Sequence[IntArray]) -> None:
        self.samples = samples
        self.rows = rows

    @overload
    def __getitem__(self, client: int) -> Samples: ...
    @overload
    def __getitem__(self, client: slice) -> Parts: ...
    def __getitem__(self, client: int | slice) -> Samples | Parts:
        if isinstance(client, slice):
            return Parts(self.samples, self.rows[client])
        return self.samples.take(self.rows[client])

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def everyone(self) -> tuple[Tensor, Tensor]:
        """All parts one after another, on the samples' device: positions, and whose each is (n,)."""
        rows = torch.from_numpy(np.concatenate(self.rows).astype(np.int64))
        owners = torch.repeat_interleave(torch.tensor([len(own) for own in self.rows]))
        return rows.to(self.samples.y.device), owners.to(self.samples.y.device)

    @torch.no_grad()
    def right(
        self, model: Stateless, weights: Weights, batch_size: int, *, channels_last: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return a model's right answers and the samples, by client; in full batches, whoever's the samples are."""
        rows, owners = self.everyone
        predict = predictor(model, weights, channels_last)
        hits = [predict(self.samples.x[at]).argmax(-1) == self.samples.y[at] for at in torch.split(rows, batch_size)]
        right = torch.bincount(owners[torch.cat(hits)], minlength=len(self))
        return right.cpu(), torch.bincount(owners, minlength=len(self)).cpu()


def by_label_mix(score: Score, counts: Tensor | Sequence[Sequence[int]]) -> list[float | None] | Record:
    """Return the accuracy each client would see on test samples mixed like its own labels.

    The mean of the accuracies by class, weighted by the client's class counts (clients, classes). None where
    a client's classes have no test sample. For many clients a summary, see :func:`each_or_summary`.
    """
    by_class = [accuracy if accuracy is not None else float("nan") for accuracy in score.per_class]
    found = torch.tensor(by_class, dtype=torch.float64)
    known = ~torch.isnan(found)
    weights = torch.as_tensor(counts, dtype=torch.float64) * known
    return each_or_summary((weights * torch.nan_to_num(found)).sum(1) / weights.sum(1))


def each_or_summary(values: Tensor) -> list[float | None] | Record:
    """Return every client's value, None for NaN; of more than ``LISTED_CLIENTS`` the mean, and that of the worst tenth.

    A metrics file would otherwise grow with the federation in every line.
    """
    if len(values) <= LISTED_CLIENTS:
        return [None if value != value else value for value in values.tolist()]
    known = values[~torch.isnan(values)].sort().values
    if not len(known):
        return {"mean": None, "worst_decile": None}
    return {"mean": float(known.mean()), "worst_decile": float(known[: -(-len(known) // 10)].mean())}


@dataclass(frozen=True)
class Evaluation:
    """What models are measured on, and how.

    Parameters
    ----------
    sets : dict
        Name -> samples: ``test``, ``validation``.
    clients : Parts or None
        Each client's own held-out part.
    ensembles : Samples or None
        Those on which ensembles are measured.
    num_classes, batch_size : int
    label_counts : Tensor, (clients, classes)
        n_k^y of each client, for the accuracy on the client's own mix of labels.
    channels_last : bool
        How images and the kernels of convolutions lie in memory.
    """

    sets: dict[str, Samples]
    clients: Parts | None
    ensembles: Samples | None
    num_classes: int
    batch_size: int
    label_counts: Tensor
    channels_last: bool = False

    def score(self, model: Stateless, weights: Weights, samples: Samples) -> Score:
        """Measure one model on some samples."""
        return evaluate(model, weights, samples, self.num_classes, self.batch_size, channels_last=self.channels_last)

    def shared(self, model: Stateless, weights: Weights) -> Record:
        """Return the scores of a model that all clients share, on every set."""
        record: Record = {}
        for name, samples in self.sets.items():
            score = self.score(model, weights, samples)
            record[name] = score.record()
            if name == "test":
                record["by_client_label_mix"] = by_label_mix(score, self.label_counts)
        if self.clients is not None:
            record["clients"] = by_client(
                *self.clients.right(model, weights, self.batch_size, channels_last=self.channels_last)
            )
        return record

    def personal(self, models: Iterable[tuple[Stateless, Weights]]) -> Record:
        """Return the scores of every client's own model, on every set: the mean over clients, and each client's."""
        scores: dict[str, list[tuple[float, float]]] = {name: [] for name in self.sets}
        own: list[Score] = []
        for client, (model, weights) in enumerate(models):  # one at a time: they may lie on a disk
            for name, samples in self.sets.items():
                score = self.score(model, weights, samples)
                scores[name].append((score.accuracy, score.loss))
            if self.clients is not None:
                own.append(self.score(model, weights, self.clients[client]))
        record: Record = {}
        for name, found in scores.items():
            accuracies = [accuracy for accuracy, _ in found]
            record[name] = {
                "accuracy": sum(accuracies) / len(found),
                "loss": sum(loss for _, loss in found) / len(found),
                "per_client": each_or_summary(torch.tensor(accuracies, dtype=torch.float64)),
            }
        if self.clients is not None:
            counted = torch.tensor([[int(score.right.sum()), int(score.seen.sum())] for score in own])
            record["clients"] = by_client(counted[:, 0], counted[:, 1])
        return record

    def ensemble_accuracies(self, teachers: Teachers, fused: Iterable[tuple[Stateless, Weights, int]]) -> Record:
        """Return the accuracy of the cohort's ensembles, the ceiling of any refinement, and of what it starts from.

        ``uniform`` averages probabilities, ``logits`` averages logits (FedEnsemble in FedGen's table),
        ``class_weighted`` weighs class by class. ``fused`` is the mean over the fused models, each with the number of
        its clients, on the same samples.
        """
        samples = self.ensembles
        if samples is None:
            return {}
        kinds: dict[str, TeacherWeights] = {"uniform": "uniform", "logits": "logits", "class_weighted": "class"}
        found = ensemble_accuracies(
            teachers, samples.x, samples.y, [*kinds.values()], self.batch_size, channels_last=self.channels_last
        )
        starts = [(self.score(model, weights, samples).accuracy, clients) for model, weights, clients in fused]
        start = sum(accuracy * clients for accuracy, clients in starts) / sum(clients for _, clients in starts)
        return {**dict(zip(kinds, found, strict=True)), "fused": start}


def by_client(right: Tensor, seen: Tensor) -> Record:
    """Return the accuracy over all clients' own samples, and each client's (None for one without samples)."""
    return {
        "accuracy": int(right.sum()) / max(int(seen.sum()), 1),
        "per_client": each_or_summary(right.double() / seen.double()),
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
