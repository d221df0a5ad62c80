"""Runs side by side: the table, and one line on what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

from fedstill.evaluation import Record
from fedstill.experiment import accuracies
from fedstill.markdown import grid
from fedstill.progress import megabytes

GOAL = 0.9
"""Accuracy whose first round is in the table."""


@dataclass(frozen=True)
class Curve:
    """One run of a comparison.

    Parameters
    ----------
    name : str
        As shown.
    accuracies : dict
        Round -> accuracy, ascending; at least one.
    seconds : float
        Spent on training, fusing and refining; evaluation is left out.
    server_seconds : float
        The part of ``seconds`` that the server spent.
    megabytes : float
        Sent in both directions.
    base : str or None
        Name of the run that this one is a variant of.
    """

    name: str
    accuracies: dict[int, float]
    seconds: float
    server_seconds: float
    megabytes: float
    base: str | None = None

    @staticmethod
    def of(name: str, records: list[Record], base: str | None = None, on: str = "test") -> Curve:
        """Return the curve of a run's records."""
        train, server = (sum(_phase(record, phases) for record in records) for phases in (("train",), SERVER))
        return Curve(name, accuracies(records, on), train + server, server, megabytes(records), base)

    @property
    def first(self) -> float:
        """Accuracy after the first evaluated round."""
        return next(iter(self.accuracies.values()))

    @property
    def last(self) -> float:
        """Accuracy after the last round."""
        return list(self.accuracies.values())[-1]

    @property
    def mean(self) -> float:
        """Mean accuracy over the evaluated rounds."""
        return sum(self.accuracies.values()) / len(self.accuracies)

    def rounds_to(self, goal: float) -> int | None:
        """Return the first evaluated round with at least this accuracy."""
        return next((round for round, accuracy in self.accuracies.items() if accuracy >= goal), None)


SERVER = ("fuse", "refine")


def _phase(record: Record, phases: Sequence[str]) -> float:
    seconds: Any = record["seconds"]
    return float(sum(seconds.get(phase, 0.0) for phase in phases))


@dataclass(frozen=True)
class Bound:
    """What a comparison's runs lie between.

    Parameters
    ----------
    name : str
        As shown.
    accuracies : dict
        Round -> accuracy, for the rounds in which it is known.
    kind : str
        ``floor`` or ``ceiling``.
    """

    name: str
    accuracies: dict[int, float]
    kind: str

    @property
    def last(self) -> float:
        """Accuracy in the last round in which it is known."""
        return list(self.accuracies.values())[-1]


def header(curves: Sequence[Curve]) -> list[str]:
    """Return the names of the columns."""
    first, last = ends(curves)
    return [
        "",
        f"round {first}",
        f"round {last}",
        "mean",
        f"rounds to {GOAL:.0%}",
        "total s",
        "server s",
        "MB sent",
    ]


def ends(curves: Sequence[Curve]) -> tuple[int, int]:
    """Return the first and the last evaluated round."""
    rounds = [round for curve in curves for round in curve.accuracies]
    return min(rounds), max(rounds)


def curve_row(curve: Curve) -> list[str]:
    """Return the cells of a run."""
    reached = curve.rounds_to(GOAL)
    return [
        curve.name,
        f"{curve.first:.1%}",
        f"{curve.last:.1%}",
        f"{curve.mean:.1%}",
        "never" if reached is None else str(reached),
        f"{curve.seconds:.1f}",
        f"{curve.server_seconds:.1f}",
        f"{curve.megabytes:.1f}",
    ]


def bound_cells(bound: Bound, rounds: tuple[int, int]) -> list[str]:
    """Return the accuracies of a bound; empty where it is not known."""
    return [f"{bound.accuracies[round]:.1%}" if round in bound.accuracies else "" for round in rounds]


def rich_table(curves: Sequence[Curve], bounds: Sequence[Bound], title: str) -> Table:
    """Return the table for a terminal; the best of each accuracy column is bold."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column, name in enumerate(header(curves)):
        widest = max(map(len, name.split()), default=0)
        table.add_column(name, justify="right" if column else "left", no_wrap=not column, min_width=widest)
    best = [max(column) for column in zip(*((curve.first, curve.last, curve.mean) for curve in curves))]
    for curve in curves:
        cells = curve_row(curve)
        for column, accuracy in enumerate((curve.first, curve.last, curve.mean)):
            if accuracy == best[column]:
                cells[column + 1] = f"[bold]{cells[column + 1]}[/]"
        table.add_row(*cells)
    for kind, group in groupby(bounds, key=lambda bound: bound.kind):
        table.add_section()
        table.add_row(kind, style="dim")
        for bound in group:
            table.add_row(f"  {bound.name}", *bound_cells(bound, ends(curves)), style="dim")
    return table


def markdown(curves: Sequence[Curve], bounds: Sequence[Bound], title: str) -> str:
    """Return the table as Markdown, with what it says below it."""
    names = header(curves)
    rows = [curve_row(curve) for curve in curves]
    for bound in bounds:
        cells = [f"{bound.kind}: {bound.name}", *bound_cells(bound, ends(curves))]
        rows.append(cells + [""] * (len(names) - len(cells)))
    return f"{title}\n\n{grid(names, rows)}\n\n{reading(curves, bounds)}\n"


def reading(curves: Sequence[Curve], bounds: Sequence[Bound]) -> str:
    """Return what the numbers say: who leads, what each variant gains, how much room is left."""
    first, last = ends(curves)
    parts = [f"After round {first} {leaders(curves, first)}; after round {last} {leaders(curves, last)}"]
    by_name = {curve.name: curve for curve in curves}
    gains = [
        f"{curve.name} {_points(curve.first - base.first)}, {_points(curve.last - base.last)}"
        for curve in curves
        if curve.base is not None and (base := by_name.get(curve.base))
    ]
    if gains:
        parts.append(f"Gain over the base in points, after round {first} and round {last}: {'; '.join(gains)}")
    ceilings = [bound for bound in bounds if bound.kind == "ceiling"]
    if ceilings:
        top = max(ceilings, key=lambda bound: bound.last)
        room = top.last - max(curve.last for curve in curves)
        side = "below" if room >= 0 else "above"
        parts.append(f"The best end is {abs(100 * room):.1f} points {side} the highest ceiling ({top.name})")
    return ". ".join(parts) + "."


def leaders(curves: Sequence[Curve], round: int) -> str:
    """Return who is best after a round, ties included."""
    found = {curve.name: curve.accuracies[round] for curve in curves if round in curve.accuracies}
    best = max(found.values())
    names = [name for name, accuracy in found.items() if accuracy == best]
    return f"{' and '.join(names)} {'leads' if len(names) == 1 else 'lead'} with {best:.1%}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"
