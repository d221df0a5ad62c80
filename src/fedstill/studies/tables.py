"""A comparison as tables: for a terminal, as Markdown, as LaTeX, as CSV."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal, get_args

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedstill.errors import InputError, RunError
from fedstill.markdown import grid
from fedstill.names import unknown
from fedstill.runs.files import write_atomically
from fedstill.studies.compare import (
    ACCURACIES,
    BESIDE,
    DIFFERENCES,
    ENSEMBLES,
    QUANTITIES,
    Comparison,
    ComparisonTable,
    Summary,
)
from fedstill.studies.costs import Target
from fedstill.studies.statistics import Difference, Spread

Format = Literal["terminal", "csv", "markdown", "latex"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, Format] = {".csv": "csv", ".md": "markdown", ".tex": "latex", ".txt": "terminal"}
WIDTH = 120
LONGEST_BASE = 12  # letters in a heading
MANY = 4  # more names than this are counted
MANY_CLASSES = 12
"""With more classes only the worst one is in the tables; all are in the CSV file."""


@dataclass(frozen=True)
class Sheet:
    """A table of words: the first column names, the others are figures.

    Parameters
    ----------
    title : str
    header : list of str
    rows : list of list of str
    best : set of (int, int)
        Row and column of the cells to stress.
    notes : list of str
        What stands below.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    notes: list[str]


def _not_ranked(summary: Summary) -> None:
    return None


@dataclass(frozen=True)
class Column:
    """A column of a sheet: its heading, a group's cell, and the figure whose highest is stressed."""

    heading: str
    cell: Callable[[Summary], str]
    rank: Callable[[Summary], float | None] = _not_ranked


def form_of(name: str | None, file: Path | None) -> Format:
    """Return the form that is asked for, or the one that a file's name ends in; the terminal's where nothing tells.

    Raises
    ------
    InputError
        For a name that is none.
    """
    if name is None:
        return SUFFIXES.get(file.suffix, "terminal") if file is not None else "terminal"
    for form in FORMATS:
        if name == form:
            return form
    raise unknown("format", name, FORMATS)


