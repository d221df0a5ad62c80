"""How figures look, and how one becomes SVG for the page, and SVG and PDF for a paper.

Figures are drawn in the colours of a light page. On the page each colour is a CSS variable, so that the same drawing is
read on a dark one; the variables are in ``page.css``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from itertools import chain
from typing import Any

import matplotlib
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from fedstill.report.curves import HUES

COLUMN, PAGE = 3.5, 7.2
"""Widths in inches: one column and two columns of most proceedings."""
DOTS = 200
"""Of images in figures, per inch."""
FONT = 7.5
"""Letters in points, at these widths."""

INK, FAINT, GRID, PAPER = "#1f2328", "#59636e", "#d0d7de", "#fefefe"
SERIES = tuple(chain.from_iterable(HUES))
"""Eight colours, dark and light of four hues."""
FINE = re.compile(r"(?<![\w.])-?\d+\.\d{3,}(?![\w.])")
_VARIABLES = {
    INK: "--ink",
    FAINT: "--faint",
    GRID: "--grid",
    PAPER: "--paper",
    **{colour.lower(): f"--series-{place}" for place, colour in enumerate(SERIES)},
}

STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"],
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "xtick.labelsize": FONT - 0.5,
    "ytick.labelsize": FONT - 0.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": GRID,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "round",
    "text.parse_math": False,  # a name may hold dollars
    "svg.fonttype": "none",
    "svg.hashsalt": "fedstill",
    "pdf.fonttype": 42,
}


@contextmanager
def in_style() -> Iterator[None]:
    """Draw and save figures in the page's style."""
    with matplotlib.rc_context(STYLE):
        yield


@dataclass(frozen=True)
class Palette:
    """The colour of each method, the same in all figures.

    Parameters
    ----------
    colours : mapping
        Key -> colour; empty where there are more methods than colours.
    """

    colours: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(families: Sequence[tuple[str, str]]) -> Palette:
        """Return a colour for each key: where they suffice, a family has one hue.

        Parameters
        ----------
        families : sequence of (str, str)
            Key, and what its family goes by.
        """
        if len(families) > len(SERIES):
            return Palette()
        members: dict[str, list[str]] = {}
        for key, family in families:
            members.setdefault(family, []).append(key)
        if len(members) <= len(HUES) and all(len(keys) <= len(HUES[0]) for keys in members.values()):
            pairs = zip(members.values(), HUES)
            return Palette({key: hue[place] for keys, hue in pairs for place, key in enumerate(keys)})
        spaced = [*SERIES[::2], *SERIES[1::2]]  # the four dark ones first: they differ most
        return Palette({key: spaced[place] for place, (key, _) in enumerate(families)})

    @property
    def tells(self) -> bool:
        """Whether colours tell methods apart."""
        return bool(self.colours)

    def __getitem__(self, key: str) -> str:
        return self.colours.get(key, SERIES[0])

    def css(self, key: str) -> str:
        """Return a method's colour on the page; empty where colours tell nothing."""
        return f"var({_VARIABLES[self[key].lower()]})" if self.tells else ""


@dataclass(frozen=True)
class Drawing:
    """A figure in its three forms."""

    inline: str
    svg: bytes
    pdf: bytes


def drawing(figure: Figure, name: str, alt: str) -> Drawing:
    """Return a figure's forms.

    Parameters
    ----------
    figure : Figure
    name : str
        Unique on the page.
    alt : str
        What it shows, for those who cannot see it.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for each form
    svg, pdf = BytesIO(), BytesIO()
    figure.dpi = DOTS
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": "fedstill", "Title": alt})  # type: ignore[no-untyped-call]
    figure.dpi = DOTS
    FigureCanvasPdf(figure).print_pdf(pdf, metadata={"CreationDate": None, "Title": alt})  # type: ignore[no-untyped-call]
    text = svg.getvalue().decode()
    return Drawing(inline(rounded(text, 1), name, alt), rounded(text, 2).encode(), pdf.getvalue())


def rounded(svg: str, digits: int) -> str:
    """Return a drawing with positions in tenths or hundredths of a point, and its lines as short steps."""

    def tag(found: re.Match[str]) -> str:
        text = FINE.sub(lambda number: _number(float(number[0]), 2), found[0])
        text = re.sub(r'(?<= [xy]=")[-.\d]+(?=")', lambda number: _number(float(number[0]), digits), text)
        return re.sub(r'(?<= d=")M[^"]*', lambda path: _steps(path[0], digits), text)

    return re.sub(r"<[^>]+>", tag, svg)


def _steps(path: str, digits: int) -> str:
    """Return a path of straight lines by its steps; another one as it is."""
    parts = re.findall(r"[MLz]|-?[\d.]+|\S", path)
    if any(part.isalpha() and part not in "MLz" for part in parts):
        return " ".join(path.split())
    made, at, command = "", (0.0, 0.0), ""
    values: list[float] = []
    for part in parts:
        if part.isalpha():
            command = part
            made += "z" if part == "z" else ""
            continue
        values.append(float(part))
        if len(values) < 2:
            continue
        x, y = values
        values = []
        at = (0.0, 0.0) if command == "M" else at
        step = _number(x - at[0], digits), _number(y - at[1], digits)
        made += f"{'M' if command == 'M' else 'l'}{step[0]} {step[1]}".replace(" -", "-")
        at = at[0] + float(step[0]), at[1] + float(step[1])  # where the rounded steps have led, so that none adds up
    return made


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}".rstrip("0").rstrip(".").replace("-0.", "-.")
    return "0" if text in ("0", "-0") else text.removeprefix("0")


def inline(svg: str, name: str, alt: str) -> str:
    """Return a drawing for the page: nothing but the ``svg`` element, its ids unique, its colours variables."""
    body = svg[svg.index("<svg ") :]
    body = re.sub(r"<metadata>.*?</metadata>|<(title|style).*?</\1>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', lambda found: _opening(found[1], alt), body, count=1)
    body = re.sub(r" font-family: [^;\"]*;?| transform=\"rotate\(-0 [^)]*\)\"", "", body)
    used = set(re.findall(r'(?:href="|url\()#([^")]*)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace("xlink:href", "href")
    body = re.sub(r"#[0-9a-f]{6}\b(?=[;\"])", lambda found: _variable(found[0]), body)
    body = re.sub(r' style="[^"]*"', lambda found: found[0].replace(": ", ":").replace("; ", ";"), body)
    return re.sub(r">\s+<", "><", body).strip()


def _opening(box: str, alt: str) -> str:
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(alt)}">'


def _variable(colour: str) -> str:
    return f"var({_VARIABLES[colour]})" if colour in _VARIABLES else colour
