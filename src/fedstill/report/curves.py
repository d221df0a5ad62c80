"""The picture of a comparison: accuracy against rounds, and the bounds it lies between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import blended_transform_factory

from fedstill.report.table import Bound, Curve, ends
from fedstill.runs.files import disk_errors

SIZE = (8.4, 4.8)  # inches
HUES = (("#0072B2", "#56B4E9"), ("#B03A00", "#E69F00"), ("#00674F", "#00B287"), ("#8F3D74", "#CC79A7"))
"""A base's colour and its variants', after Okabe and Ito: told apart by colour-blind readers."""
DASHES = ("-", (0, (1, 1.2)), (0, (4, 1.6)), "-", (0, (5, 1.5, 1, 1.5)))
MARKERS = ("o", "v", "s", "D", "^")
"""By variant: the same for the variants of the same name of two bases."""
GAP = 0.048  # between two labels, as a part of the axes' height


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
    kinds = _kinds(curves)
    families = [curve.name for curve in curves if curve.base is None]
    for bound in bounds:
        _draw_bound(axes, bound, low)
    ended = []
    for curve in curves:
        kind = kinds[_variant(curve)] % len(MARKERS)
        hue = HUES[families.index(curve.base or curve.name) % len(HUES)]
        colour = hue[0] if kind in (0, 3) else hue[1]
        axes.plot(
            list(curve.accuracies),
            list(curve.accuracies.values()),
            color=colour,
            linestyle=DASHES[kind],
            marker=MARKERS[kind],
            markersize=5,
            linewidth=2.2 if kind else 1.6,
            clip_on=False,
            zorder=3,
        )
        ended.append((curve, colour))
    _label_ends(axes, ended, low, high)
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


def _variant(curve: Curve) -> str:
    return curve.name.removeprefix(curve.base) if curve.base else ""


def _kinds(curves: Sequence[Curve]) -> dict[str, int]:
    variants = dict.fromkeys(["", *(_variant(curve) for curve in curves)])
    return {variant: number for number, variant in enumerate(variants)}


def _draw_bound(axes: Axes, bound: Bound, low: float) -> None:
    across = blended_transform_factory(axes.transAxes, axes.transData)
    name = f"{bound.kind}: {bound.name}, {bound.last:.1%}"
    if bound.last < low:
        axes.text(
            0.99, 0.015, f"{name} \N{DOWNWARDS ARROW}", transform=axes.transAxes, color="0.35", fontsize=8, ha="right"
        )
        return
    axes.axhline(bound.last, color="0.6", linewidth=1, linestyle="-", zorder=1)
    axes.text(0.008, bound.last, name, transform=across, color="0.35", fontsize=8, va="bottom")


def _label_ends(axes: Axes, ended: Sequence[tuple[Curve, str]], low: float, high: float) -> None:
    """Write every curve's name and last accuracy beside its end, moved apart where ends are close."""
    order = sorted(ended, key=lambda pair: pair[0].last)
    wanted = [(curve.last - low) / (high - low) for curve, _ in order]
    for (curve, colour), height in zip(order, spread(wanted, GAP), strict=True):
        axes.annotate(
            f"{curve.last:.1%}  {curve.name}",
            xy=(1.0, (curve.last - low) / (high - low)),
            xytext=(1.05, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 5},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending heights moved as little as needed to be ``gap`` apart: close ones share a centred stack."""
    stacks: list[list[float]] = []
    for height in heights:
        stacks.append([height])
        while len(stacks) > 1 and _top(stacks[-2], gap) + gap > _bottom(stacks[-1], gap):
            above = stacks.pop()
            stacks[-1] += above
    return [_bottom(stack, gap) + gap * place for stack in stacks for place in range(len(stack))]


def _bottom(stack: Sequence[float], gap: float) -> float:
    return sum(stack) / len(stack) - gap * (len(stack) - 1) / 2


def _top(stack: Sequence[float], gap: float) -> float:
    return sum(stack) / len(stack) + gap * (len(stack) - 1) / 2
