"""The runs of a study, several at a time in processes: what is finished is skipped, what was stopped goes on.

A run that fails leaves ``failed.txt`` in its directory and does not stop the others. Results do not depend on how many
processes there are.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from fedstill.build import data_of, fitted
from fedstill.config import Config, flat
from fedstill.errors import FedstillError, InputError, RunError
from fedstill.execution.choices import resolve
from fedstill.experiment import resume, run
from fedstill.methods.registry import compose
from fedstill.pool import Failure, outcomes
from fedstill.progress import Reporter, Tell, seconds_spent
from fedstill.runs.checkpoint import manifests, round_of
from fedstill.runs.directory import BEGUN, START, RunDirectory, began, lock, running, write_json
from fedstill.runs.files import disk_errors, write_atomically
from fedstill.runs.metrics import metrics_up_to
from fedstill.studies.display import Pace, StudyDisplay
from fedstill.studies.plan import COPY, Cell, Study, copy_of
from fedstill.studies.results import FAILED, INDEX, failure, gives_the_same

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""What a disk says that no other run could write to either."""

State = Literal["finished", "interrupted", "failed", "new", "running"]


@dataclass(frozen=True)
class Standing:
    """How far a run of a study is.

    Parameters
    ----------
    cell : Cell
    state : {"finished", "interrupted", "failed", "new", "running"}
        Running are those that another process is at.
    rounds : int
        Whole rounds in its metrics.
    seconds : float
        That they took.
    reason : str
        Why it failed.
    """

    cell: Cell
    state: State
    rounds: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Parameters
    ----------
    out : Path
        The results folder.
    done : tuple of Cell
        Finished by this sweep.
    before : tuple of Cell
        Finished before.
    failed : tuple of (Cell, str)
        Those that failed, in this sweep or before, and why.
    """

    out: Path
    done: tuple[Cell, ...]
    before: tuple[Cell, ...]
    failed: tuple[tuple[Cell, str], ...]


class DiskError(RunError):
    """The disk refuses to be written to: no run can go on."""


def sweep(
    study: Study | Path | str,
    *overrides: str,
    out: Path | str | None = None,
    workers: int | None = None,
    retry_failed: bool = False,
    only: Sequence[str] = (),
    console: Console | None = None,
) -> Outcome:
    """Run what a study has not got yet.

    Parameters
    ----------
    study : Study or path
    *overrides : str
        Such as ``"train.rounds=3"``, for all runs; not with a ready :class:`Study`.
    out : path, optional
        Results folder; by default ``runs/<name of the file>``, or the file's own folder where the file is the copy in
        a results folder.
    workers : int, optional
        Runs at a time; by default one per core. Never more than there are runs.
    retry_failed : bool
        Run again what failed in an earlier sweep.
    only : sequence of str
        Only runs whose directory or label holds every one of these words.
    console : Console, optional
        Where progress is shown; by default nowhere.

    Raises
    ------
    InputError
        Bad input, or results of another study in ``out``; nothing has been run.
    RunError
        The disk is full; the finished runs are good.
    """
    study = Study.of(study, *overrides)
    folder = results_folder(study, out)
    todo, others = chosen(survey(study, folder), retry_failed, only)
    check([one.cell for one in todo])
    with opened(study, study.cells, folder):
        failed = run_cells(todo, folder, workers, console or Console(quiet=True), pace_of([*todo, *others]))
    return Outcome(
        folder,
        tuple(one.cell for place, one in enumerate(todo) if place not in failed),
        tuple(one.cell for one in others if one.state == "finished"),
        (
            *((one.cell, one.reason) for one in others if one.state == "failed"),
            *((todo[place].cell, reason) for place, reason in sorted(failed.items())),
        ),
    )


def results_folder(study: Study, out: Path | str | None = None) -> Path:
    """Return where a study's results go."""
    if out is not None:
        return Path(out)
    beside = study.path.parent
    return beside if study.path.name == COPY and (beside / INDEX).exists() else Path("runs") / study.path.stem


# What there is


