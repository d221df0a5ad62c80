"""What finished and unfinished runs gave: run directories and studies, read back as groups of seeds.

A *group* is what differs in its seed alone: a variant of a study in one setting at one grid point, or run directories
whose configurations agree. What a study planned and has not got is part of its group, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedstill.config import Config, flat
from fedstill.data.fingerprint import Fingerprints
from fedstill.errors import InputError
from fedstill.evaluation import Record
from fedstill.methods.registry import list_methods
from fedstill.progress import megabytes
from fedstill.runs.directory import RunDirectory, read_fingerprints
from fedstill.runs.metrics import METRICS, whole_lines
from fedstill.settings import ModedSettings

INDEX = "study.json"
FAILED = "failed.txt"
TRACEBACK = "Traceback (most recent call last):"
WORK = ("train", "fuse", "refine")
"""The phases whose seconds count; evaluation is left out."""

Keys = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """One run directory.

    Parameters
    ----------
    path : Path
    config : Config
    records : list of dict
        One per whole round, at least one.
    partition : str
        Fingerprint of who holds what.
    data : mapping or None
        Part of the data (``train``, ``validation``, ``test``, ``public``) -> fingerprint of its samples; None for an
        older run, which has none.
    environment : dict
        Versions, commit, device.
    remarks : tuple of str
        What is worth knowing about the files.
    """

    path: Path
    config: Config
    records: list[Record]
    partition: str
    data: Fingerprints | None
    environment: Keys
    remarks: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all rounds are there."""
        return len(self.records) >= self.config.train.rounds

    @property
    def seconds(self) -> float:
        """Seconds of training, fusing and refining."""
        return seconds(self.records)

    @property
    def megabytes(self) -> float:
        """10^6 bytes sent in both directions."""
        return megabytes(self.records)


State = Literal["whole", "unfinished", "failed", "missing"]


@dataclass(frozen=True)
class SeedRun:
    """One seed of a group, and what there is of it.

    Parameters
    ----------
    seed : str
        As shown; ``0/1`` for data seed 0 and training seed 1.
    state : {"whole", "unfinished", "failed", "missing"}
        Only whole runs count in figures.
    run : RunData or None
        What can be read.
    reason : str
        Why it is not whole.
    """

    seed: str
    state: State
    run: RunData | None
    reason: str = ""


@dataclass(frozen=True)
class Group:
    """Runs that differ in seed alone.

    Parameters
    ----------
    name : str
        The variant with the keys of its own grid; of loose runs what tells them from the others, the method first.
    variant : str
        The study's name for it; of loose runs the same as ``name``.
    seeds : tuple of SeedRun
    base : str or None
        The variant that differences are taken from.
    setting : str
        Empty without settings.
    point : dict
        The study's grid point; all variants of a setting have the same keys.
    own : dict
        Keys that tell it from the same variant's other groups; of loose runs, from all others.
    """

    name: str
    variant: str
    seeds: tuple[SeedRun, ...]
    base: str | None = None
    setting: str = ""
    point: Keys = field(default_factory=dict)
    own: Keys = field(default_factory=dict)

    @property
    def whole(self) -> dict[str, RunData]:
        """Seed -> its run, for the seeds that are whole."""
        return {one.seed: one.run for one in self.seeds if one.run is not None and one.state == "whole"}

    @property
    def runs(self) -> list[RunData]:
        """Every run that can be read, whole or not."""
        return [one.run for one in self.seeds if one.run is not None]


@dataclass(frozen=True)
class Results:
    """Groups of runs.

    Parameters
    ----------
    title : str
        The study's; empty for loose runs.
    groups : list of Group
    is_study : bool
        Whether they belong to one study.
    """

    title: str
    groups: list[Group]
    is_study: bool


def read(paths: Sequence[Path]) -> Results:
    """Read run directories, or one study: its results folder or its file.

    Raises
    ------
    InputError
        If there is nothing to read, a file is damaged, or a study stands among other paths.
    """
    if not paths:
        raise InputError("nothing to compare: name run directories, a study's results folder or its file")
    studies = [path for path in paths if path.suffix == ".toml" or (path / INDEX).exists()]
    if studies and len(paths) > 1:
        raise InputError(f"{studies[0]}: a study is compared alone; give it without other paths, or run directories")
    if studies:
        return read_study(studies[0])
    return Results("", groups([read_run(path) for path in paths]), is_study=False)


# One run


def read_run(path: Path) -> RunData:
    """Read a run directory; a last line of metrics that was cut short is left out and remarked.

    Raises
    ------
    InputError
        If it is none, has no whole round, or a file of it is missing or damaged.
    """
    run = _read(path)
    if not run.records:
        raise InputError(f"{path / 'metrics.jsonl'}: no whole round is there yet; go on with 'fedstill resume {path}'")
    return run


