"""Trackers: what MLflow and Weights & Biases are told, over a resume too.

The packages are large, so the tests run against stand-ins that keep what they are told and take the arguments that
the real functions take. Where a package is installed, the same tests run against it as well, without a network.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fedstill
from fedstill import Callback, InputError, MLflowTracker, RunError, RunInfo, StopRun, WandbTracker, cli
from fedstill.config import config_from, to_toml
from fedstill.evaluation import Record
from fedstill.runs import read_metrics
from small import SMALL, same_weights, small

FOUR = ("method=fedavg+fedftg", "train.rounds=4", "data.clients=2")


class Metric(NamedTuple):
    key: str
    value: float
    timestamp: int
    step: int


class Param(NamedTuple):
    key: str
    value: str


class MlflowException(Exception):
    pass


@dataclass
class Stored:
    """A run in the stand-in for an MLflow server."""

    experiment: str
    name: str | None
    statuses: list[str]
    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)


class MlflowClient:
    experiments: dict[str, str]
    runs: dict[str, Stored]

    def __init__(self, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        pass

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str, artifact_location: str | None = None, tags: Any = None) -> str:
        if name in self.experiments:
            raise MlflowException(f"{name} exists")
        return self.experiments.setdefault(name, str(len(self.experiments)))

    def create_run(
        self, experiment_id: str, start_time: int | None = None, tags: Any = None, run_name: str | None = None
    ) -> Any:
        assert experiment_id in self.experiments.values()
        run = f"run-{len(self.runs)}"
        self.runs[run] = Stored(experiment_id, run_name, ["RUNNING"])
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[Any] = (),
        synchronous: bool | None = None,
    ) -> None:
        assert len(metrics) <= 1000
        assert len(params) <= 100
        own = self.runs[run_id]
        own.metrics += metrics
        for key, value in params:
            if own.params.setdefault(key, value) != value:
                raise MlflowException(f"changing {key} is not allowed")

    def update_run(self, run_id: str, status: str | None = None, name: str | None = None) -> None:
        if run_id not in self.runs:
            raise MlflowException(f"Run with id={run_id} not found")
        assert status is not None
        self.runs[run_id].statuses.append(status)

    def set_terminated(self, run_id: str, status: str | None = None, end_time: int | None = None) -> None:
        self.update_run(run_id, status or "FINISHED")


def fake_mlflow() -> ModuleType:
    module: Any = ModuleType("mlflow")
    module.MlflowClient = type("MlflowClient", (MlflowClient,), {"experiments": {}, "runs": {}})
    module.MlflowException = MlflowException
    module.entities = SimpleNamespace(Metric=Metric, Param=Param)
    return module  # type: ignore[no-any-return]


class FakeRun:
    """A run of the stand-in for Weights & Biases."""

    def __init__(self, id: str, given: dict[str, Any]) -> None:
        self.id, self.given = id, given
        self.logged: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str | None]] = []
        self.ended: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append((name, step_metric))

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert self.ended is None
        self.logged.append(data)

    def finish(self, exit_code: int | None = None) -> None:
        self.ended = exit_code


def fake_wandb() -> ModuleType:
    module: Any = ModuleType("wandb")
    module.sessions = []

    def init(
        *,
        project: str,
        id: str | None,
        resume: str,
        name: str,
        dir: Path | None,
        config: dict[str, Any],
        allow_val_change: bool,
        settings: Any,
    ) -> FakeRun:
        assert resume == "allow"
        assert allow_val_change
        assert settings.console == "off"
        given = {"project": project, "name": name, "dir": dir, "config": config}
        module.sessions.append(FakeRun(id or f"id{len(module.sessions)}", given))
        return module.sessions[-1]  # type: ignore[no-any-return]

    module.init = init
    module.Settings = SimpleNamespace
    return module  # type: ignore[no-any-return]


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return MLflow's stand-in, in its place."""
    module = fake_mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return module


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the stand-in for Weights & Biases, in its place."""
    module = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def tensorboard(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return name -> (round, value) as TensorBoard shows them."""
    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def by_name(points: Sequence[tuple[str, int, float]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for name, round, value in points:
        found.setdefault(name, []).append((round, value))
    return found


def same_curves(one: dict[str, list[tuple[int, float]]], other: dict[str, list[tuple[int, float]]]) -> bool:
    """Say whether two have the same names, rounds and values; TensorBoard keeps single precision."""
    return one.keys() == other.keys() and all(
        [round for round, _ in points] == [round for round, _ in other[name]]
        and [value for _, value in points] == pytest.approx([value for _, value in other[name]])
        for name, points in one.items()
    )


class Break(Callback):
    """Raises something after a round."""

    def __init__(self, after: int, failure: BaseException) -> None:
        self.after, self.failure = after, failure

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        if round == self.after:
            raise self.failure


def broken(path: Path, after: int, *keys: str) -> None:
    """Run until Ctrl-C is pressed after a round."""
    with pytest.raises(KeyboardInterrupt):
        fedstill.run(small(*FOUR, *keys), directory=path, callbacks=[Break(after, KeyboardInterrupt())])


# The stand-ins


def test_mlflow_is_told_what_tensorboard_is_told(tmp_path: Path, mlflow: Any) -> None:
    path = tmp_path / "run"
    result = fedstill.run(small(*FOUR, 'tracking.to=["mlflow"]'), directory=path)
    client = mlflow.MlflowClient
    assert client.experiments == {"fedstill": "0"}
    (run,) = client.runs.values()
    assert (run.experiment, run.name, run.statuses) == ("0", str(path), ["RUNNING", "FINISHED"])
    told = by_name([(metric.key, metric.step, metric.value) for metric in run.metrics])
    assert same_curves(told, tensorboard(path))
    assert told["refined/test/accuracy"] == list(result.accuracies().items())
    # By hand, from a line of the metrics file.
    third = read_metrics(path)[2]
    assert told["seconds/train"][2] == (3, third["seconds"]["train"])
    assert told["bytes/up/weights"][2] == (3, third["bytes"]["up"]["weights"])
    assert told["refinement/fedftg/student_loss"][2] == (3, third["refinement"]["fedftg"]["student_loss"])
    assert run.params["data.clients"] == "2"
    assert run.params["model.name"] == "mlp"
    assert run.params["method"] == "fedavg+fedftg"
    assert "data.root" not in run.params


def test_wandb_is_told_what_tensorboard_is_told(tmp_path: Path, wandb: Any) -> None:
    path = tmp_path / "run"
    result = fedstill.run(small(*FOUR, 'tracking.to=["wandb"]', "tracking.project=mine"), directory=path)
    (session,) = wandb.sessions
    assert session.given == {
        "project": "mine",
        "name": str(path),
        "dir": path,
        "config": result.config.model_dump(mode="json"),
    }
    assert session.defined == [("*", "round")]
    assert session.ended == 0
    points = [(name, one["round"], value) for one in session.logged for name, value in one.items() if name != "round"]
    assert same_curves(by_name(points), tensorboard(path))
    assert [one["refined/test/accuracy"] for one in session.logged] == list(result.accuracies().values())


def test_a_resumed_run_goes_on_in_the_same_runs(tmp_path: Path, mlflow: Any, wandb: Any) -> None:
    path = tmp_path / "run"
    broken(path, 2, 'tracking.to=["mlflow", "wandb"]')
    (run,) = mlflow.MlflowClient.runs.values()
    assert run.statuses == ["RUNNING", "KILLED"]
    assert wandb.sessions[0].ended == 1
    assert json.loads((path / "tracking" / "mlflow.json").read_text()) == {"id": "run-0", "round": 2}
    resumed = fedstill.resume(path)
    assert list(mlflow.MlflowClient.runs) == ["run-0"]
    assert run.statuses == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]
    assert [metric.step for metric in run.metrics if metric.key == "train_loss"] == [1, 2, 3, 4]
    assert [session.id for session in wandb.sessions] == ["id0", "id0"]
    assert [[one["round"] for one in session.logged] for session in wandb.sessions] == [[1, 2], [3, 4]]
    assert same_weights(resumed.weights, fedstill.run(small(*FOUR)).weights)


def test_a_round_that_is_done_again_is_not_told_twice_and_one_that_was_missed_is_told(
    tmp_path: Path, mlflow: Any
) -> None:
    path, told = tmp_path / "run", tmp_path / "run" / "tracking" / "mlflow.json"
    broken(path, 3, 'tracking.to=["mlflow"]')
    # As after a crash: the checkpoint of round 3 is not there, then round 2 was not told.
    (path / "checkpoints" / "round-00003.json").unlink()
    fedstill.resume(path)
    (run,) = mlflow.MlflowClient.runs.values()
    losses = [metric for metric in run.metrics if metric.key == "train_loss"]
    assert [metric.step for metric in losses] == [1, 2, 3, 4]
    told.write_text(json.dumps({"id": "run-0", "round": 1}))
    run.metrics.clear()
    fedstill.resume(path)
    assert [metric.step for metric in run.metrics if metric.key == "train_loss"] == [2, 3, 4]


def test_a_finished_run_can_be_told_afterwards(tmp_path: Path, wandb: Any) -> None:
    path = tmp_path / "run"
    fedstill.run(small(*FOUR), directory=path)
    fedstill.resume(path, callbacks=[WandbTracker(project="later")])
    assert wandb.sessions[0].given["project"] == "later"
    assert [one["round"] for one in wandb.sessions[0].logged] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [(StopRun("enough"), "FINISHED", 0), (ValueError("no"), "FAILED", 1), (KeyboardInterrupt(), "KILLED", 1)],
)
def test_services_hear_how_a_run_ended(
    failure: BaseException, status: str, code: int, mlflow: Any, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    monkeypatch.setenv("WANDB_PROJECT", "theirs, too")
    callbacks = [MLflowTracker(), WandbTracker(), Break(1, failure)]
    if isinstance(failure, StopRun):
        fedstill.run(small(), callbacks=callbacks)
    else:
        with pytest.raises((RunError, KeyboardInterrupt)):
            fedstill.run(small(), callbacks=callbacks)
    (run,) = mlflow.MlflowClient.runs.values()
    assert (run.name, run.statuses[-1]) == ("fedavg", status)
    assert [metric.step for metric in run.metrics if metric.key == "train_loss"] == [1]
    assert list(mlflow.MlflowClient.experiments) == ["theirs"]
    assert (wandb.sessions[0].ended, wandb.sessions[0].given["project"]) == (code, "theirs, too")
    assert wandb.sessions[0].given["dir"] is None


def test_an_experiment_that_another_process_makes_meanwhile_is_taken(
    mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = mlflow.MlflowClient.create_experiment

    def late(self: Any, name: str) -> str:
        make(self, name)
        raise MlflowException("exists")

    monkeypatch.setattr(mlflow.MlflowClient, "create_experiment", late)
    fedstill.run(small("train.rounds=1"), callbacks=[MLflowTracker()])
    assert [run.experiment for run in mlflow.MlflowClient.runs.values()] == ["0"]

    def refused(self: Any, name: str) -> str:
        raise MlflowException("not allowed")

    monkeypatch.setattr(mlflow.MlflowClient, "create_experiment", refused)
    with pytest.raises(RunError, match="MLflowTracker failed in on_run_start: MlflowException: not allowed"):
        fedstill.run(small("train.rounds=1"), callbacks=[MLflowTracker(project="other")])


def test_a_run_that_the_service_does_not_know_any_more(tmp_path: Path, mlflow: Any) -> None:
    path = tmp_path / "run"
    broken(path, 2, 'tracking.to=["mlflow"]')
    mlflow.MlflowClient.runs.clear()
    with pytest.raises(RunError, match=r"MLflowTracker failed in on_run_start: .* Run with id=run-0 not found"):
        fedstill.resume(path)
    (path / "tracking" / "mlflow.json").write_text("{")
    with pytest.raises(RunError, match=r"mlflow.json: damaged; remove it to begin a new mlflow run"):
        fedstill.resume(path)
    (path / "tracking" / "mlflow.json").unlink()
    fedstill.resume(path)
    (run,) = mlflow.MlflowClient.runs.values()
    assert [metric.step for metric in run.metrics if metric.key == "train_loss"] == [1, 2, 3, 4]


# The configuration and the command line


def test_tracking_does_not_change_what_a_run_is(tmp_path: Path, mlflow: Any) -> None:
    path = tmp_path / "run"
    broken(path, 2)
    given = to_toml(small(*FOUR, 'tracking.to=["mlflow"]', "tracking.project=mine"))
    (path / "config.toml").write_text(given)
    resumed = fedstill.resume(path)
    assert same_weights(resumed.weights, fedstill.run(small(*FOUR)).weights)
    assert list(mlflow.MlflowClient.experiments) == ["mine"]


def test_a_tracker_of_ones_own_takes_the_place_of_the_configurations(mlflow: Any) -> None:
    fedstill.run(small('tracking.to=["mlflow", "mlflow"]'), callbacks=[MLflowTracker(project="mine")])
    assert list(mlflow.MlflowClient.experiments) == ["mine"]
    assert len(mlflow.MlflowClient.runs) == 1


def test_the_command_tracks(tmp_path: Path, mlflow: Any, wandb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, path = tmp_path / "mine.toml", tmp_path / "run"
    file.write_text(to_toml(small()))
    options = ["--track", "mlflow", "--track", "wandb", "--quiet", "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["fedstill", "run", str(file), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert len(mlflow.MlflowClient.runs) == len(wandb.sessions) == 1
    assert 'to = ["mlflow", "wandb"]' in (path / "config.toml").read_text()


def test_the_command_refuses_a_service_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedstill", "run", "--track", "mlfow"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error tracking.to: input should be 'mlflow' or 'wandb', not 'mlfow'\n"


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_package_that_is_not_installed_is_named_before_anything_is_written(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=rf"{name} needs a package: pip install 'fedstill\[{name}\]'"):
        fedstill.run({**SMALL, "tracking": {"to": [name]}}, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_before_has_no_tracking() -> None:
    table = small().model_dump(mode="json")
    del table["tracking"]
    assert config_from(table, "old").tracking.to == ()


# The packages themselves


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="MLflow is not installed")
def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    path = tmp_path / "run"
    broken(path, 2, 'tracking.to=["mlflow"]')
    fedstill.resume(path)
    client = importlib.import_module("mlflow").MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("fedstill").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.info.run_name == str(path)
    assert found.data.params["data.clients"] == "2"
    curves = {
        name: [(one.step, one.value) for one in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }
    assert same_curves(curves, tensorboard(path))


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="Weights & Biases is not installed")
def test_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = tmp_path / "run"
    ends: list[dict[str, float]] = []

    class Summary(Callback):
        """Reads what the service shows last; after the tracker in the list, so before it at the end."""

        def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
            shown = importlib.import_module("wandb").run
            ends.append({name: shown.summary[name] for name in ("round", "fused/test/loss", "seconds/train")})

    broken(path, 2, 'tracking.to=["wandb"]')
    fedstill.resume(path, callbacks=[Summary()])
    id = json.loads((path / "tracking" / "wandb.json").read_text())["id"]
    sessions = list((path / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2
    assert all(session.name.endswith(f"-{id}") for session in sessions)
    last = read_metrics(path)[-1]
    assert ends == [
        {"round": 4, "fused/test/loss": last["fused"]["test"]["loss"], "seconds/train": last["seconds"]["train"]}
    ]