def survey(study: Study, folder: Path, looking: bool = False) -> list[Standing]:
    """Return how far every run of a study is; nothing is written.

    Raises
    ------
    InputError
        If ``folder`` holds something else, or a run in it has another configuration than the study says, or, unless one
        is only ``looking``, another process runs one.
    """
    if study.table.search:
        raise InputError(f"{study.path}: it has a [search], so that fedstill.studies.search runs it")
    listed = listed_in(folder)
    if listed and not listed & {cell.directory.as_posix() for cell in study.cells}:
        raise InputError(f"{folder}: holds the results of another study; name another folder with --out")
    return [standing(cell, folder, looking) for cell in study.cells]


def listed_in(folder: Path) -> set[str]:
    """Return the directories of the runs that a results folder lists, none for a new one.

    Raises
    ------
    InputError
        If it holds something else than a study.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a folder with --out")
    index = folder / INDEX
    if index.exists():
        try:
            return {str(cell["directory"]) for cell in json.loads(index.read_text())["cells"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{index}: damaged; remove it, and the sweep writes it again") from error
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if any(not name.startswith((COPY, INDEX, "lock", "optuna.log")) for name in names):  # or a part of one
        raise InputError(f"{folder}: exists already and holds no study; name another folder with --out")
    return set()


def standing(cell: Cell, folder: Path, looking: bool = False) -> Standing:
    """Return how far a run is; one whose metrics are damaged has failed.

    Raises
    ------
    InputError
        If its directory holds a run with another configuration, or, unless one is only ``looking``, one that another
        process runs.
    """
    path = folder / cell.directory
    reason = failure(path)
    if not began(path):
        return Standing(cell, "new" if reason is None else "failed", reason=reason or "")
    if key := difference(cell.config, RunDirectory.read_config(path)):
        raise InputError(
            f"{path}: this run has {key}; name another folder with --out, or remove the directory to run it anew"
        )
    saved = manifests(path)  # before the metrics, which a run that is under way writes first
    try:
        records = metrics_up_to(path, round_of(saved[-1]) if saved else 0)
    except InputError as error:
        return Standing(cell, "failed", reason=f"{error}; or remove {path}, and a sweep runs it anew")
    if len(records) >= cell.config.train.rounds:
        return Standing(cell, "finished", len(records), seconds_spent(records))
    state: State = "interrupted" if reason is None else "failed"
    if running(path):
        if not looking:
            raise InputError(f"{path}: another process is running it")
        state = "running"
    return Standing(cell, state, len(records), seconds_spent(records), reason or "")


def difference(wanted: Config, found: Config) -> str | None:
    """Return the first key by which two configurations give different results, with both values; None for none."""
    mine, theirs = flat(wanted), flat(found)
    made = {"local.steps"} if wanted.scaffold.steps == "fixed" and wanted.local.steps is None else set()
    for key in dict.fromkeys([*mine, *theirs]):
        if mine.get(key) != theirs.get(key) and key not in made and not gives_the_same(key):
            return f"{key} = {json.dumps(theirs.get(key))}, and the study says {json.dumps(mine.get(key))}"
    return None


def chosen(
    standings: Sequence[Standing], retry_failed: bool, only: Sequence[str]
) -> tuple[list[Standing], list[Standing]]:
    """Return what is to be run, and the others that ``only`` asks for."""
    words = [word.lower() for word in only]
    asked = [
        one
        for one in standings
        if all(word in one.cell.directory.as_posix() or word in one.cell.label.lower() for word in words)
    ]
    if not asked:
        example = standings[0].cell
        raise InputError(
            f"--only {' '.join(only)}: no run has all of this in its label or its directory, such as "
            f"{example.label!r} in {example.directory}"
        )
    due = {"new", "interrupted"} | ({"failed"} if retry_failed else set())
    return [one for one in asked if one.state in due], [one for one in asked if one.state not in due]


def pace_of(standings: Sequence[Standing]) -> Pace:
    """Return what the runs so far took."""
    pace = Pace()
    for one in standings:
        pace.add(one.cell.kind, one.seconds, one.rounds)
    return pace


def check(cells: Sequence[Cell]) -> None:
    """Refuse what could not be built, with one seed of each kind of run; data are read once for all that share them."""
    kinds: dict[str, Cell] = {}
    for cell in cells:
        kinds.setdefault(cell.kind, cell)
    by_data: dict[str, list[Cell]] = {}
    for cell in kinds.values():
        config = cell.config
        same = f"{config.data.model_dump_json()} {config.public.model_dump_json()} {config.seed.data}"
        by_data.setdefault(same, []).append(cell)
    for own in by_data.values():
        try:
            cell = own[0]
            data = data_of(cell.config)
            for cell in own:
                fitted(resolve(cell.config), compose(cell.config), data)
        except InputError as error:
            raise InputError(f"{cell.label}: {error}") from error


# Running


@contextmanager
def opened(study: Study, cells: Sequence[Cell] | None, folder: Path) -> Iterator[None]:
    """Keep a results folder to oneself, with the study file, what it names, and the list of its runs.

    None leaves the list.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be made ({error.strerror or error})") from error
    with full_disk_ends_all(), closing(lock(folder)):
        write_atomically(folder / COPY, study.text.encode())
        for config, text in study.configs.items():
            write_atomically(folder / copy_of(config), text.encode())
        if cells is not None:
            write_index(study, cells, folder)
        yield


