"""Figures that are grids of images."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedstill.report.html.style import COLUMN, FAINT
from fedstill.report.samples import ClassSamples, Images


def samples(found: ClassSamples) -> Figure:
    """Draw a generator's samples, a row for each class, and real ones beside them."""
    parts = {"generator": found.made} | ({"real": found.real} if found.real is not None else {})
    widths = [part.shape[1] for part in parts.values()]
    height = COLUMN * 0.82 * len(found.classes) / (sum(widths) + 0.5 * (len(widths) - 1))
    figure = Figure(figsize=(COLUMN, height + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(wspace=0.03, w_pad=0.01, h_pad=0.01)  # type: ignore[union-attr, call-arg]
    panels = figure.subplots(1, len(parts), width_ratios=widths, squeeze=False)[0]
    for place, (axes, (name, part)) in enumerate(zip(panels, parts.items(), strict=True)):
        axes.imshow(tiled(part), cmap="gray", vmin=0, vmax=1, interpolation="none", extent=(0, widths[place], 0, 1))
        axes.set_aspect("auto")
        axes.set_title(name, color=FAINT)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        rows = len(found.classes)
        axes.set_yticks(
            [1 - (row + 0.5) / rows for row in range(rows)], found.class_names if not place else [""] * rows
        )
        axes.tick_params(length=0)
    return figure


def tiled(images: Images) -> Images:
    """Return one image of all (classes, columns, H, W, C): classes downwards, a pixel that shows nothing between."""
    padded = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=np.nan)
    classes, columns, height, width, channels = padded.shape
    sheet: Images = padded.transpose(0, 2, 1, 3, 4).reshape(classes * height, columns * width, channels)
    if channels == 1:
        return np.ma.masked_invalid(sheet[..., 0])
    return np.concatenate([np.nan_to_num(sheet), ~np.isnan(sheet[..., :1])], axis=-1)
