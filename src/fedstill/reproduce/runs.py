"""The runs behind the cells of a table, as a study; the data that they need; what there is of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fedstill.config import Config, SeedSettings
from fedstill.data import list_datasets
from fedstill.data.sources import ROOT_VARIABLE, file_of
from fedstill.errors import InputError
from fedstill.models import list_models
from fedstill.reproduce.metrics import Scale
from fedstill.reproduce.tables import Cell, Keys, Paper, Table
from fedstill.runs.metrics import METRICS
from fedstill.studies.plan import Study
from fedstill.studies.results import SeedRun, found_in, read_run
from fedstill.studies.sweep import difference

EMBEDDED = "digits"


def study_of(paper: Paper, tables: Iterable[Table], scale: Scale, seeds: int) -> Study:
    """Return the study of all runs behind some tables of a paper, which need not be written anywhere.

    Parameters
    ----------
    paper : Paper
    tables : iterable of Table
        Of this paper; a run that several tables have is one run.
    scale : {"paper", "small"}
    seeds : int
        Seeds 0 to ``seeds - 1``.

    Raises
    ------
    InputError
        If a configuration cannot work.
    """
    cells = [cell for table in tables for cell in table.cells]
    with TemporaryDirectory(prefix="fedstill-") as folder:
        file = Path(folder) / f"{paper.name.lower()}.toml"
        file.write_text(study_text(paper, cells, scale, seeds), encoding="utf-8")
        return Study.load(file)


def study_text(paper: Paper, cells: Sequence[Cell], scale: Scale, seeds: int) -> str:
    """Return the study file of some cells' runs."""
    small = scale == "small"
    settings = {cell.setting.name: cell.setting for cell in cells}
    methods = {cell.method.name: cell.method for cell in cells}
    title = f"{paper.name}, the runs behind the paper's tables{', small form' if small else ''}"
    lines = [f"title = {_value(title)}", f"preset = {_value(paper.preset_of(scale))}"]
    lines += [f"seeds = {_value(list(range(seeds)))}", "", "[keys]", *_keys(paper.keys)]
    for method in methods.values():
        keys = method.keys | method.small if small else method.keys
        lines += ["", "[[variant]]", f"name = {_value(method.name)}", "[variant.keys]", *_keys(keys)]
    for setting in settings.values():
        keys = setting.keys | paper.small.keys | setting.small if small else setting.keys
        only = dict.fromkeys(cell.method.name for cell in cells if cell.setting == setting)
        lines += ["", "[[setting]]", f"name = {_value(setting.name)}", f"only = {_value(list(only))}"]
        lines += ["[setting.keys]", *_keys(keys)]
    return "\n".join(lines) + "\n"


def configs_of(study: Study) -> dict[tuple[str, str], Config]:
    """Return setting and method -> the configuration of its first seed."""
    return {(cell.setting, cell.variant): cell.config for cell in reversed(study.cells)}


def _keys(keys: Keys) -> list[str]:
    return [f"{_value(key)} = {_value(value)}" for key, value in keys.items()]


def _value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # JSON's strings, numbers and lists are TOML's


# Data


def needs(configs: Iterable[Config]) -> list[str]:
    """Return the names of the data sets that runs read, private and public."""
    named = (name for config in configs for name in (config.data.name, config.public.name))
    return list(dict.fromkeys(name for name in named if name))


def missing_file(name: str) -> str | None:
    """Return where a data set's file should be, None where it is there or is not needed."""
    if name == EMBEDDED:
        return None
    root = os.environ.get(ROOT_VARIABLE)
    file = Path(root or f"${ROOT_VARIABLE}").expanduser() / file_of(name)
    return None if root and file.is_file() else str(file)


def why_not(config: Config) -> str | None:
    """Return what fedstill lacks for a run, whatever data are there; None where it lacks nothing."""
    known = [name for name, _ in list_datasets()]
    for name in needs([config]):
        if name not in known:
            return f"fedstill reads no data set {name!r}"
    unknown = [model.name for model in config.model if ":" not in model.name and model.name not in list_models()]
    return f"fedstill has no model {unknown[0]!r}" if unknown else None


# What there is


Found = Mapping[tuple[str, str], Sequence[SeedRun]]
"""Setting and method -> what there is of its seeds."""


def found_runs(study: Study, out: Path) -> Found:
    """Return what there is of a study's runs in a results folder, whatever its seeds.

    Raises
    ------
    InputError
        If a run's files are damaged, or it has another configuration than the study says: numbers of the small form
        never stand in the paper's place.
    """
    first = {(cell.setting, cell.variant): cell for cell in reversed(study.cells)}
    return {
        run: [_seed_run(cell.config, folder, seed) for seed, folder in _seeds(out / cell.directory.parent)]
        for run, cell in first.items()
    }


def _seeds(place: Path) -> list[tuple[int, Path]]:
    folders = {folder.name.removeprefix("seed-"): folder for folder in place.glob("seed-*")}
    return sorted((int(seed), folder) for seed, folder in folders.items() if seed.isdecimal())


def _seed_run(config: Config, folder: Path, seed: int) -> SeedRun:
    metrics = folder / METRICS
    run = read_run(folder) if metrics.exists() and b"\n" in metrics.read_bytes() else None
    wanted = config.model_copy(update={"seed": SeedSettings(data=seed, train=seed)})
    if run is not None and (key := difference(wanted, run.config)):
        raise InputError(f"{folder}: this run has {key}; name another folder with --out, or remove the directory")
    return found_in(folder, str(seed), run)
