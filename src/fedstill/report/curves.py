"""The picture of a comparison: accuracy against rounds, and the bounds it lies between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import blended_transform_factory

from fedstill.report.table import Bound, Curve, ends
from fedstill.runs.files import disk_errors

SIZE = (8.4, 4.8)  # inches
HUES = (("#0072B2", "#56B4E9"), ("#B03A00", "#E69F00"), ("#00674F", "#00B287"), ("#8F3D74", "#CC79A7"))
"""A base's colour and its variants', after Okabe and Ito: told apart by colour-blind readers."""
SHADES = (0, 1, 1, 0, 1)
DASHES = ("-", (0, (1, 1.2)), (0, (4, 1.6)), "-", (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "v", "s", "D", "^")
"""By variant: the same for variants of one name on two bases."""
GAP = 0.048  # between two labels, as a part of the axes' height
HALO = withStroke(linewidth=2.5, foreground="white")
DOWN = "\N{DOWNWARDS ARROW}"


@dataclass(frozen=True)
class Style:
    """How a curve is drawn."""

    colour: str
    dashes: Any
    marker: str
    width: float


def draw_curves(curves: Sequence[Curve], bounds: Sequence[Bound], path: Path, title: str) -> None:
    """Draw a line per run, labelled at its end, and a grey line per bound.

    A base and its variants have related colours; a variant has the same dashes and marker on every base. A floor
    far below the runs is named at the lower edge, so that the runs keep the room.

    Parameters
    ----------
    curves, bounds : sequence
        What is compared.
    path : Path
        A PNG file.
    title : str
        Written above.
    """
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    first, last = ends(curves)
    low, high = _range(curves, bounds)
    axes.set_ylim(low, high)
    axes.set_xlim(first - 0.06 * max(last - first, 1), last)
    for bound in bounds:
        _draw_bound(axes, bound, low, last)
    styled = list(zip(curves, styles(curves), strict=True))
    for curve, style in styled:
        axes.plot(
            list(curve.accuracies),
            list(curve.accuracies.values()),
            color=style.colour,
            linestyle=style.dashes,
            linewidth=style.width,
            marker=style.marker,
            markersize=5,
            clip_on=False,
            zorder=3,
        )
    ends_of = [
        End(curve.last, f"{curve.last:.1%}  {curve.name}", style.colour, style.marker) for curve, style in styled
    ]
    label_ends(axes, ends_of, GAP)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)
    with disk_errors(path):
        figure.savefig(path, dpi=160)


def _range(curves: Sequence[Curve], bounds: Sequence[Bound]) -> tuple[float, float]:
    """Return a range that the runs and the ceilings fill."""
    shown = [accuracy for curve in curves for accuracy in curve.accuracies.values()]
    shown += [bound.last for bound in bounds if bound.kind == "ceiling"]
    room = 0.06 * max(max(shown) - min(shown), 0.05)
    return max(min(shown) - 2 * room, 0.0), min(max(shown) + room, 1.0)


def styles(curves: Sequence[Curve]) -> list[Style]:
    """Return a style for each curve: the colours by its base, dashes and marker by what was changed in it."""
    families = list(dict.fromkeys(curve.base or curve.name for curve in curves))
    changes = [curve.name.removeprefix(curve.base) if curve.base else "" for curve in curves]
    kinds = list(dict.fromkeys(["", *changes]))
    found = []
    for curve, change in zip(curves, changes, strict=True):
        kind = kinds.index(change) % len(MARKERS)
        hue = HUES[families.index(curve.base or curve.name) % len(HUES)]
        found.append(Style(hue[SHADES[kind]], DASHES[kind], MARKERS[kind], 2.2 if kind else 1.5))
    return found


def _draw_bound(axes: Axes, bound: Bound, low: float, last: int) -> None:
    known = list(bound.accuracies)
    when = f" of round {known[0]}" if known != [last] and len(known) == 1 else ""
    name = f"{bound.kind}: {bound.name}{when}, {bound.last:.1%}"
    style: dict[str, Any] = {"color": "0.35", "fontsize": 8, "zorder": 4, "path_effects": [HALO]}
    if bound.last < low:
        axes.text(0.99, 0.015, f"{name} {DOWN}", transform=axes.transAxes, ha="right", **style)
        return
    axes.axhline(bound.last, color="0.6", linewidth=1, zorder=1)
    across = blended_transform_factory(axes.transAxes, axes.transData)
    axes.text(0.008, bound.last, name, transform=across, va="bottom", **style)


@dataclass(frozen=True)
class End:
    """What stands beside the end of a curve: its last value, the words, the curve's colour and marker."""

    value: float
    text: str
    colour: str
    marker: str = "o"


def label_ends(
    axes: Axes, ends: Sequence[End], gap: float, colour: str = "0.15", size: float | None = 9, step: float = 0.015
) -> None:
    """Write words beside the ends of curves, right of the axes; moved apart where ends are close.

    Parameters
    ----------
    axes : Axes
        Its range of values stays as it is.
    ends : sequence of End
    gap : float
        Between two of them, as a part of the axes' height.
    colour, size
        Of the letters; None for the size of the style.
    step : float
        Between a marker and its words, as a part of the axes' width.
    """
    low, high = axes.get_ylim()
    order = sorted(ends, key=lambda end: end.value)
    wanted = [(end.value - low) / (high - low) for end in order]
    outside: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    for end, at, height in zip(order, wanted, spread(wanted, gap), strict=True):
        axes.plot([1 + 0.7 * step, 1 + 3 * step], [at, height], color=end.colour, linewidth=0.7, **outside)
        axes.plot([1 + 4 * step], [height], color=end.colour, marker=end.marker, markersize=5, **outside)
        axes.text(1 + 5 * step, height, end.text, color=colour, fontsize=size, va="center", transform=axes.transAxes)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending heights moved apart: those closer than ``gap`` share a centred stack, below 1."""
    stacks: list[list[float]] = []
    for height in heights:
        stacks.append([height])
        while len(stacks) > 1 and _bottom(stacks[-1], gap) < _bottom(stacks[-2], gap) + gap * len(stacks[-2]):
            above = stacks.pop()
            stacks[-1] += above
    return [_bottom(stack, gap) + gap * place for stack in stacks for place in range(len(stack))]


def _bottom(stack: Sequence[float], gap: float) -> float:
    height = gap * (len(stack) - 1)
    return min(sum(stack) / len(stack) - height / 2, 1 - height)
