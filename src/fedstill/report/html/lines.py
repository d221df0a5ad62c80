"""Figures of lines with bands over the seeds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedstill.report.curves import MARKERS, End, label_ends
from fedstill.report.html.content import Gain, Points
from fedstill.report.html.style import COLUMN, FAINT, FONT, GRID, INK, PAGE, SERIES, Palette
from fedstill.studies.statistics import Spread

DRAWN, SMALL = 160, 50
"""Points of a line, and of one in a small panel; of more rounds evenly spaced ones are drawn, with both ends."""
MARKED = 12  # points; lines of more have no markers
POINTS = 72  # in an inch
TITLE = 28  # letters above a panel
ABOUT = 1.05
"""Costs of which the higher is at most this many times the lower are no difference."""
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Parameters
    ----------
    label : str
        As shown.
    key : str
        What its colour goes by.
    x : list of float
    y : list of Spread
    base : str or None
        Label of the line that it is compared with.
    """

    label: str
    key: str
    x: list[float]
    y: list[Spread]
    base: str | None = None

    @staticmethod
    def of(label: str, key: str, x: Sequence[float], y: Sequence[Spread], base: str | None = None) -> Line:
        """Return a line with few enough points."""
        return Line(label, key, list(x), list(y), base).thinned(DRAWN)

    def thinned(self, most: int) -> Line:
        """Return the line with at most so many points."""
        places = thinned(len(self.x), most)
        return replace(self, x=[self.x[at] for at in places], y=[self.y[at] for at in places])

    def without_band(self) -> Line:
        """Return the line of the means alone."""
        return replace(self, y=[Spread(mean, None, 1) for mean in self.means])

    @property
    def means(self) -> list[float]:
        """The middle of the band."""
        return [one.mean for one in self.y]

    @property
    def low(self) -> list[float]:
        """The band's lower edge: one standard deviation below."""
        return [one.mean - (one.std or 0.0) for one in self.y]

    @property
    def high(self) -> list[float]:
        """The band's upper edge."""
        return [one.mean + (one.std or 0.0) for one in self.y]


@dataclass(frozen=True)
class Axis:
    """What an axis says, and whether its numbers are parts of 1 or whole."""

    label: str
    per_cent: bool = False
    whole: bool = False
    begins_at_zero: bool = False


def thinned(count: int, most: int) -> list[int]:
    """Return which of so many points are drawn."""
    if count <= most:
        return list(range(count))
    return sorted({round(at * (count - 1) / (most - 1)) for at in range(most)})


def lines(shown: Sequence[Line], palette: Palette, x: Axis, y: Axis, *, wide: bool = False) -> Figure:
    """Draw lines labelled at their ends; where colours do not tell them apart, one panel for each.

    Parameters
    ----------
    shown : sequence of Line
    palette : Palette
    x, y : Axis
    wide : bool
        Two columns of a paper wide; else one.
    """
    return _one_panel(shown, palette, x, y, wide) if palette.tells else _panels(shown, x, y, wide)


def _one_panel(shown: Sequence[Line], palette: Palette, x: Axis, y: Axis, wide: bool) -> Figure:
    letters = 34 if wide else 16
    width, height = (PAGE, 3.3) if wide else (COLUMN, 2.5)
    texts = [f"{_number(line.means[-1], y)}  {wrapped(line.label, letters)}" for line in shown]
    tallest = max(text.count("\n") + 1 for text in texts)
    height = max(height, 0.7 + (tallest * FONT * 1.25 + 2) * len(shown) / POINTS)
    figure, axes = _figure(width, height)
    _ranges(axes, shown, x, y)
    for place, line in enumerate(shown):
        _draw(axes, line, palette[line.key], MARKERS[place % len(MARKERS)])
    if len({line.x[-1] for line in shown}) > 1:  # a thread from each end to its label
        for line in shown:
            ends = [line.x[-1], axes.get_xlim()[1]]
            axes.plot(ends, [line.means[-1]] * 2, color=palette[line.key], linewidth=0.5, linestyle=(0, (1, 2)))
    figure.set_layout_engine("constrained", rect=(0, 0, 0.97, 1))  # the page's letters may be wider
    gap = (tallest * FONT * 1.25 + 1.5) / ((height - 0.55) * POINTS)
    ends_of = [
        End(line.means[-1], text, palette[line.key], MARKERS[place % len(MARKERS)])
        for place, (line, text) in enumerate(zip(shown, texts, strict=True))
    ]
    label_ends(axes, ends_of, gap, INK, None, 0.012 if wide else 0.04)
    return figure