def _read(path: Path) -> RunData:
    config = RunDirectory.read_config(path)
    records, cut_short = whole_lines(path)
    remarks = [f"{path / METRICS}: its last line was cut short and is left out"] if cut_short else []
    environment = _json(path / "environment.json", needed=False)
    found = read_fingerprints(path)
    return RunData(path, config, records, found.partition, found.data, environment, tuple(remarks))


def _json(file: Path, needed: bool = True) -> Keys:
    if not needed and not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: missing or damaged") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: damaged, it holds no table")
    return found


def seconds(records: Iterable[Record]) -> float:
    """Return the seconds of training, fusing and refining."""
    return float(sum(record["seconds"].get(phase, 0.0) for record in records for phase in WORK))


def failure(directory: Path) -> str | None:
    """Return why a run failed, in one line; None where it has not."""
    file = directory / FAILED
    if not file.exists():
        return None
    try:
        text = file.read_text(errors="replace").strip()
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror or error}); remove it"
    if TRACEBACK in text:
        return f"{text.splitlines()[-1]}; {file} has the whole traceback"
    return " ".join(text.split()) or "no reason is given"


def found_in(directory: Path, seed: str, run: RunData | None) -> SeedRun:
    """Return a seed of which ``run`` is what can be read in ``directory``."""
    if run is not None and run.whole:
        return SeedRun(seed, "whole", run)
    if (said := failure(directory)) is not None:
        return SeedRun(seed, "failed", run, f"failed: {said}")
    if run is not None:
        return SeedRun(seed, "unfinished", run, f"unfinished, {len(run.records)} of {run.config.train.rounds} rounds")
    if directory.exists():
        return SeedRun(seed, "unfinished", None, "unfinished, no round yet")
    return SeedRun(seed, "missing", None, "not run")


# A study


class _Cell(BaseModel):
    model_config = ConfigDict(frozen=True)

    setting: str = ""
    point: Keys = {}
    variant: str
    base: str | None = None
    seed: int
    directory: str


class _Index(BaseModel):
    title: str
    cells: list[_Cell] = Field(min_length=1)


def read_study(path: Path) -> Results:
    """Read a study by its results folder, or by its file where the default folder has results.

    Raises
    ------
    InputError
        If there are no results, or a file is damaged; a run that is not there or not whole is no error.
    """
    folder = _folder(path)
    file = folder / INDEX
    try:
        index = _Index.model_validate(_json(file))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"{file}: damaged ({where}: {problem['msg']}); run the study again to write it") from error
    common = {
        setting: set.intersection(*(set(cell.point) for cell in index.cells if cell.setting == setting))
        for setting in {cell.setting for cell in index.cells}
    }
    members: dict[str, list[_Cell]] = {}
    for cell in index.cells:
        members.setdefault(_text([cell.setting, cell.point, cell.variant]), []).append(cell)
    return Results(index.title, [_group(folder, own, common[own[0].setting]) for own in members.values()], True)


def _folder(path: Path) -> Path:
    if path.suffix != ".toml":
        return path
    if not path.exists():
        raise InputError(f"{path}: there is no such file")
    places = (path.parent, Path("runs") / path.stem)  # the copy beside the results, and the default folder
    for folder in places:
        if (folder / INDEX).exists():
            return folder
    raise InputError(f"{path}: no results in {places[1]}; run the study first, or name its results folder")


def _group(folder: Path, cells: Sequence[_Cell], common: set[str]) -> Group:
    first = cells[0]
    point = {key: value for key, value in first.point.items() if key in common}
    own = {key: value for key, value in first.point.items() if key not in common}
    seeds = tuple(_planned(folder / cell.directory, str(cell.seed)) for cell in cells)
    return Group(in_words(first.variant, own), first.variant, seeds, first.base, first.setting, point, own)


def _planned(directory: Path, seed: str) -> SeedRun:
    file = directory / METRICS
    run = _read(directory) if file.exists() and file.stat().st_size else None
    return found_in(directory, seed, run if run and run.records else None)


# Loose run directories

SEEDS, SAME_RESULTS = (
    ("seed.", "schema_version"),
    ("data.root", "public.root", "checkpoint.", "execution.", "tracking.", "fedmd.pretraining_cache"),
)
"""Keys by which runs of one group may differ; the second kind, by how the same numbers came about."""
OTHER_RESULTS = ("execution.precision",)
"""Those of the second kind that do give other numbers."""