def write(text: str, file: Path) -> None:
    """Write a file whole; one that is there is replaced.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    try:
        write_atomically(file, text.encode())
    except RunError as error:
        raise InputError(f"{file}: cannot be written ({error.__cause__})") from error


def as_text(comparison: Comparison, form: Format, everything: bool = False) -> str:
    """Return a comparison as the text of a file.

    Parameters
    ----------
    comparison : Comparison
    form : {"terminal", "csv", "markdown", "latex"}
    everything : bool
        All tables; by default the first, and those of the targets. CSV always has every figure.
    """
    if form == "csv":
        return as_csv(comparison)
    found = sheets(comparison, everything)
    if form == "markdown":
        return f"# {_markdown(comparison.title)}\n\n" + "\n".join(_markdown_sheet(sheet) for sheet in found)
    if form == "latex":
        needs = f"% {_one_line(comparison.title)}; needs \\usepackage{{booktabs}}\n"
        return needs + "\n".join(_latex_sheet(sheet) for sheet in found)
    text = StringIO()
    print_tables(comparison, Console(file=text, width=WIDTH), everything)
    return text.getvalue()


def print_tables(comparison: Comparison, console: Console, everything: bool = False) -> None:
    """Print a comparison, in at least 120 columns: a narrower terminal wraps lines, and no figure is cut."""
    wide = Console(
        file=console.file, width=max(console.width, WIDTH), force_terminal=console.is_terminal, highlight=False
    )
    wide.print(f"[bold]{escape(_one_line(comparison.title))}[/]")
    for sheet in sheets(comparison, everything):
        wide.print()
        wide.print(_rich_sheet(sheet))
        for note in sheet.notes:
            wide.print(escape(note), style="dim")


# What stands in the tables


def sheets(comparison: Comparison, everything: bool = False) -> list[Sheet]:
    """Return the tables of a comparison in words."""
    found = []
    for table in comparison.tables:
        parts = [("", _main(table)), *_targets(table), *(_more(comparison, table) if everything else ())]
        for place, (about, columns) in enumerate(parts):
            title = ", ".join(part for part in (table.title, about) if part)
            found.append(_sheet(title, columns, table, [] if place else _notes(comparison, table)))
    return found


def _sheet(title: str, columns: Sequence[Column], table: ComparisonTable, notes: list[str]) -> Sheet:
    """Return a table without the columns that nobody has anything in."""
    seeds = Column("seeds", lambda summary: summary.seeds)
    filled = [column for column in columns if any(column.cell(summary) for summary in table.summaries)]
    shown = [Column("", lambda summary: _one_line(summary.label)), *filled, seeds]
    rows = [[column.cell(summary) for column in shown] for summary in table.summaries]
    best = set()
    for place, column in enumerate(shown):
        ranks = [column.rank(summary) for summary in table.summaries]
        known = [rank for rank in ranks if rank is not None]
        if len(known) > 1:
            best |= {(row, place) for row, rank in enumerate(ranks) if rank == max(known)}
    return Sheet(title, [column.heading for column in shown], rows, best, notes)


def _main(table: ComparisonTable) -> list[Column]:
    return [
        _accuracy("final", "final"),
        _accuracy("best", "best"),
        _accuracy("mean", "mean"),
        _difference("final", f"final vs {_base(table)}"),
        _mean("seconds", "seconds", 1),
        _mean("megabytes", "MB", 2),
    ]


def _targets(table: ComparisonTable) -> list[tuple[str, list[Column]]]:
    def column(place: int, heading: str, of: Callable[[Target], str]) -> Column:
        return Column(heading, lambda summary: of(summary.targets[place]))

    def columns(place: int) -> list[Column]:
        return [
            column(place, "rounds", lambda target: "" if target.rounds is None else f"{target.rounds:g}"),
            column(place, "MB", lambda target: _rounded(target.megabytes, 2)),
            column(place, "seconds", lambda target: _rounded(target.seconds, 1)),
            column(place, "reached by", lambda target: f"{target.reached} of {target.of}"),
        ]

    targets = enumerate(table.summaries[0].targets)
    return [(f"to {100 * target.accuracy:g} %, median of those that reach it", columns(at)) for at, target in targets]


def _more(comparison: Comparison, table: ComparisonTable) -> Iterator[tuple[str, list[Column]]]:
    """Yield what the default leaves out."""
    last, base = f"mean of last {comparison.last}", _base(table)
    yield (
        "the last rounds and the costs of one",
        [
            _accuracy("last_mean", last),
            _mean("seconds_per_round", "seconds a round", 2),
            _mean("megabytes_per_round", "MB a round", 3),
        ],
    )
    others = [name for name in ACCURACIES if name != "final"]
    yield f"more differences from {base}", [_difference(name, last if name == "last_mean" else name) for name in others]
    yield (
        f"accuracy beside {base} at the same cost, mean over the rounds that end within its own",
        [_difference("equal_seconds", "same seconds"), _difference("equal_megabytes", "same MB")],
    )
    bounds = {"before and after refinement": ("fused", "refined"), "ensembles": (*ENSEMBLES, BESIDE)}
    for about, kinds in bounds.items():
        ends = [(kind, when) for kind in kinds for when in ("first", "last")]
        yield (
            f"{about}, first and last measured round",
            [_accuracy(f"{kind}_{when}", f"{kind.replace('_', '-')}, {when}", ranked=False) for kind, when in ends],
        )
    yield (
        "the worst tenth of the clients",
        [
            _accuracy("worst_decile_own_samples", "own held-out samples"),
            _accuracy("worst_decile_label_mix", "own mix of labels"),
            _accuracy("worst_decile_own_models", "own models, all samples"),
        ],
    )
    yield "by class", [Column("worst class", _worst_class), *_classes(table)]


def _worst_class(summary: Summary) -> str:
    return (
        ""
        if summary.worst_class is None
        else f"class {summary.worst_class}: {per_cent(summary.per_class[summary.worst_class])}"
    )


def _classes(table: ComparisonTable) -> list[Column]:
    def column(place: int) -> Column:
        def cell(summary: Summary) -> str:
            one = summary.per_class[place] if place < len(summary.per_class) else None
            return "" if one is None else f"{100 * one.mean:.1f}"

        return Column(str(place), cell)

    classes = max(len(summary.per_class) for summary in table.summaries)
    return [column(place) for place in range(classes)] if classes <= MANY_CLASSES else []


def _accuracy(name: str, heading: str, ranked: bool = True) -> Column:
    def rank(summary: Summary) -> float | None:
        one = summary.quantities.get(name)
        return one.mean if one is not None and one.n == len(summary.group.seeds) else None  # fewer seeds are no contest

    return Column(heading, lambda summary: per_cent(summary.quantities.get(name)), rank if ranked else _not_ranked)


def per_cent(one: Spread | None) -> str:
    """Return an accuracy in per cent with its standard deviation: ``93.4 ± 0.5``; nothing of nothing."""
    if one is None:
        return ""
    return f"{100 * one.mean:.1f}" + ("" if one.std is None else f" ± {100 * one.std:.1f}")


def _difference(name: str, heading: str) -> Column:
    def cell(summary: Summary) -> str:
        return points(summary.differences.get(name))

    return Column(heading, cell)


def points(one: Difference | None) -> str:
    """Return a difference in points with its interval: ``+1.2 [-0.3, +2.7]``; nothing of nothing."""
    if one is None:
        return ""
    interval = "" if one.low is None or one.high is None else f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
    return f"{100 * one.mean:+.1f}{interval}"


def _mean(name: str, heading: str, digits: int) -> Column:
    def cell(summary: Summary) -> str:
        one = summary.quantities.get(name)
        return _rounded(None if one is None else one.mean, digits)

    return Column(heading, cell)


def _rounded(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _base(table: ComparisonTable) -> str:
    """Return the base's name for a heading, where all have the same and it is short."""
    bases = sorted({summary.base for summary in table.summaries if summary.base})
    return bases[0] if len(bases) == 1 and len(bases[0]) <= LONGEST_BASE else "base"


