"""From runs to the report's files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fedstill import __version__
from fedstill.errors import InputError, RunError
from fedstill.report.html.content import gathered
from fedstill.report.html.page import Figures, page
from fedstill.report.html.sections import lead, sections
from fedstill.report.html.style import in_style
from fedstill.runs.environment import commit
from fedstill.runs.files import write_atomically
from fedstill.studies.results import INDEX

PAGE = "index.html"


def write_report(
    paths: Path | str | Sequence[Path | str],
    out: Path | str | None = None,
    *,
    title: str | None = None,
    on: str = "test",
    baseline: str | None = None,
    anyway: bool = False,
) -> Path:
    """Write a report and return the page's path; an older report there is replaced.

    Parameters
    ----------
    paths : path or sequence of path
        Run directories, or one study: its results folder or its file.
    out : path, optional
        Folder of the report; by default ``report`` in the study's results, in the run, or beside several runs.
    title : str, optional
        By default the study's.
    on, baseline, anyway
        As :func:`fedstill.studies.compare.compare` has them.

    Raises
    ------
    InputError
        If there is nothing to report, or it cannot be written.
    """
    places = [Path(path) for path in ([paths] if isinstance(paths, Path | str) else paths)]
    content = gathered(places, title=title, on=on, baseline=baseline, anyway=anyway)
    folder = Path(out) if out is not None else _beside(places, [run.path for run in content.runs])
    figures = Figures()
    with in_style():
        parts = sections(content, figures)
    made_by = f"fedstill {__version__}{f' ({found})' if (found := commit()) else ''}"
    foot = f"Made by {escape(made_by)}. Every figure is in the folder <i>figures</i> beside this page, as SVG and PDF."
    html = page(content.title, lead(content), parts, foot)
    try:
        for name in _named_before(folder) - set(figures.drawn):
            for suffix in ("svg", "pdf"):
                (folder / "figures" / f"{name}.{suffix}").unlink(missing_ok=True)
        for name, drawing in figures.drawn.items():
            write_atomically(folder / "figures" / f"{name}.svg", drawing.svg)
            write_atomically(folder / "figures" / f"{name}.pdf", drawing.pdf)
        write_atomically(folder / PAGE, html.encode())
    except (RunError, OSError) as error:
        raise InputError(f"{folder}: the report cannot be written ({error.__cause__ or error})") from error
    return folder / PAGE


def _named_before(folder: Path) -> set[str]:
    """Return the figures of an older report, which may have some that this one has not."""
    page = folder / PAGE
    found = re.findall(r'<figure id="([\w.-]+)"', page.read_text(errors="replace")) if page.is_file() else []
    return {name for one in found for name in (one, f"{one}-column")}


def _beside(places: Sequence[Path], runs: Sequence[Path]) -> Path:
    """Return where a report goes by default."""
    if len(places) == 1 and places[0].is_dir():
        return places[0] / "report"
    common = Path(os.path.commonpath([path.resolve().parent for path in runs]))
    if len(places) == 1:  # a study's file: its results
        common = next((folder for folder in (common, *common.parents) if (folder / INDEX).exists()), common)
    return common / "report"
