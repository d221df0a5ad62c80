"""Figures with a row for each method: its name, its numbers, and below them a bar, an interval or cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedstill.report.html.lines import wrapped
from fedstill.report.html.style import COLUMN, FAINT, FONT, GRID, INK, PAPER
from fedstill.studies.statistics import Difference, Spread
from fedstill.studies.tables import per_cent, points

THICK, CELL, GAP, LEGEND = 0.1, 0.18, 0.05, 0.2
"""Inches: of a bar, of a row of cells, between two rows, of a legend."""
LINES = 2  # of a name
LETTERS = 54  # in a column's width
NUMBERED = 12
"""Classes whose accuracies are written into the cells."""
TINTS = {"train": 1.0, "fuse": 0.25, "refine": 0.6, "evaluate": 0.12}
"""Of the phases of a round, in their order; another phase has that of ``fuse``."""
HEAT = ListedColormap(colormaps["YlGnBu"](np.linspace(0.1, 0.95, 256)))


@dataclass(frozen=True)
class Row:
    """What all rows have: a name, the numbers in words, a colour."""

    label: str
    said: str
    colour: str


@dataclass(frozen=True)
class Rows:
    """A figure with rows: ``at`` are their middles, in inches from the top."""

    figure: Figure
    axes: Axes
    at: list[float]


@dataclass(frozen=True)
class Bar(Row):
    """A mean with its standard deviation, and the seeds it comes from."""

    value: Spread
    seeds: Sequence[float] = ()
    beside: float | None = None


def bars(shown: Sequence[Bar]) -> Figure:
    """Draw accuracies as bars from 0, with one standard deviation and each seed."""
    drawn = _rows(shown)
    axes = drawn.axes
    for place, row in zip(drawn.at, shown, strict=True):
        axes.barh(place, row.value.mean, height=THICK, color=row.colour, linewidth=0)
        _whisker(axes, place, row.value)
        axes.plot(row.seeds, [place] * len(row.seeds), "o", markersize=2.4, color=PAPER, mec=INK, mew=0.5, zorder=5)
    axes.set_xlim(0, 1)
    _per_cent(axes, "accuracy in %")
    return drawn.figure


def dots(shown: Sequence[Bar]) -> Figure:
    """Draw accuracies as dots with one standard deviation, beside another figure as a tick."""
    drawn = _rows(shown)
    axes = drawn.axes
    for place, row in zip(drawn.at, shown, strict=True):
        axes.axhline(place, color=GRID, linewidth=0.6, zorder=0)
        if row.beside is not None:
            axes.plot([row.value.mean, row.beside], [place, place], color=row.colour, linewidth=2.4, alpha=0.3)
            axes.plot([row.beside], [place], "|", markersize=8, mew=1.2, color=FAINT)
        _whisker(axes, place, row.value)
        axes.plot([row.value.mean], [place], "o", markersize=5, color=row.colour, zorder=4, clip_on=False)
    axes.set_xlim(0, 1.02)
    _per_cent(axes, "accuracy in %")
    return drawn.figure


def forest(shown: Sequence[tuple[str, str, Difference]], label: str) -> Figure:
    """Draw paired differences with their intervals: (name, colour, difference)."""
    rows = [Row(name, points(one), colour) for name, colour, one in shown]
    drawn = _rows(rows)
    axes = drawn.axes
    axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    for place, row, (_, _, one) in zip(drawn.at, rows, shown, strict=True):
        if one.low is not None and one.high is not None:
            axes.plot([one.low, one.high], [place, place], color=row.colour, linewidth=2, solid_capstyle="butt")
        axes.plot([one.mean], [place], "o", markersize=5, color=row.colour, zorder=4, clip_on=False)
    ends = [end for _, _, one in shown for end in (one.low, one.high, one.mean, 0.0) if end is not None]
    room = 0.04 * max(max(ends) - min(ends), 0.01)
    axes.set_xlim(min(ends) - room, max(ends) + room)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.3g}" if abs(value) > 1e-9 else "0")
    axes.set_xlabel(label)
    return drawn.figure


def stacks(shown: Sequence[tuple[str, str, Mapping[str, Spread]]]) -> Figure:
    """Draw seconds by phase: (label, colour, phase -> seconds); the phases are tints of the method's colour."""
    known = list(dict.fromkeys(phase for _, _, own in shown for phase in own))
    phases = [phase for phase in TINTS if phase in known] + [phase for phase in known if phase not in TINTS]
    totals = [sum(one.mean for one in own.values()) for _, _, own in shown]
    rows = [Row(label, _seconds(total), colour) for (label, colour, _), total in zip(shown, totals, strict=True)]
    drawn = _rows(rows, above=LEGEND)
    axes = drawn.axes
    for place, total, (_, colour, own) in zip(drawn.at, totals, shown, strict=True):
        left = 0.0
        axes.barh(place, total, height=THICK, color=PAPER, linewidth=0)  # no grid shines through
        for phase in phases:
            width = own[phase].mean if phase in own else 0.0
            axes.barh(place, width, left=left, height=THICK, color=colour, alpha=_tint(phase), linewidth=0)
            left += width
    axes.set_xlim(0, max(totals) * 1.01 or 1)
    axes.set_xlabel("seconds of a run")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _legend(axes, phases)
    return drawn.figure