def _notes(comparison: Comparison, table: ComparisonTable) -> list[str]:
    notes = [
        f"Accuracy on {comparison.on} samples in %, mean ± standard deviation over seeds: after the last round, in the "
        f"best, mean of all evaluated rounds. Seconds without evaluation and MB in both directions, of a whole run."
    ]
    compared: dict[str, list[str]] = {}
    for summary in table.summaries:
        if summary.base and summary.differences:
            compared.setdefault(summary.base, []).append(summary.label)
    if compared:
        pairs = "; ".join(f"{', '.join(labels)} from {base}" for base, labels in compared.items())
        which = f": {pairs}" if _base(table) == "base" else ""
        notes.append(f"Differences in points on the same seeds, with their 95 % interval{which}.")
    notes += table.remarks
    by_remark: dict[str, list[str]] = {}
    for summary in table.summaries:
        for remark in summary.remarks:
            by_remark.setdefault(remark, []).append(summary.label)
    notes += [f"{named(labels, len(table.summaries))}: {remark}" for remark, labels in by_remark.items()]
    return [_one_line(note) for note in notes]


def named(labels: Sequence[str], total: int) -> str:
    """Return a few labels in full, and many as their number among all."""
    if len(labels) <= MANY:
        return "; ".join(labels)
    return f"all {total} methods" if len(labels) == total else f"{len(labels)} of {total} methods"


def _one_line(text: str) -> str:
    return " ".join(text.split())


# Forms