def best_for(shown: Sequence[Line]) -> list[tuple[Line, float, float]]:
    """Return the points (line, x, mean) above all that any line has for so much: a lower x, or about the same."""
    points = sorted(
        ((line, *at) for line in shown for at in zip(line.x, line.means, strict=True)), key=lambda at: at[1]
    )
    found: list[tuple[Line, float, float]] = []
    for point in points:
        rivals = [mean for _, x, mean in points if x <= ABOUT * point[1]]
        if point[2] == max(rivals) and (not found or point[2] > found[-1][2]):
            found.append(point)
    return found


def frontier(shown: Sequence[Line], x: Axis, y: Axis) -> Figure:
    """Draw many lines of costs in one panel, and in steps the best for each cost, labelled."""
    points = best_for(shown)
    leaders = list({line.label: line for line, _, _ in points}.values())
    last = {line.label: mean for line, _, mean in points}
    texts = [f"{_number(last[line.label], y)}  {wrapped(line.label, 16)}" for line in leaders]
    tallest = max(text.count("\n") + 1 for text in texts)
    height = max(2.5, 0.7 + (tallest * FONT * 1.25 + 2) * len(leaders) / POINTS)
    figure, axes = _figure(COLUMN, height)
    _ranges(axes, [line.without_band() for line in shown], x, y)
    for line in shown:
        axes.plot(line.x, line.means, color=GRID, linewidth=0.7, zorder=1)
    axes.step([at for _, at, _ in points], [mean for *_, mean in points], where="post", color=FAINT, linewidth=0.9)
    ends, apart = [], [*SERIES[::2], *SERIES[1::2]]  # the dark ones first
    for place, (line, text) in enumerate(zip(leaders, texts, strict=True)):
        own = [(at, mean) for other, at, mean in points if other is line]
        end = End(last[line.label], text, apart[place % len(apart)], MARKERS[place % len(MARKERS)])
        axes.plot(*zip(*own, strict=True), end.marker, color=end.colour, markersize=3.6, clip_on=False, zorder=4)
        ends.append(end)
    figure.set_layout_engine("constrained", rect=(0, 0, 0.97, 1))  # the page's letters may be wider
    label_ends(axes, ends, (tallest * FONT * 1.25 + 1.5) / ((height - 0.55) * POINTS), INK, None, 0.04)
    return figure


def _panels(shown: Sequence[Line], x: Axis, y: Axis, wide: bool) -> Figure:
    """Draw a panel for each line: over the grey range of all, beside its base."""
    marks = [_mark(line.x) for line in shown]
    shown = [line.thinned(SMALL) for line in shown]
    titles = [_titled(_number(line.means[-1], y), line.label) for line in shown]
    panels = _Panels.of(titles, columns=4 if wide else 2, wide=wide, each=1.05, around=0.35)
    for line, mark, axes in zip(shown, marks, panels.axes, strict=True):
        if axes is panels.axes[0]:
            _ranges(axes, shown, x, Axis("", y.per_cent, y.whole, y.begins_at_zero))
        axes.fill_between(*_envelope(shown), color=GRID, alpha=0.6, linewidth=0, zorder=1)
        for base in (other for other in shown if other.label == line.base):
            axes.plot(base.x, base.means, color=FAINT, linewidth=0.9, linestyle=(0, (3, 1.5)), zorder=2)
        _draw(axes, line, SERIES[0], mark)
    return panels.finished(x.label, y.label)