def gives_the_same(key: str) -> bool:
    """Say whether a key only tells how the same numbers came about."""
    return key.startswith(SAME_RESULTS) and key not in OTHER_RESULTS


def groups(runs: Sequence[RunData]) -> list[Group]:
    """Return run directories as groups: runs that differ in seed alone.

    Keys that do not change results (``execution.device``, ``data.root``) tell groups apart only where a seed would
    stand in a group twice. A seed that another group has is missing in a group that has not got it. Differences are
    taken from the first group.

    Raises
    ------
    InputError
        If two runs are the same experiment with the same seed.
    """
    members: dict[str, list[tuple[Keys, RunData]]] = {}
    for run in runs:
        keys = {
            key: value for key, value in flat(run.config).items() if not (key.startswith(SEEDS) or gives_the_same(key))
        }
        members.setdefault(_text(keys), []).append((keys, run))
    parted = [part for own in members.values() for part in _parted(own)]
    names = labels([(keys, own[0].config) for keys, own in parted])
    seeds = sorted({_seed(run) for run in runs})
    made = []
    for (name, telling), (_, own) in zip(names, parted, strict=True):
        by_seed = {_seed(run): run for run in own}
        found = (
            found_in(by_seed[seed].path, _seed_name(seed), by_seed[seed])
            if seed in by_seed
            else SeedRun(_seed_name(seed), "missing", None, "not among the runs given")
            for seed in seeds
        )
        made.append(Group(name, name, tuple(found), base=names[0][0], own=telling))
    return made


def _parted(members: list[tuple[Keys, RunData]]) -> list[tuple[Keys, list[RunData]]]:
    """Return one group, or several by their execution where a seed would stand in one twice."""
    seeds = [_seed(run) for _, run in members]
    keys = members[0][0]
    if len(set(seeds)) == len(seeds):
        return [(keys, [run for _, run in members])]
    details = [{k: v for k, v in flat(run.config).items() if gives_the_same(k)} for _, run in members]
    telling = [key for key in details[0] if len({_text(detail.get(key)) for detail in details}) > 1]
    parts: dict[str, tuple[Keys, list[RunData]]] = {}
    for detail, (_, run) in zip(details, members, strict=True):
        chosen = {key: detail.get(key) for key in telling}
        _, same = parts.setdefault(_text(chosen), (keys | chosen, []))
        if twin := next((other for other in same if _seed(other) == _seed(run)), None):
            raise InputError(f"{twin.path} and {run.path} are the same experiment with the same seed; leave one out")
        same.append(run)
    return list(parts.values())


def labels(groups: Sequence[tuple[Keys, Config]]) -> list[tuple[str, Keys]]:
    """Return for each group what tells it from the others: in words, and as keys; the method always and first.

    Keys of a method that a run does not use, and those that a mode sets, are left out where the rest tells enough.
    """
    every = dict.fromkeys(key for keys, _ in groups for key in keys)
    telling = [key for key in every if len({_text(keys.get(key)) for keys, _ in groups}) > 1 and key != "method"]
    full = [{key: keys[key] for key in telling if key in keys} for keys, _ in groups]
    brief = [
        {key: value for key, value in own.items() if _speaks(key, value, config)}
        for own, (_, config) in zip(full, groups, strict=True)
    ]
    named = [in_words(config.method, own) for own, (_, config) in zip(brief, groups, strict=True)]
    return [
        (name, {"method": config.method, **own})
        if named.count(name) == 1
        else (in_words(config.method, whole), {"method": config.method, **whole})
        for name, own, whole, (_, config) in zip(named, brief, full, groups, strict=True)
    ]


def _speaks(key: str, value: object, config: Config) -> bool:
    table, _, leaf = key.partition(".")
    known = {name.removeprefix("+") for name in list_methods()}
    if table in known and table not in (part.strip() for part in config.method.split("+")):
        return False
    settings = getattr(config, table, None)
    by_mode = settings.set_by(str(getattr(settings, "mode", ""))) if isinstance(settings, ModedSettings) else {}
    return leaf not in by_mode or by_mode[leaf] != value


def in_words(name: str, keys: Mapping[str, object]) -> str:
    """Return a name with keys behind it, ``fedavg, data.beta=0.1``."""
    parts = [f"{key}={'none' if value is None else _word(value)}" for key, value in keys.items()]
    return ", ".join(part for part in (name, *parts) if part)


def _word(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _seed(run: RunData) -> tuple[int, int]:
    return run.config.seed.data, run.config.seed.train


def _seed_name(seed: tuple[int, int]) -> str:
    return str(seed[0]) if seed[0] == seed[1] else f"{seed[0]}/{seed[1]}"


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)