def _legend(axes: Axes, phases: Sequence[str]) -> None:
    """Write what the tints are, in the room above the first row."""
    words: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "top", "color": FAINT}
    for place, phase in enumerate(phases):
        at = place / max(len(phases), 4)
        axes.text(at, 0, "\N{BLACK SQUARE}", **(words | {"color": INK}), alpha=_tint(phase))
        axes.text(at + 0.04, 0, phase, **words)


def _tint(phase: str) -> float:
    return TINTS.get(phase, TINTS["fuse"])


def _seconds(total: float) -> str:
    return f"{total:,.1f} s" if total < 100 else f"{total:,.0f} s"


def cells(shown: Sequence[tuple[str, Sequence[Spread | None]]], class_names: Sequence[str]) -> Figure:
    """Draw accuracies by class: a row of cells for each method, written into them where there are few."""
    classes = len(class_names)
    known = [one.mean for _, own in shown for one in own if one is not None]
    norm = Normalize(min(np.floor(10 * min(known)) / 10, 0.9), 1.0)
    rows = [Row(label, _worst(own, class_names), INK) for label, own in shown]
    drawn = _rows(rows, thick=CELL)
    axes = drawn.axes
    for place, (_, own) in zip(drawn.at, shown, strict=True):
        values = np.array([[np.nan if one is None else one.mean for one in own]])
        extent = (-0.5, classes - 0.5, place + CELL / 2, place - CELL / 2)
        axes.imshow(
            np.ma.masked_invalid(values), cmap=HEAT, norm=norm, extent=extent, aspect="auto", interpolation="nearest"
        )
        for at, one in enumerate(own if classes <= NUMBERED else ()):
            if one is not None:
                colour = "#ffffff" if norm(one.mean) > 0.6 else "#000000"
                axes.text(at, place, f"{100 * one.mean:.0f}", ha="center", va="center", color=colour, fontsize=FONT - 1)
    axes.set_xlim(-0.5, classes - 0.5)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    if classes <= 2 * NUMBERED:
        short = all(len(name) <= 3 for name in class_names)
        axes.set_xticks(range(classes), class_names, **({} if short else _slanted()))
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("class")
    if classes > NUMBERED:
        scale = drawn.figure.colorbar(axes.images[0], ax=axes, pad=0.02, format=PercentFormatter(1, symbol=""))
        scale.set_label("accuracy in %")
        scale.outline.set_visible(False)
    return drawn.figure


def _slanted() -> dict[str, Any]:
    return {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}


def _worst(own: Sequence[Spread | None], class_names: Sequence[str]) -> str:
    known = {name: one for name, one in zip(class_names, own, strict=False) if one is not None}
    worst = min(known, key=lambda name: known[name].mean)
    return f"lowest: class {worst}, {per_cent(known[worst])}"


# What all have


def _rows(shown: Sequence[Row], *, above: float = 0.0, thick: float = THICK) -> Rows:
    """Return axes in which every method has a row, its name and its numbers above the row's middle.

    Parameters
    ----------
    shown : sequence of Row
    above, thick : float
        Inches above the first row, and of what will be drawn in a row.
    """
    texts = [wrapped(row.label, max(LETTERS - len(row.said) - 2, 16), LINES).split("\n") for row in shown]
    line = FONT * 1.25 / 72
    at, bottom = list[float](), above
    for text in texts:
        at.append(bottom + len(text) * line + thick / 2 + 0.02)
        bottom = at[-1] + thick / 2 + GAP
    figure = Figure(figsize=(COLUMN, bottom + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_ylim(bottom, 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "bottom"}
    style["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}  # no grid shines through
    for middle, row, text in zip(at, shown, texts, strict=True):
        top = middle - thick / 2 - 0.02
        for up, words in enumerate(reversed(text)):
            axes.text(0, top - up * line, words, color=INK, **style)
        if row.said:
            axes.text(1, top, row.said, ha="right", color=FAINT, **style)
    return Rows(figure, axes, at)


def _whisker(axes: Axes, place: float, value: Spread) -> None:
    if value.std:
        ends = [value.mean - value.std, value.mean + value.std]
        axes.plot(ends, [place, place], color=INK, linewidth=0.9, solid_capstyle="butt", zorder=4, clip_on=False)


def _per_cent(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axes.set_xlabel(label)
