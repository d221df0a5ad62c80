"""The papers' tables and figures as data: what their cells say, and the runs that stand behind each cell.

``papers/<paper>/paper.toml`` holds a paper's *settings* (data, clients, rounds) and *methods*; a run is a setting, a
method and a seed. Every other file there is a table: its rows and columns name a setting, a method, or both, and the
rows hold the paper's numbers. So tables share runs.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from fedstill.errors import InputError
from fedstill.names import unknown
from fedstill.reproduce.metrics import Metric, Scale
from fedstill.settings import Settings

Read = TypeVar("Read", bound=BaseModel)
Keys = dict[str, Any]
Words = dict[str, str]
Unit = Literal["%", "fraction", "rounds", "points"]

NOT_AVAILABLE = "not available"
"""A value that the paper draws only, or that the text at hand does not have."""
NO_CELL = ""
"""A place of the table where the paper has nothing."""
HOME = files("fedstill.reproduce") / "papers"


class Part(Settings):
    """A setting or a method: its name, the words that choose it, and what it sets."""

    name: str
    words: Words
    keys: Keys
    small: Keys = Field(default_factory=dict)
    """What it sets in the small form."""


class SmallForm(Settings):
    """How a paper's runs are made small."""

    preset: str | None = None
    """By default the paper's."""
    form: str
    """What it is, in words."""
    keys: Keys


class Paper(Settings):
    """``paper.toml``: what the tables of a paper share."""

    name: str
    reference: str
    preset: str
    seeds: int = Field(ge=1)
    """Seeds of the paper."""
    deviations: tuple[str, ...] = Field(strict=False)
    """Where our runs are known to differ from the paper's."""
    keys: Keys = Field(default_factory=dict)
    small: SmallForm
    setting: tuple[Part, ...] = Field(strict=False)
    method: tuple[Part, ...] = Field(strict=False)

    def preset_of(self, scale: Scale) -> str:
        """Return the preset that runs start from."""
        return self.small.preset or self.preset if scale == "small" else self.preset


class _Line(Settings):
    """A row or a column as it stands in the file."""

    name: str | None = None
    setting: str | None = None
    method: str | None = None
    words: Words = Field(default_factory=dict)
    metric: Metric | None = None
    unit: Unit | None = None

    @property
    def title(self) -> str:
        return self.name or self.method or self.setting or ""


class _Row(_Line):
    values: tuple[str, ...] = Field(strict=False)


class _File(Settings):
    title: str
    metric: Metric | None = None
    unit: Unit = "%"
    deviations: tuple[str, ...] = Field((), strict=False)
    notes: tuple[str, ...] = Field((), strict=False)
    column: tuple[_Line, ...] = Field(strict=False, min_length=1)
    row: tuple[_Row, ...] = Field(strict=False, min_length=1)


@dataclass(frozen=True)
class Printed:
    """A number as the paper prints it.

    Parameters
    ----------
    text : str
    mean : float
    deviation : float or None
    """

    text: str
    mean: float
    deviation: float | None

    @staticmethod
    def of(text: str) -> Printed:
        """Return a number such as ``79.59 ± 1.01`` or ``350``; ValueError for anything else."""
        if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?", text)):
            raise ValueError(f"{text!r} is not a number, nor one with a deviation such as '79.59 ± 1.01'")
        return Printed(text, float(found[1]), float(found[2]) if found[2] else None)


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Parameters
    ----------
    row, column : str
        Where it stands.
    setting, method : Part
        Its runs.
    metric : Metric
    unit : Unit
    words : dict
        What chooses it: kind -> word, such as ``beta`` -> ``0.3``.
    paper : Printed or None
        The paper's number; None where it is not available.
    """

    row: str
    column: str
    setting: Part
    method: Part
    metric: Metric
    unit: Unit
    words: Words
    paper: Printed | None

    @property
    def run(self) -> tuple[str, str]:
        """The names of its runs' setting and method."""
        return self.setting.name, self.method.name


@dataclass(frozen=True)
class Table:
    """A table or a figure of a paper.

    Parameters
    ----------
    id : str
        Such as ``fedftg/table1``.
    paper : Paper
    title : str
    rows, columns : tuple of str
    cells : tuple of Cell
        Row by row; places where the paper has nothing are left out.
    deviations, notes : tuple of str
        Where our runs differ from this table's in particular, and what else is worth knowing.
    """

    id: str
    paper: Paper
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[Cell, ...]
    deviations: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def folder(self) -> str:
        """The paper's part of the id."""
        return self.id.partition("/")[0]


def list_tables(home: Traversable = HOME, paper: str | None = None) -> list[str]:
    """Return the id of every table and figure, or of those of one paper, such as ``fedftg``."""
    found = []
    for folder in sorted(home.iterdir(), key=lambda item: item.name):
        if paper in (None, folder.name) and (folder / "paper.toml").is_file():
            names = sorted(item.name for item in folder.iterdir() if item.name.endswith(".toml"))
            found += [f"{folder.name}/{name.removesuffix('.toml')}" for name in names if name != "paper.toml"]
    return found


def load_table(id: str, home: Traversable = HOME) -> Table:
    """Return a table.

    Parameters
    ----------
    id : str
        One of :func:`list_tables`.
    home : Traversable
        Folder of the papers' folders.

    Raises
    ------
    InputError
        For an unknown name, or a file whose rows, columns and values do not fit together.
    """
    if id not in list_tables(home):
        raise unknown("table", id, list_tables(home))
    folder, _, name = id.partition("/")
    paper = _read(home / folder / "paper.toml", Paper)
    file = _read(home / folder / f"{name}.toml", _File)
    try:
        cells = [cell for row in file.row for cell in _cells(paper, file, row)]
    except ValueError as error:
        raise InputError(f"{id}: {error}") from error
    rows, columns = (tuple(line.title for line in lines) for lines in (file.row, file.column))
    return Table(id, paper, file.title, rows, columns, tuple(cells), file.deviations, file.notes)


def _read(file: Traversable, model: type[Read]) -> Read:
    try:
        return model.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise InputError(f"{file}: {error}") from error


def _cells(paper: Paper, file: _File, row: _Row) -> list[Cell]:
    if len(row.values) != len(file.column):
        raise ValueError(f"row {row.title!r} has {len(row.values)} values for {len(file.column)} columns")
    places = zip(file.column, row.values, strict=True)
    return [_cell(paper, file, row, column, value) for column, value in places if value != NO_CELL]


def _cell(paper: Paper, file: _File, row: _Row, column: _Line, value: str) -> Cell:
    setting = _named("setting", row.setting or column.setting, paper.setting)
    method = _named("method", row.method or column.method, paper.method)
    metric = row.metric or column.metric or file.metric
    if metric is None:
        raise ValueError(f"row {row.title!r}, column {column.title!r} has no metric")
    words = setting.words | method.words | column.words | row.words
    printed = None if value == NOT_AVAILABLE else Printed.of(value)
    unit = row.unit or column.unit or file.unit
    return Cell(row.title, column.title, setting, method, metric, unit, words, printed)


def _named(kind: str, name: str | None, parts: tuple[Part, ...]) -> Part:
    for part in parts:
        if part.name == name:
            return part
    raise ValueError(f"there is no {kind} {name!r}")
