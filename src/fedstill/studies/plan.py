"""The study file: what is compared, in which settings and with which seeds, and the runs that follow from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from fedstill import presets
from fedstill.config import (
    Config,
    Table,
    config_with,
    explained,
    keys,
    nearest_key,
    parse_override,
    read_toml,
)
from fedstill.errors import InputError
from fedstill.methods.registry import compose
from fedstill.names import unknown
from fedstill.settings import Settings
from fedstill.studies.results import INDEX, in_words

COPY = "study.toml"
"""The study file's copy in the results folder."""
LONGEST = 100
"""Characters of a folder's name; of a longer one the rest becomes a digest."""
LONGEST_FILE_NAME = 255
"""Bytes, on most file systems."""
RESERVED = ("lock", "optuna.log", "search.json", "report")
"""What a results folder may have beside :data:`COPY` and ``study.json``."""


def dotted(given: Any) -> Any:
    """Return nested tables as dotted keys: ``data.beta = 0.1`` in TOML says the same as ``"data.beta" = 0.1``."""
    if not isinstance(given, dict):
        return given
    found: Table = {}
    for key, value in given.items():
        nested = isinstance(value, dict) and not value.keys() & {"low", "high"}
        entries = {f"{key}.{rest}": part for rest, part in dotted(value).items()} if nested else {key: value}
        if twice := found.keys() & entries.keys():
            raise ValueError(f"{min(twice)!r} stands there twice")
        found |= entries
    return found


def in_json(values: list[Any]) -> list[Any]:
    """Return an axis's values, which stand in ``study.json`` too."""
    try:
        json.dumps(values)
    except TypeError as error:
        raise ValueError("a date or a time is no value of any key; put it in quotes where it is a name") from error
    return values


Name = Annotated[str, Field(min_length=1)]
Keys = Annotated[dict[str, Any], BeforeValidator(dotted)]
Values = Annotated[list[Any], Field(min_length=1), AfterValidator(in_json)]
Axes = Annotated[dict[str, Values], BeforeValidator(dotted)]


class VariantTable(Settings):
    """``[[variant]]``: one of the things that are compared."""

    name: Name
    base: str | None = None
    """The variant that paired differences are taken from."""
    keys: Keys = Field(default_factory=dict)
    grid: Axes = Field(default_factory=dict)
    """Axes of this variant alone."""


class SettingTable(Settings):
    """``[[setting]]``: a situation in which the variants are compared."""

    name: Name
    preset: str | None = None
    config: str | None = None
    keys: Keys = Field(default_factory=dict)
    only: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """The variants that it has; by default all."""


class Range(Settings):
    """Numbers from ``low`` to ``high`` that a search may try, whole ones for a key that takes whole numbers."""

    low: float
    high: float
    log: bool = False
    """Even on a logarithmic scale."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low = {self.low:g} is not below high = {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic scale has no low = {self.low:g}")
        return self


def _range_or_values(given: Any) -> str | None:
    if isinstance(given, list):
        return "values"
    return "range" if isinstance(given, dict | Range) else None


Space = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Values, Tag("values")],
    Discriminator(
        _range_or_values,
        custom_error_type="space",
        custom_error_message="a list of values or {low = ..., high = ...} should stand here",
    ),
]


class SearchTable(Settings):
    """``[search]``: values to be chosen on the server's validation part."""

    trials: int = Field(ge=1)
    metric: Literal["last", "mean"] = "last"
    """Validation accuracy after the last round, or its mean over the evaluated rounds."""
    space: Annotated[dict[str, Space], Field(min_length=1), BeforeValidator(dotted)]
    """Key -> a list of values, or ``{low, high, log}``."""
    batch: int = Field(1, ge=1)
    """Trials that are chosen at a time, from the results of those before."""
    seed: int = Field(0, ge=0)
    """Of the choice."""