def by_client(shown: Mapping[str, Sequence[Line]], palette: Palette, y: Axis, *, wide: bool = False) -> Figure:
    """Draw a panel for each client, with a line for each method; one that was measured once is dashed across it.

    Parameters
    ----------
    shown : mapping
        Title of the panel -> its lines.
    palette : Palette
        Which tells the methods apart.
    y : Axis
    wide : bool
        Two columns of a paper wide; else one.
    """
    known = {line.label: line for own in shown.values() for line in own}
    markers = {name: MARKERS[place % len(MARKERS)] for place, name in enumerate(known)}
    titles, names = [wrapped(title, 22) for title in shown], [wrapped(name, 50) for name in known]
    legend = sum(name.count("\n") + 1 for name in names) * FONT * 1.25 / POINTS
    columns = min(len(shown), 5 if wide else 2)
    panels = _Panels.of(titles, columns=columns, wide=wide, each=0.95, around=0.45 + legend)
    _ranges(panels.axes[0], [line for own in shown.values() for line in own], Axis("", whole=True), y)
    for own, axes in zip(shown.values(), panels.axes, strict=True):
        for line in own:
            _draw_or_dash(axes, line.thinned(SMALL), palette[line.key], markers[line.label])
    figure = panels.finished("round", y.label)
    handles = [Line2D([], [], color=palette[line.key], **_style(line, markers[name])) for name, line in known.items()]
    figure.legend(handles, names, loc="outside upper left", frameon=False, fontsize=FONT - 0.5, labelcolor=INK)
    return figure


def _draw_or_dash(axes: Axes, line: Line, colour: str, marker: str) -> None:
    if len(line.x) > 1:
        _draw(axes, line, colour, marker)
        return
    if line.low < line.high:
        axes.axhspan(line.low[0], line.high[0], color=colour, alpha=0.16, linewidth=0, zorder=1)
    axes.axhline(line.means[0], color=colour, **_style(line, marker), zorder=2)


def _style(line: Line, marker: str) -> dict[str, Any]:
    if len(line.x) > 1:
        return {"linewidth": 1.3, "marker": marker, "markersize": 2.6}
    return {"linewidth": 1.1, "linestyle": (0, (4, 2))}


def _envelope(shown: Sequence[Line]) -> tuple[Numbers, Numbers, Numbers]:
    """Return x, and the lowest and highest mean of the lines that reach there."""
    x = np.unique(np.concatenate([line.x for line in shown]))  # all lines are straight between two of them
    if len(x) > SMALL:
        x = np.linspace(x[0], x[-1], SMALL)
    means = np.array([np.interp(x, line.x, line.means, left=np.nan, right=np.nan) for line in shown])
    known = ~np.isnan(means).all(axis=0)
    return x[known], np.nanmin(means[:, known], axis=0), np.nanmax(means[:, known], axis=0)


def gains(shown: Mapping[str, tuple[str, Gain]], palette: Palette, label: str, *, wide: bool = False) -> Figure:
    """Draw by round what each method gained, under what its ensembles would have allowed.

    Parameters
    ----------
    shown : mapping
        Title of the panel -> (what the colour goes by, the gain).
    palette : Palette
    label : str
        Of the points.
    wide : bool
        Two columns of a paper wide; else one.
    """
    columns = min(len(shown), 4 if wide else 2)
    titles = [wrapped(title, 22 if columns > 1 else 50) for title in shown]
    panels = _Panels.of(titles, columns=columns, wide=wide, each=1.35 if columns > 1 else 1.85, around=0.4)
    for (key, one), axes in zip(shown.values(), panels.axes, strict=True):
        axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
        _draw(axes, _line_of(key, one.given, len(shown)), palette[key], _mark(list(one.given)))
        if one.room:
            room = _line_of(key, one.room, len(shown))
            axes.plot(room.x, room.means, color=FAINT, linestyle=(0, (3, 1.5)), linewidth=1, zorder=2)
            if len(room.x) <= MARKED:
                axes.plot(room.x, room.means, color=FAINT, linestyle="none", marker="_", markersize=5, zorder=2)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f}" if value else "0")
    return panels.finished("round", label)


def _line_of(key: str, points: Points, panels: int) -> Line:
    return Line("", key, list(points), list(points.values())).thinned(DRAWN if panels <= 4 else SMALL)


