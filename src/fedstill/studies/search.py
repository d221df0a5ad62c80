"""Values chosen on the server's validation part: the trials of a study's ``[search]``, suggested by Optuna.

A trial is the whole study with the trial's values in every run; its figure is the mean over these runs. The test set
is never measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from fedstill.errors import InputError
from fedstill.experiment import accuracies
from fedstill.runs.directory import write_json
from fedstill.runs.files import disk_errors
from fedstill.runs.metrics import read_metrics
from fedstill.studies.plan import Cell, Range, SearchTable, Study, dotted, ends_of
from fedstill.studies.results import in_words
from fedstill.studies.sweep import (
    Standing,
    check,
    listed_in,
    opened,
    pace_of,
    results_folder,
    run_cells,
    standing,
    write_index,
)

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

STORAGE, RESULT = "optuna.log", "search.json"
METRICS = {
    "last": "validation accuracy after the last round",
    "mean": "validation accuracy, mean over the evaluated rounds",
}


@dataclass(frozen=True)
class Trial:
    """A choice of values, and what it gave.

    Parameters
    ----------
    trial : int
    keys : dict
        Dotted key -> value.
    accuracy : float or None
        Mean over its runs; None where one failed.
    runs : tuple of str
        Their directories in the results folder.
    failed : str
        Why there is no accuracy.
    """

    trial: int
    keys: dict[str, Any]
    accuracy: float | None
    runs: tuple[str, ...]
    failed: str = ""


@dataclass(frozen=True)
class Found:
    """What a search gave.

    Parameters
    ----------
    out : Path
        The results folder.
    metric : str
        What the accuracies are.
    trials : tuple of Trial
        That have ended, in the order of choice.
    """

    out: Path
    metric: str
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The trial with the highest accuracy, the first of equals; None where all failed."""
        measured = [one for one in self.trials if one.accuracy is not None]
        return max(measured, key=lambda one: one.accuracy or 0.0, default=None)


def search(
    study: Study | Path | str,
    *overrides: str,
    out: Path | str | None = None,
    workers: int | None = None,
    console: Console | None = None,
) -> Found:
    """Run the trials of a study's ``[search]`` that it has not got yet.

    Parameters
    ----------
    study, *overrides, out, workers, console
        As :func:`fedstill.studies.sweep` has them.

    Returns
    -------
    Found
        Also written to ``search.json``, after every trial.

    Raises
    ------
    InputError
        Bad input, no validation part, no Optuna, or another search in ``out``; nothing has been run.
    RunError
        The disk is full; the finished runs are good.
    """
    study = Study.of(study, *overrides)
    table = ready(study)
    study = replace(study, overrides={**study.overrides, "eval.on": ["validation"]})
    study = replace(study, cells=study.planned(study.cells[0].point))
    folder = results_folder(study, out)
    listed_in(folder)
    check(study.cells)
    with opened(study, None, folder):
        trials = Trials(study, table, folder)
        while asked := trials.next():
            trials.run(asked, workers, console or Console(quiet=True))
    return trials.found()


def ready(study: Study) -> SearchTable:
    """Return a study's ``[search]`` after checking that it can be done."""
    table = study.table.search
    if table is None:
        raise InputError(f"{study.path}: it has no [search]")
    try:
        import optuna
    except ImportError as error:
        raise InputError(f"{study.path}: [search] needs Optuna: pip install fedstill[search]") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for cell in study.cells:
        if not cell.config.data.server_validation:
            raise InputError(f"{study.path}: [search] chooses on the validation part: set data.server_validation")
        if "validation" not in cell.config.eval.on:
            raise InputError(f"{study.path}: [search] chooses on the validation part: set eval.on = ['validation']")
    return table