class StudyTable(Settings):
    """The study file."""

    title: str = ""
    preset: str | None = None
    config: str | None = None
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, strict=False)] = (0,)
    seed_keys: Annotated[tuple[str, ...], Field(strict=False)] = ("seed.data", "seed.train")
    keys: Keys = Field(default_factory=dict)
    grid: Axes = Field(default_factory=dict)
    variant: Annotated[tuple[VariantTable, ...], Field(strict=False)] = ()
    setting: Annotated[tuple[SettingTable, ...], Field(strict=False)] = ()
    search: SearchTable | None = None


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Parameters
    ----------
    setting : str
        Empty where the study has no settings.
    point : dict
        Dotted key -> value: the grid point, and the variant's own.
    variant : str
    base : str or None
        The variant that differences are taken from, where this setting has it.
    seed : int
    config : Config
        Complete and valid.
    directory : Path
        Of the run, relative to the results folder.
    """

    setting: str
    point: dict[str, Any]
    variant: str
    base: str | None
    seed: int
    config: Config
    directory: Path

    @property
    def kind(self) -> str:
        """What it has in common with the other seeds."""
        return json.dumps([self.setting, self.point, self.variant])

    @property
    def label(self) -> str:
        """What it is, in words."""
        short = {name: self.point[key] for key, name in short_names(self.point).items()}
        return in_words(", ".join(part for part in (self.setting, self.variant) if part), short) + f", seed {self.seed}"

    def record(self) -> dict[str, Any]:
        """Return its entry in ``study.json``."""
        return {
            "setting": self.setting,
            "point": self.point,
            "variant": self.variant,
            "base": self.base,
            "seed": self.seed,
            "directory": self.directory.as_posix(),
        }


@dataclass(frozen=True)
class Place:
    """A setting with the configuration that its runs start from."""

    name: str
    base: Table
    from_preset: bool
    keys: dict[str, Any]
    only: tuple[str, ...] | None


@dataclass(frozen=True)
class Study:
    """A study file that has been read and checked.

    Parameters
    ----------
    path : Path
        The file.
    text : str
        Its text.
    table : StudyTable
        What it says.
    places : tuple of Place
        Its settings; one without a name where it has none.
    overrides : dict
        Dotted key -> value, set in every run after all else.
    cells : tuple of Cell
        Its runs in the order of work, seed by seed; with a search those of its first trial.
    configs : dict
        ``config`` as the study names it -> the text of that file.
    """

    path: Path
    text: str
    table: StudyTable
    places: tuple[Place, ...]
    overrides: dict[str, Any]
    cells: tuple[Cell, ...] = ()
    configs: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def load(path: Path | str, *overrides: str) -> Study:
        """Read a study file and check every configuration that follows from it.

        Parameters
        ----------
        path : path
        *overrides : str
            Such as ``"train.rounds=3"``, for all runs.

        Raises
        ------
        InputError
            For a missing or malformed file, keys that do not exist, configurations that cannot work, and runs that
            cannot be told apart.
        """
        path = Path(path)
        given, text = read_toml(path)
        try:
            table = StudyTable.model_validate(given)
        except ValidationError as error:
            raise explained(error, path, text, StudyTable) from error
        _check_names(path, table)
        given = dict(parse_override(one) for one in overrides)
        for key in given:
            _check_key("", key)
        places = _places(path, table)
        named = [table.config, *(setting.config for setting in table.setting)]
        configs = {config: read_toml(_config_file(path, config))[1] for config in named if config is not None}
        study = Study(path, text, table, places, given, configs=configs)
        trials = list(_samples_of(table.search.space)) if table.search else [{}]
        planned = [study.planned(trial) for trial in trials]
        return replace(study, cells=planned[0])

    @staticmethod
    def of(study: Study | Path | str, *overrides: str) -> Study:
        """Return a study as it is, or load its file."""
        if not isinstance(study, Study):
            return Study.load(study, *overrides)
        if overrides:
            raise InputError("overrides go with a study's file, not with a ready Study")
        return study

    @property
    def title(self) -> str:
        """Its title, or the name of its file."""
        return self.table.title or self.path.stem

    def planned(self, trial: Mapping[str, Any] | None = None) -> tuple[Cell, ...]:
        """Return the runs in the order of work; ``trial`` holds a search's values by dotted key, more of the point.

        Raises
        ------
        InputError
            If a configuration cannot work, or two runs cannot be told apart.
        """
        variants = self.table.variant or (VariantTable(name="run"),)
        cells = tuple(
            self._cell(place, point | dict(trial or {}), variant, own, seed)
            for seed in self.table.seeds
            for place in self.places
            for point in points(self.table.grid)
            for variant in variants
            if place.only is None or variant.name in place.only
            for own in points(variant.grid)
        )
        self._check_distinct(cells)
        return cells

    def _cell(self, place: Place, point: dict[str, Any], variant: VariantTable, own: dict[str, Any], seed: int) -> Cell:
        seeds = dict.fromkeys(self.table.seed_keys, seed)
        layers = [self.table.keys, place.keys, point, variant.keys, own, seeds, self.overrides]
        values = {key: value for layer in layers for key, value in layer.items()}
        base = dict(place.base)
        if place.from_preset and "model.name" in values:
            base.pop("model", None)  # a preset's width says nothing about another architecture
        name = slug(variant.name) if self.table.variant else ""
        parts = [slug(place.name), folder_of(point), "-".join(part for part in (name, folder_of(own)) if part)]
        directory = Path(*(part for part in parts if part), f"seed-{seed}")
        try:
            for key in (*point, *own, *seeds):
                if sum(key in layer for layer in layers) > 1:
                    raise InputError(f"{key} is an axis of the study, and something else sets it too; leave one out")
            _check_folders(directory)
            config = config_with(base, values)
            compose(config)
        except InputError as error:
            raise InputError(f"{self.path}: {directory}: {error}") from error
        has_base = place.only is None or variant.base in place.only
        return Cell(
            place.name, {**point, **own}, variant.name, variant.base if has_base else None, seed, config, directory
        )

    def _check_distinct(self, cells: Sequence[Cell]) -> None:
        """Refuse two runs with one directory or one configuration, and a study without any."""
        if not cells:
            raise InputError(f"{self.path}: no setting has a variant; there is nothing to run")
        places: dict[Path, Cell] = {}
        configs: dict[str, Cell] = {}
        for cell in cells:
            twin = places.setdefault(cell.directory, cell)
            if twin is not cell:
                raise InputError(
                    f"{self.path}: two runs would have the directory {cell.directory}: {twin.label!r} and "
                    f"{cell.label!r}; give them different names"
                )
            twin = configs.setdefault(cell.config.model_dump_json(), cell)
            if twin is not cell:
                raise InputError(
                    f"{self.path}: {twin.label!r} and {cell.label!r} have the same configuration; leave one out"
                )


def points(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return every combination of a grid's values; one empty point where there is no axis."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def copy_of(config: str) -> str:
    """Return the name under which a results folder keeps a configuration that its study names."""
    name = quote(config, safe="")
    return f"{COPY}.{name if len(name) <= LONGEST else sha256(config.encode()).hexdigest()}"


def _config_file(path: Path, config: str) -> Path:
    """Return where a configuration lies: beside the study, or where that is a results folder's copy, copied too."""
    copy = path.with_name(copy_of(config))
    return copy if path.name == COPY and copy.exists() else path.parent / config


