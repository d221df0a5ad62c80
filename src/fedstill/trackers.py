"""Trackers: callbacks that log a run to MLflow or to Weights & Biases; the packages are optional.

Both get the configuration, and after every round the numbers of its metrics line under the names that TensorBoard
has. A resumed run goes on in the same run of the service: ``tracking/mlflow.json`` in the run directory says which
that is, and up to which round it has been told.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fedstill.callbacks import Callback, RunInfo, StopRun
from fedstill.config import TrackingSettings, flat
from fedstill.errors import InputError
from fedstill.evaluation import Record
from fedstill.runs.directory import write_json
from fedstill.runs.metrics import flatten

PROJECT = "fedstill"


@dataclass
class Ledger:
    """What a service has been told of a run.

    Parameters
    ----------
    file : Path or None
        Where it is kept; None for a run without a directory.
    id : str or None
        The service's name for the run; None before there is one.
    round : int
        The last round that was logged.
    """

    file: Path | None
    id: str | None = None
    round: int = 0

    @staticmethod
    def of(run: RunInfo, service: str) -> Ledger:
        """Read a run's ledger, or begin one."""
        if run.directory is None:
            return Ledger(None)
        file = run.directory / "tracking" / f"{service}.json"
        if not file.exists():
            return Ledger(file)
        try:
            stored = json.loads(file.read_text())
            return Ledger(file, str(stored["id"]), int(stored["round"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file}: damaged; remove it to begin a new {service} run") from error

    def write(self) -> None:
        """Keep it."""
        if self.file is not None:
            write_json(self.file, {"id": self.id, "round": self.round})


class MLflowTracker(Callback):
    """Logs to MLflow, wherever its environment variables say (``MLFLOW_TRACKING_URI``).

    Parameters
    ----------
    project : str, optional
        The experiment; by default ``MLFLOW_EXPERIMENT_NAME``, else ``fedstill``.

    Raises
    ------
    InputError
        If MLflow is not installed.
    """

    def __init__(self, project: str | None = None) -> None:
        self.project = project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        self._mlflow = _package("mlflow")
        self._client: Any = None
        self._ledger = Ledger(None)

    def on_run_start(self, run: RunInfo) -> None:
        """Begin a run, or go on with the one of before, and log the rounds it has not been told of."""
        self._client = self._mlflow.MlflowClient()
        self._ledger = Ledger.of(run, "mlflow")
        if self._ledger.id is None:
            self._begin(run)
        else:
            self._client.update_run(self._ledger.id, status="RUNNING")
        for record in run.records:
            self._log(record)

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        """Log a round."""
        self._log(record)

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """Say how it ended."""
        ended = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        self._client.set_terminated(self._ledger.id, status="FINISHED" if _went_well(error) else ended)

    def _begin(self, run: RunInfo) -> None:
        self._ledger.id = self._client.create_run(self._experiment(), run_name=_title(run)).info.run_id
        self._ledger.write()
        keys = [
            self._mlflow.entities.Param(key, str(value))
            for key, value in flat(run.federation.config).items()
            if value is not None
        ]
        for first in range(0, len(keys), 100):  # a server takes no more at a time
            self._client.log_batch(self._ledger.id, params=keys[first : first + 100])

    def _experiment(self) -> str:
        found = self._client.get_experiment_by_name(self.project)
        if found is None:
            try:
                return str(self._client.create_experiment(self.project))
            except self._mlflow.MlflowException:
                found = self._client.get_experiment_by_name(self.project)
                if found is None:
                    raise  # and not because another process has just made it
        return str(found.experiment_id)

    def _log(self, record: Record) -> None:
        step = int(record["round"])
        if step <= self._ledger.round:
            return
        now = int(time.time() * 1000)
        metrics = [self._mlflow.entities.Metric(name, value, now, step) for name, value in flatten(record)]
        self._client.log_batch(self._ledger.id, metrics=metrics)
        self._ledger.round = step
        self._ledger.write()


class WandbTracker(Callback):
    """Logs to Weights & Biases, as its environment variables say (``WANDB_MODE=offline``, ``WANDB_ENTITY``).

    Its local files go into the run directory, where there is one.

    Parameters
    ----------
    project : str, optional
        By default ``WANDB_PROJECT``, else ``fedstill``.

    Raises
    ------
    InputError
        If Weights & Biases is not installed.
    """

    def __init__(self, project: str | None = None) -> None:
        self.project = project or os.environ.get("WANDB_PROJECT") or PROJECT
        self._wandb = _package("wandb")
        self._run: Any = None
        self._ledger = Ledger(None)

    def on_run_start(self, run: RunInfo) -> None:
        """Begin a run, or go on with the one of before, and log the rounds it has not been told of."""
        self._ledger = Ledger.of(run, "wandb")
        self._run = self._wandb.init(
            project=self.project,
            id=self._ledger.id,
            resume="allow",
            name=_title(run),
            dir=run.directory,
            config=run.federation.config.model_dump(mode="json"),
            allow_val_change=True,
            settings=self._wandb.Settings(console="off"),  # it would take the terminal from the progress display
        )
        self._ledger.id = self._run.id
        self._ledger.write()
        self._run.define_metric("*", step_metric="round")
        for record in run.records:
            self._log(record)

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        """Log a round."""
        self._log(record)

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """Say how it ended, and wait until everything is written."""
        self._run.finish(exit_code=0 if _went_well(error) else 1)

    def _log(self, record: Record) -> None:
        step = int(record["round"])
        if step <= self._ledger.round:
            return
        self._run.log({**dict(flatten(record)), "round": step})
        self._ledger.round = step
        self._ledger.write()


TRACKERS: dict[str, type[MLflowTracker] | type[WandbTracker]] = {"mlflow": MLflowTracker, "wandb": WandbTracker}


def trackers_of(settings: TrackingSettings, given: Sequence[object]) -> list[Callback]:
    """Return the trackers that a configuration asks for, and that are not among the callbacks ``given``.

    Raises
    ------
    InputError
        If a package is not installed.
    """
    kinds = [TRACKERS[name] for name in dict.fromkeys(settings.to)]
    return [kind(settings.project) for kind in kinds if not any(isinstance(one, kind) for one in given)]


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(f"tracking with {name} needs a package: pip install 'fedstill[{name}]'") from error


def _title(run: RunInfo) -> str:
    return run.federation.config.method if run.directory is None else str(run.directory)


def _went_well(error: BaseException | None) -> bool:
    return error is None or isinstance(error, StopRun)
