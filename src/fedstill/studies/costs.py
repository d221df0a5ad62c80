"""What an accuracy costs, in rounds, bytes and seconds."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fedstill.errors import InputError
from fedstill.evaluation import Record
from fedstill.experiment import accuracies
from fedstill.progress import megabytes
from fedstill.studies.results import RunData, seconds
from fedstill.studies.statistics import Spread, spread

On = Literal["test", "validation"]
Cost = Literal["seconds", "megabytes"]
COSTS: tuple[Cost, ...] = get_args(Cost)
SPENT: dict[Cost, Callable[[Sequence[Record]], float]] = {"seconds": seconds, "megabytes": megabytes}
"""What the first rounds of a run took."""


@dataclass(frozen=True)
class Band:
    """Accuracy of the final model after one round, over the seeds.

    Parameters
    ----------
    round : int
    accuracy : Spread
    megabytes, seconds : float
        Spent until then, mean over the seeds.
    """

    round: int
    accuracy: Spread
    megabytes: float
    seconds: float


@dataclass(frozen=True)
class Target:
    """What it takes to reach an accuracy: medians over the seeds that do.

    Parameters
    ----------
    accuracy : float
        A part of 1.
    reached, of : int
        How many of the whole runs reach it.
    rounds, megabytes, seconds : float or None
        Until the first evaluated round with at least this accuracy; None where no seed reaches it.
    """

    accuracy: float
    reached: int
    of: int
    rounds: float | None
    megabytes: float | None
    seconds: float | None


def measured(run: RunData, on: On) -> dict[int, float]:
    """Return the final model's accuracy by evaluated round.

    Raises
    ------
    InputError
        If nothing was measured on these samples.
    """
    found = accuracies(run.records, on)
    if not found:
        there = " and ".join(run.config.eval.on) or "nothing"
        raise InputError(f"{run.path}: no accuracy on {on} samples, it was measured on {there} (eval.on)")
    return found


def target(runs: Sequence[RunData], accuracy: float, on: On) -> Target:
    """Return what it takes some whole runs to reach an accuracy."""
    spent = []
    for run in runs:
        reached = (round for round, found in measured(run, on).items() if found >= accuracy)
        if (round := next(reached, None)) is not None:
            until = run.records[:round]
            spent.append((float(round), megabytes(until), seconds(until)))
    medians = [statistics.median(column) for column in zip(*spent, strict=True)] if spent else [None] * 3
    return Target(accuracy, len(spent), len(runs), *medians)


def curve(runs: Sequence[RunData], on: On) -> Iterator[Band]:
    """Yield accuracy and costs over some runs, by evaluated round, ascending."""
    found = [(run, measured(run, on)) for run in runs]
    for round in sorted({round for _, own in found for round in own}):
        there = [(run, own[round]) for run, own in found if round in own]
        accuracy = spread(value for _, value in there)
        assert accuracy is not None
        until = [run.records[:round] for run, _ in there]
        yield Band(round, accuracy, statistics.fmean(map(megabytes, until)), statistics.fmean(map(seconds, until)))


def gain_at_equal_cost(run: RunData, base: RunData, on: On, cost: Cost) -> float | None:
    """Return by how much a run is more accurate than another that has spent as much: mean over its evaluated rounds.

    The other's accuracy at that cost lies on the line between the evaluated rounds around it. Rounds of ``run`` that
    end before the other was first measured, or after its end, have nothing beside them and are left out; None where
    all do, or where the other spends nothing.
    """
    spent, found = _over(base, on, cost)
    if not spent[-1]:
        return None
    gains = []
    for at, accuracy in zip(*_over(run, on, cost), strict=True):
        after = bisect_left(spent, at)
        if after < len(spent) and spent[after] == at:
            gains.append(accuracy - found[after])
        elif 0 < after < len(spent):
            share = (at - spent[after - 1]) / (spent[after] - spent[after - 1])
            gains.append(accuracy - found[after - 1] - share * (found[after] - found[after - 1]))
    return statistics.fmean(gains) if gains else None


def _over(run: RunData, on: On, cost: Cost) -> tuple[list[float], list[float]]:
    """Return the cost up to each evaluated round, ascending, and the accuracy there."""
    found = measured(run, on)
    return [SPENT[cost](run.records[:round]) for round in found], list(found.values())