@dataclass(frozen=True)
class _Panels:
    """Axes for small multiples, which share their ranges: one for each title, row by row."""

    figure: Figure
    axes: list[Axes]
    columns: int

    @staticmethod
    def of(titles: Sequence[str], *, columns: int, wide: bool, each: float, around: float) -> _Panels:
        """Return empty panels; a row is ``each`` inches high and its titles, the rest of the figure ``around``."""
        rows = -(-len(titles) // columns)
        title = max(title.count("\n") + 1 for title in titles) * FONT * 1.25 / POINTS
        figure = Figure(figsize=(PAGE if wide else COLUMN, around + (each + title) * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
        for axes, text in zip(grid, titles, strict=False):
            _grid(axes)
            axes.set_title(text, fontsize=FONT - 0.5)
        for axes in grid[len(titles) :]:
            axes.set_visible(False)
        return _Panels(figure, grid[: len(titles)], columns)

    def finished(self, x: str, y: str) -> Figure:
        """Label the axes: x below the last panel of each column, y once."""
        for place, axes in enumerate(self.axes):
            axes.set(xlabel="", ylabel="")
            axes.label_outer()
            below = place + self.columns >= len(self.axes)
            axes.tick_params(axis="x", labelbottom=below, bottom=below)
        self.figure.supxlabel(x, fontsize=FONT, color=FAINT)
        self.figure.supylabel(y, fontsize=FONT, color=FAINT)
        return self.figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _grid(axes)
    return figure, axes


def _grid(axes: Axes) -> None:
    axes.grid(axis="y", clip_on=False)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _ranges(axes: Axes, shown: Sequence[Line], x: Axis, y: Axis) -> None:
    low, high = min(min(line.low) for line in shown), max(max(line.high) for line in shown)
    room = 0.05 * max(high - low, 1e-3 if not y.per_cent else 0.02)
    bottom, top = low - room, high + room
    if y.per_cent:
        bottom, top = max(bottom, 0.0), min(top, 1.0)
    axes.set_ylim(bottom, top)
    first, last = min(line.x[0] for line in shown), max(line.x[-1] for line in shown)
    if x.begins_at_zero:
        first = 0.0
    side = 0.02 * (last - first) or 0.5
    axes.set_xlim(first - side, last + (0 if x.whole and last > first else side))
    axes.set_xlabel(x.label)
    axes.set_ylabel(y.label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=x.whole, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if y.per_cent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.6g}")


def _draw(axes: Axes, line: Line, colour: str, marker: str) -> None:
    if any(one.std for one in line.y):
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.16, linewidth=0, zorder=2)
    style: dict[str, Any] = {"marker": marker, "markersize": 2.6} if len(line.x) <= MARKED else {}
    axes.plot(line.x, line.means, color=colour, linewidth=1.3, clip_on=False, zorder=3, **style)


def _mark(x: Sequence[float]) -> str:
    """Return what marks the points of a line that has its panel for itself: nothing where every round has one."""
    return "" if len(x) > 1 and all(after - before == 1 for before, after in pairwise(x)) else "o"


def _titled(number: str, label: str) -> str:
    """Return a panel's title, wrapped so that its first line has room for the number."""
    return f"{number}  {wrapped(label, TITLE - len(number) - 2)}"


def _number(value: float, y: Axis) -> str:
    return f"{100 * value:.1f}" if y.per_cent else f"{value:.3g}"


def wrapped(text: str, letters: int, most: int = 3) -> str:
    """Return a text in at most so many lines of so many letters, broken after spaces, and in words where it must."""
    if len(text) <= letters:
        return text
    parts = textwrap.wrap(text, letters, break_long_words=False, break_on_hyphens=False)
    found = [piece for part in parts for piece in _pieces(part, letters)]
    return "\n".join(found if len(found) <= most else [*found[: most - 1], f"{found[most - 1][: letters - 1]}…"])


def _pieces(word: str, letters: int) -> list[str]:
    """Return a word in pieces, cut after one of ``+.=/_`` where it can be."""
    pieces = []
    while len(word) > letters:
        at = max(word.rfind(sign, 0, letters) for sign in "+.=/_ ") + 1
        pieces.append(word[: at or letters].rstrip())
        word = word[at or letters :]
    return [*pieces, word]