def _rich_sheet(sheet: Sheet) -> Table:
    title = escape(sheet.title) or None
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, name in enumerate(sheet.header):
        widest = max((len(row[place]) for row in sheet.rows), default=0)
        if place:
            table.add_column(escape(name), justify="right", min_width=max(widest, *map(len, name.split())))
        else:
            table.add_column(escape(name), overflow="fold")
    for at, row in enumerate(sheet.rows):
        cells = [escape(cell) for cell in row]
        table.add_row(*(f"[bold]{cell}[/]" if (at, place) in sheet.best else cell for place, cell in enumerate(cells)))
    return table


def _markdown_sheet(sheet: Sheet) -> str:
    rows = [
        [f"**{_markdown(cell)}**" if (at, place) in sheet.best else _markdown(cell) for place, cell in enumerate(row)]
        for at, row in enumerate(sheet.rows)
    ]
    lines = grid([_markdown(name) for name in sheet.header], rows)
    title = [f"### {_markdown(sheet.title)}", ""] if sheet.title else []
    notes = [line for note in sheet.notes for line in ("", _markdown(note))]
    return "\n".join([*title, lines, *notes]) + "\n"


def _markdown(text: str) -> str:
    """Return a text with what Markdown would read as its own escaped; brackets of numbers are no link."""
    return re.sub(r"([\\`*<>|])|(?<![^\W_])_|_(?![^\W_])", lambda found: f"\\{found[0]}", _one_line(text))


def _latex_sheet(sheet: Sheet) -> str:
    rows = [
        [rf"\textbf{{{_latex(cell)}}}" if (at, place) in sheet.best else _latex(cell) for place, cell in enumerate(row)]
        for at, row in enumerate(sheet.rows)
    ]
    lines = [" & ".join(cells) + r" \\" for cells in ([_latex(name) for name in sheet.header], *rows)]
    caption = [rf"\caption{{{_latex(sheet.title)}}}"] if sheet.title else []
    notes = [rf"\par\smallskip\footnotesize {_latex(note)}" for note in sheet.notes]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            *caption,
            rf"\begin{{tabular}}{{l{'r' * (len(sheet.header) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            *notes,
            r"\end{table}",
            "",
        ]
    )


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "*": "{*}",  # after a row's end this and a bracket would be options of it
    "[": "{[}",
    "]": "{]}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def _latex(text: str) -> str:
    """Return a text for LaTeX: nothing in it is a command; a minus before a number is one."""
    signed = re.split(r"(?<![\w.])-(?=\d)", _one_line(text))
    return "$-$".join("".join(LATEX.get(letter, letter) for letter in part) for part in signed)


def as_csv(comparison: Comparison) -> str:
    """Return a row for each group and a column for each figure, unrounded; accuracies are parts of 1."""
    rows = [_csv_row(table, summary) for table in comparison.tables for summary in table.summaries]
    text = StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_row(table: ComparisonTable, summary: Summary) -> dict[str, object]:
    group = summary.group
    row: dict[str, object] = {"table": table.title, "group": summary.label, "setting": group.setting}
    row |= {"variant": group.variant, "base": summary.base, **group.point, **group.own}
    row |= {"seeds": len(group.whole), "seeds_planned": len(group.seeds)}
    for name in QUANTITIES:
        one = summary.quantities.get(name)
        row |= {f"{name}_mean": one and one.mean, f"{name}_std": one and one.std}
    for name in DIFFERENCES:
        gain = summary.differences.get(name)
        row |= {f"{name}_difference": gain and gain.mean, f"{name}_difference_low": gain and gain.low}
        row |= {f"{name}_difference_high": gain and gain.high, f"{name}_difference_pairs": gain and gain.n}
    for target in summary.targets:
        at = f"{target.accuracy:g}"
        row |= {f"rounds_to_{at}": target.rounds, f"megabytes_to_{at}": target.megabytes}
        row |= {f"seconds_to_{at}": target.seconds, f"reached_{at}": target.reached}
    row["worst_class"] = summary.worst_class
    for place, one in enumerate(summary.per_class):
        row |= {f"class_{place}_mean": one and one.mean, f"class_{place}_std": one and one.std}
    return row | {"remarks": "; ".join((*table.remarks, *summary.remarks))}
