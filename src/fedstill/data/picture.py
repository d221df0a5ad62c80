"""The picture of a partition: who holds how much of what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedstill.data.dataset import IntArray
from fedstill.errors import InputError

WIDTH = 7.2  # inches: two columns of most proceedings
NUMBERED_CLIENTS = 20
NAMED_CLASSES = 20


def draw_partition(counts: IntArray, class_names: Sequence[str], path: Path, title: str) -> None:
    """Draw the clients' samples: a heat map of clients by classes under the clients' sizes.

    Empty cells are white; the colour goes by the square root of the count. Up to 20 clients have
    their counts written into the cells.

    Parameters
    ----------
    counts : int64 array, (clients, classes)
        Samples of each class at each client.
    class_names : sequence of str
        One name per class; more than 20 classes are numbered.
    path : Path
        A ``.png`` or ``.svg`` file; its folder must exist.
    title : str
        Written above.

    Raises
    ------
    InputError
        For another suffix.
    """
    if path.suffix.lower() not in {".png", ".svg"}:
        raise InputError(f"{path}: the picture is a .png or .svg file")
    partition_figure(counts, class_names, title).savefig(path, dpi=200)


def partition_figure(counts: IntArray, class_names: Sequence[str], title: str = "", width: float = WIDTH) -> Figure:
    """Return the picture that :func:`draw_partition` writes, ``width`` inches wide, in the letters' size of the style.

    Parameters
    ----------
    counts, class_names, title
        As there.
    width : float
    """
    clients, classes = counts.shape
    named = classes <= NAMED_CLASSES
    numbered = int(NUMBERED_CLIENTS * width / WIDTH * 10 / rcParams["font.size"])
    heights = [1, 0.3 * classes + 1 if named else 4]
    height = (1.9 + (0.24 * classes if named else 3.2)) * rcParams["font.size"] / 10
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    sizes_axes, map_axes = figure.subplots(2, 1, sharex=True, height_ratios=heights)

    sizes_axes.bar(np.arange(clients), counts.sum(axis=1), width=0.8 if clients <= 50 else 1, color="0.45")
    sizes_axes.set_ylabel("samples")
    sizes_axes.set_title(title, fontsize="medium")
    sizes_axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    sizes_axes.spines[["top", "right"]].set_visible(False)
    sizes_axes.tick_params(axis="x", labelbottom=False)

    # By the square root, so that a few clients with very much do not leave the others without colour.
    norm = PowerNorm(0.5, vmin=0, vmax=counts.max())
    # The lightest colours are left out, so that one sample is told from none.
    colours = ListedColormap(colormaps["YlGnBu"](np.linspace(0.15, 1, 256)))
    image = map_axes.imshow(
        np.ma.masked_equal(counts.T, 0), aspect="auto", interpolation="nearest", cmap=colours, norm=norm
    )
    map_axes.set_xlabel("client")
    map_axes.set_ylabel("class")
    map_axes.xaxis.set_major_locator(MaxNLocator(min(clients, numbered), integer=True))
    if named:
        map_axes.set_yticks(range(classes), class_names)
    else:
        map_axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
    if clients <= numbered and named:
        _write_counts(map_axes, counts, norm)
    figure.colorbar(image, ax=map_axes, label="samples of the class at the client", pad=0.01)
    return figure


def _write_counts(axes: Axes, counts: IntArray, norm: Normalize) -> None:
    size = (0.78 if counts.max() < 1000 else 0.66) * rcParams["font.size"]
    for client, row in enumerate(counts):
        for label, count in enumerate(row):
            if count:
                colour = "white" if norm(count) > 0.55 else "black"
                axes.text(client, label, str(count), ha="center", va="center", fontsize=size, color=colour)