def _places(path: Path, table: StudyTable) -> tuple[Place, ...]:
    own = _base(path, "the study", table.preset, table.config) or (presets.preset(presets.DEFAULT), True)
    if not table.setting:
        return (Place("", *own, {}, None),)
    return tuple(
        Place(one.name, *(_base(path, f"[[setting]] {one.name!r}", one.preset, one.config) or own), one.keys, one.only)
        for one in table.setting
    )


def _base(path: Path, where: str, preset: str | None, config: str | None) -> tuple[Table, bool] | None:
    """Return what configurations start from, and whether it is a preset; None where nothing is named."""
    if preset is not None and config is not None:
        raise InputError(f"{path}: {where}: preset and config do not go together")
    try:
        if preset is not None:
            return presets.preset(preset), True
        return (read_toml(_config_file(path, config))[0], False) if config is not None else None
    except InputError as error:
        copied = path.name == COPY and path.with_name(INDEX).exists()
        own = f"; this is a copy: sweep the study's own file, with --out {path.parent}" if copied else ""
        raise InputError(f"{path}: {where}: {error}{own}") from error


def _check_names(path: Path, table: StudyTable) -> None:
    """Refuse keys that no configuration has, and names of variants that the study has not got."""
    used: dict[str, Iterable[str]] = {
        "[keys]": table.keys,
        "[grid]": table.grid,
        "seed_keys": table.seed_keys,
        "[search]": table.search.space if table.search else (),
    }
    used |= {f"[[setting]] {one.name!r}": one.keys for one in table.setting}
    used |= {f"[[variant]] {one.name!r}": [*one.keys, *one.grid] for one in table.variant}
    for where, own in used.items():
        for key in own:
            _check_key(f"{path}: {where}: ", key)
    axes: dict[str, Iterable[str]] = {where: used[where] for where in ("[grid]", "seed_keys", "[search]")}
    axes |= {f"[[variant]] {one.name!r}: grid": one.grid for one in table.variant}
    for where, own in axes.items():
        for key in own:
            _check_axis(f"{path}: {where}: ", key)
    names = [one.name for one in table.variant]
    for setting in table.setting:
        for name in setting.only or ():
            if name not in names:
                raise InputError(f"{path}: [[setting]] {setting.name!r}: {unknown('variant', name, names)}")
    for one in table.variant:
        where = f"{path}: [[variant]] {one.name!r}: base"
        if one.base is not None and one.base not in names:
            raise InputError(f"{where}: {unknown('variant', one.base, names)}")
        if one.base == one.name:
            raise InputError(f"{where}: it is the variant itself")
        if any(other.name == one.base and other.grid for other in table.variant):
            raise InputError(f"{where}: {one.base!r} has a grid of its own, so that it is not one variant")
    if table.search and (len(names) > 1 or any(one.grid for one in table.variant)):
        raise InputError(f"{path}: [search]: a search has one variant, without a grid of its own")


