"""Means over seeds, and paired differences with Student's interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds.

    Parameters
    ----------
    mean : float
    std : float or None
        Sample standard deviation (n - 1); None for one value.
    n : int
        How many values.
    """

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, and its confidence interval.

    Parameters
    ----------
    mean : float
    low, high : float or None
        Ends of the 95 % interval; None for one pair.
    n : int
        How many pairs.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def spread(values: Iterable[float]) -> Spread | None:
    """Return mean and standard deviation; None of no value."""
    found = list(values)
    if not found:
        return None
    return Spread(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))


def paired_difference(ours: Mapping[str, float], base: Mapping[str, float]) -> Difference | None:
    """Return ``ours - base`` over the seeds that both have; None where they share no seed.

    Parameters
    ----------
    ours, base : mapping
        Seed -> value.
    """
    return mean_difference(value - base[seed] for seed, value in ours.items() if seed in base)


def mean_difference(differences: Iterable[float]) -> Difference | None:
    """Return the mean of differences within pairs and its interval; None of no pair."""
    found = spread(differences)
    if found is None:
        return None
    if found.std is None:
        return Difference(found.mean, None, None, 1)
    half = t_within(CONFIDENCE, found.n - 1) * found.std / math.sqrt(found.n)
    return Difference(found.mean, found.mean - half, found.mean + half, found.n)


def t_within(probability: float, degrees: int) -> float:
    """Return the t with P(|T| <= t) = ``probability`` for Student's T with whole degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves of an angle: to the last bits
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, degrees) < probability else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Return P(|T| <= sqrt(degrees) tan(angle)): the finite sums for whole degrees (Abramowitz, Stegun 26.7.3-4)."""
    odd = degrees % 2
    total, term = 0.0, math.cos(angle) if odd else 1.0
    for factor in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (factor - 1) / factor
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def worst_decile(values: Sequence[float | None]) -> float | None:
    """Return the mean of the lowest tenth, rounded up to whole values, as ``evaluation.each_or_summary`` has it."""
    known = sorted(value for value in values if value is not None)
    return statistics.fmean(known[: -(-len(known) // 10)]) if known else None