def write_index(study: Study, cells: Sequence[Cell], folder: Path) -> None:
    """Write the list of a study's runs."""
    write_json(folder / INDEX, {"title": study.title, "cells": [cell.record() for cell in cells]})


def run_cells(
    todo: Sequence[Standing],
    folder: Path,
    workers: int | None,
    console: Console,
    pace: Pace,
    title: str = "runs",
) -> dict[int, str]:
    """Run cells in processes, and return position -> why it failed.

    Raises
    ------
    RunError
        If the disk is full.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers = {workers}: at least 1 is needed")
    if not todo:
        return {}
    at_a_time = min(workers or os.cpu_count() or 1, len(todo))
    cells = [one.cell for one in todo]
    jobs = [RunJob(in_one_process(cell.config, at_a_time), folder / cell.directory) for cell in cells]
    failed: dict[int, str] = {}
    display = StudyDisplay(console, cells, [one.rounds for one in todo], pace, at_a_time, title)
    with display, closing(outcomes(jobs, at_a_time, display.heard)) as ended:
        for position, outcome in ended:
            if isinstance(outcome, Failure):
                failed[position] = left_in(jobs[position].directory, outcome.error)
            display.ended(position, failed.get(position))
    return failed


def in_one_process(config: Config, at_a_time: int) -> Config:
    """Return the configuration that trains one client at a time where several runs share the processor.

    ``serial`` gives the same bits as the ``threads`` or ``processes`` that ``auto`` would be, so that results do not
    depend on it.
    """
    if at_a_time == 1 or config.execution.executor != "auto" or resolve(config).execution.executor != "threads":
        return config
    return config.model_copy(update={"execution": config.execution.model_copy(update={"executor": "serial"})})


@dataclass(frozen=True)
class RunJob:
    """A run, from the start or from where it was stopped."""

    config: Config
    directory: Path

    def __call__(self, tell: Tell) -> None:
        """Run it."""
        with full_disk_ends_all():
            if began(self.directory):
                removed(self.directory / FAILED)
                resume(self.directory, [Reporter(tell)])
            else:
                cleared(self.directory)
                run(self.config, directory=self.directory, callbacks=[Reporter(tell)])


def cleared(directory: Path) -> None:
    """Remove the directory of a run that never began; one that holds anything else stays, and the run is refused."""
    if not directory.is_dir() or running(directory):
        return
    for file in (FAILED, *START):
        removed(directory / f"{file}.partial")
        if file != BEGUN:
            removed(directory / file)
    with suppress(OSError):
        directory.rmdir()


def removed(file: Path) -> None:
    """Remove a file, where it is there."""
    with disk_errors(file):
        file.unlink(missing_ok=True)


def left_in(directory: Path, error: Exception) -> str:
    """Write why a run failed into its directory, and return it in one line; a full disk goes up."""
    if isinstance(error, DiskError):
        raise error
    text = str(error).strip() or type(error).__name__
    told = " ".join(text.split()) if isinstance(error, FedstillError) else text.splitlines()[-1]
    try:
        with full_disk_ends_all():
            write_atomically(directory / FAILED, f"{text}\n".encode())
    except DiskError:
        raise
    except RunError as unwritten:
        return f"{told}; {unwritten}"
    return told


@contextmanager
def full_disk_ends_all() -> Iterator[None]:
    """Turn what a disk refuses into a DiskError."""
    try:
        yield
    except DiskError:
        raise
    except FedstillError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            what = str(error).partition(";")[0]
            raise DiskError(
                f"{what}; the runs that have finished are good: make room and give the same command again"
            ) from error
        raise