def _check_key(where: str, key: str) -> None:
    if plain(key) not in keys() and plain(key) not in Config.model_fields:
        near = nearest_key(plain(key))
        raise InputError(f"{where}unknown key {key!r}" + (f", did you mean {near!r}?" if near else ""))


def _check_axis(where: str, key: str) -> None:
    """Refuse a table as an axis: its keys that a point does not name would lose what the study says of them."""
    own = [one for one in keys() if one.startswith(f"{plain(key)}.")]
    if own:
        raise InputError(f"{where}{key!r} is a table; name its keys one by one, such as {own[0]!r}")


def _samples_of(space: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield trials in which every value and every end of a range stands once, the others being their first."""
    ends = {key: ends_of(key, entry) if isinstance(entry, Range) else entry for key, entry in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    for key, values in ends.items():
        for value in values:
            yield {**first, key: value}


def ends_of(key: str, entry: Range) -> list[int] | list[float]:
    """Return the lowest and the highest value that a search may try: whole numbers for a key that takes them alone."""
    types = keys().get(plain(key), ())
    if int not in types or float in types:
        return [entry.low, entry.high]
    if not (entry.low.is_integer() and entry.high.is_integer()):
        raise InputError(f"[search] {key} takes whole numbers, so low and high are to be whole")
    return [int(entry.low), int(entry.high)]


def plain(key: str) -> str:
    """Return a key without places in a list of tables: ``model.width`` for ``model.0.width``."""
    return ".".join(part for part in key.split(".") if not part.isdigit())


# Names of folders


def _check_folders(directory: Path) -> None:
    """Refuse a run's directory that a results folder has another use for, or whose name no file system takes."""
    first = directory.parts[0]
    if first in RESERVED or first.startswith((COPY, INDEX)):
        raise InputError(f"a results folder has a file or folder {first!r} of its own; choose another name")
    for part in directory.parts:
        if (size := len(os.fsencode(part))) > LONGEST_FILE_NAME:
            raise InputError(
                f"a folder's name has {LONGEST_FILE_NAME} bytes at most, and this one {size}; choose shorter names"
            )


def short_names(point: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> its last part, or the whole key where two end alike."""
    leaves = {key: key.rpartition(".")[2] for key in point}
    return {key: leaf if list(leaves.values()).count(leaf) == 1 else key for key, leaf in leaves.items()}


def folder_of(point: Mapping[str, Any]) -> str:
    """Return the folder's name of a grid point, such as ``beta-0.1-clients-10``; empty for one without axes."""
    return slug(" ".join(f"{name} {_shown(point[key])}" for key, name in short_names(point).items()))


def _shown(value: Any) -> str:
    if isinstance(value, int | float) and value < 0:
        return f"minus {-value}"
    return value if isinstance(value, str) else json.dumps(value)


def slug(text: str) -> str:
    """Return a text as a folder's name: small letters, digits, dots and underscores, joined by dashes."""
    kept = "".join(letter if letter.isalnum() or letter in "._" else " " for letter in text.lower())
    name = "-".join(part for word in kept.split() if (part := word.strip(".")))
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 9]}-{sha256(text.encode()).hexdigest()[:8]}"