def distributions(space: Mapping[str, Range | list[Any]]) -> dict[str, BaseDistribution]:
    """Return what Optuna draws from; a value of a list stands there as JSON."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, entry in space.items():
        if isinstance(entry, list):
            found[key] = CategoricalDistribution([json.dumps(value) for value in entry])
            continue
        low, high = ends_of(key, entry)
        if isinstance(low, int):
            found[key] = IntDistribution(low, int(high), log=entry.log)
        else:
            found[key] = FloatDistribution(low, high, log=entry.log)
    return found


class Trials:
    """The trials in Optuna's storage, and their runs.

    Where a space has no more points than trials are wanted, every point is tried once. Else the trial of number n is
    drawn with a sampler of the seed ``seed + n``, so that a search that was stopped goes on as if it had not been.
    """

    def __init__(self, study: Study, table: SearchTable, folder: Path) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.study, self.table, self.folder = study, table, folder
        self.distributions = distributions(table.space)
        with disk_errors(folder / STORAGE):
            storage = JournalStorage(JournalFileBackend(str(folder / STORAGE)))
            self.store = optuna.create_study(
                storage=storage, study_name="search", direction="maximize", load_if_exists=True
            )
            self._same_search()
            for choice in self._every_point():
                self.store.enqueue_trial(choice, skip_if_exists=True)
        self.total = max(len(self._asked()), 0 if self._every_point() else table.trials)

    def next(self) -> dict[int, dict[str, Any]]:
        """Return the trials to be run now, number -> values; what was stopped comes first, nothing at the end."""
        import optuna

        with disk_errors(self.folder / STORAGE):
            asked = {}
            for one in self.store.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
                if len(one.params) == len(self.table.space):
                    asked[one.number] = self._values(one.params)
                else:
                    self._give_up(one)
            left = self.total - len(self._ended())
            for _ in range(0 if asked else min(left, self.table.batch)):
                number = len(self._asked())
                self.store.sampler = optuna.samplers.TPESampler(seed=self.table.seed + number)
                trial = self.store.ask(self.distributions)
                asked[trial.number] = self._values(trial.params)
            return asked

    def run(self, asked: Mapping[int, dict[str, Any]], workers: int | None, console: Console) -> None:
        """Run what the trials have not got yet, tell Optuna what they gave, and write all that is known."""
        due: dict[Path, Standing] = {}
        for values in asked.values():
            for cell in self._cells(values):
                due[cell.directory] = standing(cell, self.folder)
        write_index(self.study, self._planned(asked), self.folder)
        todo = [one for one in due.values() if one.state in ("new", "interrupted")]
        numbers = ", ".join(str(number) for number in asked)
        title = f"trial {numbers}, {len(self._ended())} of {self.total} done"
        run_cells(todo, self.folder, workers, console, pace_of(list(due.values())), title)
        self._tell(asked)
        self._write()

    def _tell(self, asked: Mapping[int, dict[str, Any]]) -> None:
        import optuna

        for number, values in asked.items():
            ended = self._trial(number, values)
            with disk_errors(self.folder / STORAGE):
                if ended.accuracy is None:
                    self.store.tell(number, state=optuna.trial.TrialState.FAIL)
                else:
                    self.store.tell(number, ended.accuracy)

    def _write(self) -> None:
        found = self.found()
        best = found.best
        write_json(
            self.folder / RESULT,
            {
                "title": self.study.title,
                "metric": found.metric,
                "trials": [asdict(one) for one in found.trials],
                "best": asdict(best) if best else None,
            },
        )

    def found(self) -> Found:
        """Return the trials that have ended."""
        trials = [self._trial(one.number, self._values(one.params)) for one in self._ended()]
        return Found(self.folder, METRICS[self.table.metric], tuple(trials))

    def _trial(self, number: int, values: dict[str, Any]) -> Trial:
        try:
            cells = self.study.planned(values)
        except InputError as error:
            return Trial(number, values, None, (), str(error))
        runs = tuple(cell.directory.as_posix() for cell in cells)
        reached = [standing(cell, self.folder) for cell in cells]
        if failed := [one for one in reached if one.state != "finished"]:
            return Trial(number, values, None, runs, failed[0].reason or "it has no result")
        figures = [self._figure(cell) for cell in cells]
        return Trial(number, values, sum(figures) / len(figures), runs)

    def _figure(self, cell: Cell) -> float:
        measured = list(accuracies(read_metrics(self.folder / cell.directory), "validation").values())
        return measured[-1] if self.table.metric == "last" else sum(measured) / len(measured)

    def _cells(self, values: dict[str, Any]) -> Sequence[Cell]:
        try:
            return self.study.planned(values)
        except InputError:
            return ()  # these values do not go together; the trial says so when it ends

    def _planned(self, asked: Mapping[int, dict[str, Any]]) -> list[Cell]:
        """Return the runs of all trials so far, once each."""
        every = [*(self._values(one.params) for one in self._ended()), *asked.values()]
        return list({cell.directory: cell for values in every for cell in self._cells(values)}.values())

    def _values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        space = self.table.space
        return {
            key: json.loads(params[key]) if isinstance(space[key], list) else params[key]
            for key in space
            if key in params
        }

    def _give_up(self, one: optuna.trial.FrozenTrial) -> None:
        """End a trial that was stopped while its values were drawn, so that it counts as never asked for."""
        import optuna

        if point := one.system_attrs.get("fixed_params"):
            self.store.enqueue_trial(point)
        self.store.tell(one.number, state=optuna.trial.TrialState.FAIL)

    def _asked(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials, but for those that were given up."""
        trials, whole = self.store.get_trials(deepcopy=False), len(self.table.space)
        return [one for one in trials if not one.state.is_finished() or len(one.params) == whole]

    def _ended(self) -> list[optuna.trial.FrozenTrial]:
        return [one for one in self._asked() if one.state.is_finished()]

    def _every_point(self) -> list[dict[str, str]]:
        """Return every point of the space as Optuna knows it, where there are no more than trials; else nothing."""
        lists = {key: entry for key, entry in self.table.space.items() if isinstance(entry, list)}
        if len(lists) < len(self.table.space) or prod(map(len, lists.values())) > self.table.trials:
            return []
        texts = [[json.dumps(value) for value in entry] for entry in lists.values()]
        return [dict(zip(lists, choice, strict=True)) for choice in product(*texts)]

    def _same_search(self) -> None:
        """Refuse to go on with a search that was begun with other keys than the study has now."""
        table = self.study.table.model_dump(mode="json", exclude={"title": True, "search": {"trials", "batch"}})
        bases = {place.name: place.base for place in self.study.places}
        now = json.loads(json.dumps(dotted({"study": table, "base": bases, "override": self.study.overrides})))
        before = self.store.user_attrs.get("study", now)
        if changed := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
            raise InputError(
                f"{self.folder}: this search was begun with another {changed[0].partition('.')[2]}; "
                f"name another folder with --out"
            )
        self.store.set_user_attr("study", now)


def table_of(found: Found) -> Table:
    """Return the trials as a table, the best first."""
    table = Table(title=found.metric)
    table.add_column("trial", justify="right")
    table.add_column("values")
    table.add_column("accuracy", justify="right")
    for one in sorted(found.trials, key=lambda one: -(one.accuracy if one.accuracy is not None else -1.0)):
        accuracy = "failed" if one.accuracy is None else f"{one.accuracy:.2%}"
        table.add_row(str(one.trial), in_words("", one.keys), accuracy)
    return table
