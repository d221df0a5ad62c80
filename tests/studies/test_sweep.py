"""Sweeps and searches: what is run, skipped, resumed, refused; that results do not depend on the workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedstill import cli, run
from fedstill.callbacks import Callback, RunInfo
from fedstill.config import to_toml
from fedstill.errors import InputError, RunError
from fedstill.evaluation import Record
from fedstill.pool import Failure, Job
from fedstill.runs import RunDirectory, read_metrics
from fedstill.runs.directory import lock
from fedstill.studies import Outcome, Study, search, sweep
from fedstill.studies.display import time_left
from fedstill.studies.sweep import difference, in_one_process, results_folder, survey
from small import small, untimed

TINY = """
[keys]
data.train_samples = 200
data.test_samples = 100
data.server_validation = 100
data.clients = 4
model.name = "mlp"
train.rounds = 3
local.epochs = 1
execution.device = "cpu"
"""
STUDY = (
    """
title = "Two"
seeds = [0, 1]
[[variant]]
name = "A"
keys = { method = "fedavg" }
[[variant]]
name = "B"
base = "A"
keys = { method = "scaffold" }
"""
    + TINY
)
ORDER = ["a/seed-0", "b/seed-0", "a/seed-1", "b/seed-1"]


def written(folder: Path, text: str, name: str = "two.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def metrics(out: Path) -> dict[str, list[Record]]:
    return {cell: untimed(read_metrics(out / cell)) for cell in ORDER}


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def cut(path: Path) -> None:
    """Leave a run's first line of metrics alone."""
    file = path / "metrics.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])


SWEEPING, SEARCHING = import_module("fedstill.studies.sweep"), import_module("fedstill.studies.search")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs run one after another in this process; starting others takes seconds."""

    def outcomes(jobs: Sequence[Job[Any]], workers: int, hear: Callable[[int, Any], None]) -> Iterator[tuple[int, Any]]:
        for position, job in enumerate(jobs):
            try:
                ended = job(partial(hear, position))
            except Exception as error:
                ended = Failure(error)
            yield position, ended

    monkeypatch.setattr(SWEEPING, "outcomes", outcomes)


class Stop(Callback):
    """Presses Ctrl-C after the first round."""

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        raise KeyboardInterrupt


def stopped_in(study: Study, out: Path, position: int) -> None:
    cell = study.cells[position]
    with pytest.raises(KeyboardInterrupt):
        run(cell.config, directory=out / cell.directory, callbacks=[Stop()])


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome, str]:
    """Return a study that was run by two workers: its folder, the outcome, what was shown."""
    folder = tmp_path_factory.mktemp("swept")
    shown = StringIO()
    outcome = sweep(written(folder, STUDY), out=folder / "out", workers=2, console=Console(file=shown, width=200))
    return folder / "out", outcome, shown.getvalue()


@pytest.fixture
def done(swept: tuple[Path, Outcome, str], tmp_path: Path) -> tuple[Study, Path]:
    """Return a copy of the finished study, to change."""
    shutil.copytree(swept[0], tmp_path / "out")
    return Study.load(written(tmp_path, STUDY)), tmp_path / "out"


# What a sweep leaves


def test_every_run_is_there(swept: tuple[Path, Outcome, str]) -> None:
    out, outcome, shown = swept
    assert [cell.directory.as_posix() for cell in outcome.done] == ORDER
    assert (outcome.before, outcome.failed) == ((), ())
    assert {len(lines) for lines in metrics(out).values()} == {3}
    assert (out / "study.toml").read_text() == STUDY
    index = json.loads((out / "study.json").read_text())
    assert index["title"] == "Two"
    assert [cell["directory"] for cell in index["cells"]] == ORDER
    lines = shown.splitlines()
    assert [line.split()[0] for line in lines] == ["1/4", "2/4", "3/4", "4/4"]
    last = read_metrics(out / "b" / "seed-1")[-1]["fused"]["test"]["accuracy"]
    (told,) = (line for line in lines if " B, seed 1: " in line)
    assert f": {last:.1%}" in told
    # Each process had one run at a time to itself.
    assert {RunDirectory.read_config(out / cell).execution.executor for cell in ORDER} == {"serial"}


def test_the_runs_are_those_of_fedstill_run(swept: tuple[Path, Outcome, str], tmp_path: Path) -> None:
    out, outcome, _ = swept
    alone = run(outcome.done[3].config)
    assert untimed(alone.records) == metrics(out)["b/seed-1"]


def test_nothing_is_run_again(done: tuple[Study, Path]) -> None:
    study, out = done
    before = files(out)
    outcome = sweep(study, out=out)
    assert [cell.directory.as_posix() for cell in outcome.before] == ORDER
    assert outcome.done == ()
    assert files(out) == before


# Stopped, and gone on with


@pytest.mark.usefixtures("in_this_process")
def test_a_stopped_sweep_goes_on_to_the_same_bits(swept: tuple[Path, Outcome, str], tmp_path: Path) -> None:
    """By the command, with one worker, interrupted by Ctrl-C; against the sweep of two workers that nobody stopped."""
    study, out = Study.load(written(tmp_path, STUDY)), tmp_path / "out"
    out.mkdir()
    (out / "study.json").write_text(json.dumps({"title": "Two", "cells": [cell.record() for cell in study.cells]}))
    stopped_in(study, out, 1)
    assert [(one.state, one.rounds) for one in survey(study, out)[:2]] == [("new", 0), ("interrupted", 1)]
    log = out / "b" / "seed-0" / "log.txt"
    log.unlink()
    os.mkfifo(log)  # nobody reads it: the second run waits when it writes that it was resumed
    command = [sys.executable, "-c", "from fedstill.cli import main; main()"]
    arguments = ["sweep", str(study.path), "--out", str(out), "--workers", "1"]
    with subprocess.Popen(
        [*command, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    ) as process:
        assert process.stderr is not None
        shown = process.stderr.readline()
        assert shown.startswith("1/4 A, seed 0: ")
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert rest.splitlines()[-1] == f"stopped; go on with: fedstill {' '.join(arguments)}"
    assert "Traceback" not in rest
    log.unlink()
    assert [one.state for one in survey(study, out)] == ["finished", "interrupted", "new", "new"]
    (out / "a" / "seed-1").mkdir(parents=True)  # a run that was killed before it began
    (out / "a" / "seed-1" / "config.toml").write_text("half a")
    assert [one.state for one in survey(study, out)][2] == "new"
    outcome = sweep(study, out=out, workers=1)
    assert [cell.directory.as_posix() for cell in outcome.before] == ORDER[:1]
    assert "resumed after round 1" in log.read_text()
    assert metrics(out) == metrics(swept[0])
    assert RunDirectory.read_config(out / "b" / "seed-1").execution.executor == "threads"


@pytest.mark.usefixtures("in_this_process")
def test_a_results_folder_goes_on_without_the_configurations_that_its_study_named(tmp_path: Path) -> None:
    own = tmp_path / "mine"
    (own / "bases").mkdir(parents=True)
    (own / "bases" / "one.toml").write_text(to_toml(small("train.rounds=1", "local.lr=0.3")))
    (own / "two.toml").write_text(to_toml(small("train.rounds=1", "method=fedprox")))
    text = 'config = "bases/one.toml"\n[[setting]]\nname = "a"\n[[setting]]\nname = "b"\nconfig = "two.toml"\n'
    (own / "tiny.toml").write_text(text)
    first = sweep(own / "tiny.toml", out=tmp_path / "out", workers=1)
    assert len(first.done) == 2
    shutil.rmtree(own)
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    study = Study.load(moved / "study.toml")
    assert [(cell.config.local.lr, cell.config.method) for cell in study.cells] == [(0.3, "fedavg"), (0.1, "fedprox")]
    (moved / "study.toml").write_text(f"seeds = [0, 1]\n{text}")
    for done in (2, 0):  # the second sweep writes the copies again, from themselves
        outcome = sweep(moved / "study.toml", workers=1)
        assert (outcome.out, len(outcome.done)) == (moved, done)
    (moved / "study.toml.two.toml").unlink()  # as in a folder of before there were copies
    with pytest.raises(InputError, match=r"two\.toml: there is no such file; this is a copy: .* own file, with --out "):
        sweep(moved / "study.toml")


# Failures


@pytest.mark.usefixtures("in_this_process")
def test_a_failed_run_is_listed_and_run_again_only_when_asked(
    done: tuple[Study, Path], swept: tuple[Path, Outcome, str]
) -> None:
    study, out = done
    strange = out / "a" / "seed-1" / "mine.txt"
    for cell in ("a/seed-1", "b/seed-1"):
        shutil.rmtree(out / cell)
    strange.parent.mkdir()
    strange.write_text("keep this")
    outcome = sweep(study, out=out, workers=1)
    # It did not stop the other, and what is not ours was left alone.
    assert [cell.directory.as_posix() for cell in outcome.done] == ["b/seed-1"]
    ((failed, reason),) = outcome.failed
    assert failed.directory.as_posix() == "a/seed-1"
    assert "exists already" in reason
    assert "exists already" in (out / "a" / "seed-1" / "failed.txt").read_text()
    assert strange.read_text() == "keep this"
    told = CliRunner().invoke(cli.app, ["sweep", str(study.path), "--out", str(out)])
    assert told.exit_code == 1
    assert "failed: A, seed 1, in " in told.output
    assert "3 runs finished, 3 of them before, 1 failed (again with --retry-failed)" in " ".join(told.output.split())
    strange.unlink()
    assert sweep(study, out=out).done == ()
    assert len(sweep(study, out=out, retry_failed=True).done) == 1
    assert not (out / "a" / "seed-1" / "failed.txt").exists()
    assert metrics(out) == metrics(swept[0])


@pytest.mark.usefixtures("in_this_process")
def test_a_full_disk_ends_all_with_one_error(tmp_path: Path) -> None:
    study, out = Study.load(written(tmp_path, STUDY)), tmp_path / "out"
    out.mkdir()
    (out / "study.json").write_text(json.dumps({"title": "Two", "cells": [cell.record() for cell in study.cells]}))
    stopped_in(study, out, 1)
    log = out / "b" / "seed-0" / "log.txt"
    log.unlink()
    log.symlink_to("/dev/full")
    with pytest.raises(
        RunError, match=r"log\.txt: cannot be written \(No space left on device\); .* make room and give"
    ):
        sweep(study, out=out, workers=1)
    assert [one.state for one in survey(study, out)][:2] == ["finished", "interrupted"]
    assert not list(out.rglob("failed.txt"))


@pytest.mark.usefixtures("in_this_process")
def test_a_run_with_lines_of_its_metrics_missing_has_failed_until_it_is_made_anew(
    done: tuple[Study, Path], swept: tuple[Path, Outcome, str]
) -> None:
    study, out = done
    cut(out / "a" / "seed-1")
    told = CliRunner().invoke(cli.app, ["sweep", str(study.path), "--out", str(out)])
    assert told.exit_code == 1
    (line,) = (line for line in told.output.splitlines() if line.startswith("failed: A, seed 1, in "))
    assert "metrics.jsonl: rounds 2 to 3 are missing" in line
    assert line.endswith(f"; or remove {out / 'a/seed-1'}, and a sweep runs it anew")
    shutil.rmtree(out / "a" / "seed-1")
    assert sweep(study, out=out, workers=1).failed == ()
    assert metrics(out) == metrics(swept[0])


@pytest.mark.usefixtures("in_this_process")
def test_a_file_in_a_runs_place_fails_that_run_alone(done: tuple[Study, Path]) -> None:
    study, out = done
    for cell in ("a/seed-1", "b/seed-1"):
        shutil.rmtree(out / cell)
    (out / "a" / "seed-1").write_text("mine")
    outcome = sweep(study, out=out, workers=1)
    assert [cell.directory.as_posix() for cell in outcome.done] == ["b/seed-1"]
    ((failed, reason),) = outcome.failed
    assert failed.directory.as_posix() == "a/seed-1"
    assert "exists already" in reason
    assert (out / "a" / "seed-1").read_text() == "mine"


# What is refused


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("local.epochs = 1", "local.epochs = 2", "this run has local.epochs = 1, and the study says 2"),
        ('model.name = "mlp"', 'model.name = "mlp"\nmodel.hidden = [7]', "this run has model.hidden = null, and"),
        ("train.rounds = 3", "train.rounds = 4", "this run has train.rounds = 3, and the study says 4"),
    ],
)
def test_an_edited_study_is_refused_before_anything_runs(
    done: tuple[Study, Path], old: str, new: str, says: str
) -> None:
    study, out = done
    shutil.rmtree(out / "a" / "seed-0")
    before = files(out)
    edited = written(study.path.parent, STUDY.replace(old, new))
    with pytest.raises(InputError) as caught:
        sweep(edited, out=out)
    assert str(out / "b" / "seed-0") in str(caught.value)
    assert says in str(caught.value)
    assert files(out) == before


def test_what_may_be_edited(done: tuple[Study, Path]) -> None:
    study, out = done
    more = 'checkpoint.every = 2\nexecution.client_states = "disk"\ndata.root = "elsewhere"\n'
    edited = Study.load(written(study.path.parent, STUDY.replace("[0, 1]", "[0, 1, 2]") + more))
    assert [one.state for one in survey(edited, out)] == ["finished"] * 4 + ["new"] * 2


def test_steps_that_scaffold_fixed_itself_are_no_difference() -> None:
    wanted = small("method=scaffold", "scaffold.mode=code")
    found = small("method=scaffold", "scaffold.mode=code", "local.steps=4")
    assert wanted.scaffold.steps == "fixed"
    assert difference(wanted, found) is None
    assert difference(small(), small("local.steps=4")) == "local.steps = 4, and the study says null"


def test_folders_that_hold_something_else_are_refused(done: tuple[Study, Path], tmp_path: Path) -> None:
    study, out = done
    with pytest.raises(InputError, match="exists already and holds no study"):
        sweep(study, out=tmp_path)
    with pytest.raises(InputError, match="is a file"):
        sweep(study, out=study.path)
    with pytest.raises(InputError, match="results of another study"):
        sweep(written(tmp_path, TINY), out=out)
    (out / "study.json").write_text("{")
    with pytest.raises(InputError, match=r"study\.json: damaged"):
        sweep(study, out=out)


def test_another_process_is_not_disturbed(done: tuple[Study, Path]) -> None:
    study, out = done
    cut(out / "b" / "seed-1")
    shutil.rmtree(out / "b" / "seed-1" / "checkpoints")
    before = files(out)
    with lock(out / "b" / "seed-1"):
        with pytest.raises(InputError, match="another process is running it"):
            sweep(study, out=out)
        told = CliRunner().invoke(cli.app, ["sweep", str(study.path), "--out", str(out), "--dry-run"])
    assert told.exit_code == 0
    assert told.output.splitlines()[-2:] == [
        "running after round 1 of 3: B, seed 1, in b/seed-1",
        "0 to run (3 finished, 1 running); nothing was run",
    ]
    assert files(out) == before


@pytest.mark.parametrize("damage", ["{}", b"\xff\xfe", "directory"])
def test_what_cannot_be_read_is_listed_as_failed(done: tuple[Study, Path], damage: str | bytes) -> None:
    study, out = done
    file = out / "b" / "seed-1" / "metrics.jsonl"
    file.unlink()
    if damage == "directory":
        file.mkdir()
        (out / "a" / "seed-1" / "failed.txt").mkdir()  # a whole run has not failed
        shutil.rmtree(out / "b" / "seed-0")
        (out / "b" / "seed-0" / "failed.txt").mkdir(parents=True)
    else:
        file.write_bytes(damage.encode() if isinstance(damage, str) else damage)
    told = {one.cell.directory.as_posix(): (one.state, one.reason) for one in survey(study, out)}
    state, reason = told["b/seed-1"]
    assert state == "failed"
    assert reason.startswith(f"{file}")
    assert reason.endswith("and a sweep runs it anew")
    assert told["a/seed-1"] == ("finished", "")
    if damage == "directory":
        failed = out / "b" / "seed-0" / "failed.txt"
        assert told["b/seed-0"] == ("failed", f"{failed}: cannot be read (Is a directory); remove it")


def test_what_cannot_be_built_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDSTILL_DATA", raising=False)
    for keys, says in {
        'data.name = "cifar10"': "FEDSTILL_DATA",
        'model.head = "nowhere"': "nowhere",
        'eval.on = ["clients"]': "eval.on has 'clients'",
        "data.train_samples = 9000": "9000 samples asked for",
    }.items():
        text = STUDY.replace("data.train_samples = 200\n", "") if "train_samples" in keys else STUDY
        with pytest.raises(InputError, match=says) as caught:
            sweep(written(tmp_path, f"{text}{keys}\n"), out=tmp_path / "out")
        assert str(caught.value).startswith("A, seed 0: ")
        assert not (tmp_path / "out").exists()


# The command


def test_dry_run_says_what_would_be_run_and_writes_nothing(done: tuple[Study, Path]) -> None:
    study, out = done
    shutil.rmtree(out / "b" / "seed-1")
    cut(out / "a" / "seed-1")
    shutil.rmtree(out / "a" / "seed-1" / "checkpoints")
    before = files(out)
    told = CliRunner().invoke(cli.app, ["sweep", str(study.path), "--out", str(out), "--dry-run"])
    assert told.exit_code == 0
    assert told.output.splitlines() == [
        "interrupted after round 1 of 3: A, seed 1, in a/seed-1",
        "new: B, seed 1, in b/seed-1",
        "finished: A, seed 0, in a/seed-0",
        "finished: B, seed 0, in b/seed-0",
        "2 to run (1 interrupted, 1 new, 2 finished); nothing was run",
    ]
    assert files(out) == before


def test_only_takes_the_runs_with_all_words(tmp_path: Path) -> None:
    path = written(tmp_path, STUDY)

    def listed(*arguments: str) -> list[str]:
        told = CliRunner().invoke(
            cli.app, ["sweep", str(path), "--out", str(tmp_path / "out"), "--dry-run", *arguments]
        )
        return [line.rpartition(" ")[2] for line in told.output.splitlines()[:-1]]

    assert listed() == ORDER
    assert listed("--only", "b/") == ["b/seed-0", "b/seed-1"]
    assert listed("--only", "B,", "SEED-1", "local.lr=0.2") == ["b/seed-1"]
    with pytest.raises(InputError, match=r"--only c: no run has all of this .* 'A, seed 0' in a/seed-0"):
        sweep(path, out=tmp_path / "out", only=["c"])


def test_where_results_go(done: tuple[Study, Path], tmp_path: Path) -> None:
    study, out = done
    assert results_folder(study) == Path("runs/two")
    assert results_folder(study, "there") == Path("there")
    assert results_folder(Study.load(out / "study.toml")) == out
    assert results_folder(Study.load(written(tmp_path, STUDY, "study.toml"))) == Path("runs/study")


# Time and threads


def test_time_to_the_end_by_hand() -> None:
    pace = {"a": 2.0, "b": 10.0}
    assert time_left([], [], {}, 2) == 0
    assert time_left([("a", 3)], [], pace, 2) == 6
    assert time_left([("a", 3), ("b", 1)], [], pace, 2) == 10
    # Two workers are free after 6 and 10 s; the first takes 5 rounds of a, until 16 s, the second 1 of b, until 20 s.
    assert time_left([("a", 3), ("b", 1)], [("a", 5), ("b", 1)], pace, 2) == 20
    # One worker does all, one after another.
    assert time_left([("a", 3)], [("a", 5), ("b", 1)], pace, 1) == 26
    assert time_left([("a", 3)], [("c", 5)], pace, 2) is None
    assert time_left([("c", 0.5)], [], pace, 2) is None
    assert time_left([("c", 0)], [("a", 1)], pace, 2) == 2


def test_runs_beside_each_other_train_one_client_at_a_time() -> None:
    def executor(at_a_time: int, *overrides: str) -> str:
        return in_one_process(small("execution.executor=auto", *overrides), at_a_time).execution.executor

    assert executor(2) == "serial"
    assert executor(1) == "auto"
    assert executor(2, "execution.executor=threads") == "threads"


# Search

SEARCH = (
    TINY.replace("train.rounds = 3", "train.rounds = 2")
    + """
method = "fedavg"
eval.on = ["test", "validation"]
[search]
trials = 5
batch = 2
[search.space]
local.lr = [1e-9, 0.1]
"""
)


@pytest.mark.usefixtures("in_this_process")
def test_search_picks_the_better_value_and_never_measures_the_test_set(tmp_path: Path) -> None:
    path, out = written(tmp_path, SEARCH), tmp_path / "out"
    found = search(path, out=out, workers=2)
    # A learning rate of 1e-9 learns nothing.
    assert found.best is not None
    assert found.best.keys == {"local.lr": 0.1}
    # Five trials are wanted, and there are two points.
    assert [(one.trial, one.keys["local.lr"], one.runs) for one in found.trials] == [
        (0, 1e-9, ("lr-1e-09/seed-0",)),
        (1, 0.1, ("lr-0.1/seed-0",)),
    ]
    for trial in found.trials:
        records = read_metrics(out / trial.runs[0])
        assert trial.accuracy == records[-1]["fused"]["validation"]["accuracy"]
        assert all("test" not in record["fused"] for record in records)
    written_down = json.loads((out / "search.json").read_text())
    assert written_down["best"]["keys"] == {"local.lr": 0.1}
    assert len(json.loads((out / "study.json").read_text())["cells"]) == 2
    before = files(out)
    told = CliRunner().invoke(cli.app, ["sweep", str(path), "--out", str(out)])
    assert told.exit_code == 0
    assert "best: local.lr=0.1" in told.output
    assert {name: text for name, text in files(out).items() if name != "optuna.log"} == {
        name: text for name, text in before.items() if name != "optuna.log"
    }
    with pytest.raises(InputError, match=r"begun with another search\.space\.local\.lr"):
        search(written(tmp_path, SEARCH.replace("1e-9", "1e-8")), out=out)
    with pytest.raises(InputError, match="not for a \\[search\\]"):
        CliRunner().invoke(cli.app, ["sweep", str(path), "--only", "x"], catch_exceptions=False)
    with pytest.raises(InputError, match=r"fedstill\.studies\.search runs it"):
        sweep(path, out=out)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"test", "validation"', '"test"', r"set eval\.on"),
        ("data.server_validation = 100", "data.server_validation = 0", r"set data\.server_validation"),
        ("[search]\ntrials = 5\nbatch = 2\n[search.space]\nlocal.lr = [1e-9, 0.1]\n", "", r"has no \[search\]"),
    ],
)
def test_a_search_without_what_it_needs_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in SEARCH
    with pytest.raises(InputError, match=says):
        search(written(tmp_path, SEARCH.replace(old, new)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_optuna_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install fedstill\[search\]"):
        search(written(tmp_path, SEARCH), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Pretended:
    """Runs that take no time: the accuracy is the first minus the distance from a learning rate of 0.1."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.left = stop_before

    def __call__(self, todo: Sequence[Any], folder: Path, *rest: object) -> dict[int, str]:
        for one in todo:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = self.left - 1 if self.left is not None else None
            path = folder / one.cell.directory
            path.mkdir(parents=True)
            (path / "config.toml").write_text(to_toml(one.cell.config))
            (path / "partition.json").write_text("{}")
            lines = [
                {
                    "round": round,
                    "bytes": {},
                    "seconds": {},
                    "fused": {"validation": {"accuracy": 1 - abs(one.cell.config.local.lr - 0.1) - 0.01 * (2 - round)}},
                }
                for round in (1, 2)
            ]
            (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return {}


def test_a_stopped_search_goes_on_to_the_same_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = "local.lr = { low = 0.001, high = 1, log = true }\nlocal.batch_size = { low = 10, high = 12 }"
    text = SEARCH.replace("local.lr = [1e-9, 0.1]", space).replace("trials = 5", "trials = 16\nmetric = 'mean'")
    path = written(tmp_path, "seeds = [0, 1]\n" + text)
    monkeypatch.setattr(SEARCHING, "run_cells", Pretended())
    whole = search(path, out=tmp_path / "whole")
    assert len(whole.trials) == 16
    assert len({one.keys["local.lr"] for one in whole.trials}) == 16
    assert all(
        type(one.keys["local.batch_size"]) is int and 10 <= one.keys["local.batch_size"] <= 12 for one in whole.trials
    )
    for one in whole.trials:
        # Mean over both rounds and both seeds.
        assert one.accuracy == pytest.approx(1 - abs(one.keys["local.lr"] - 0.1) - 0.005)
    for stop_before in (3, 8, 13):
        monkeypatch.setattr(SEARCHING, "run_cells", Pretended(stop_before))
        with pytest.raises(KeyboardInterrupt):
            search(path, out=tmp_path / "stopped")
    monkeypatch.setattr(SEARCHING, "run_cells", Pretended())
    assert search(path, out=tmp_path / "stopped").trials == whole.trials
    more = search(written(tmp_path, path.read_text().replace("trials = 16", "trials = 18")), out=tmp_path / "whole")
    assert (len(more.trials), more.trials[:16]) == (18, whole.trials)


def test_a_point_that_was_stopped_while_it_was_drawn_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    path, out = written(tmp_path, SEARCH.replace("[1e-9, 0.1]", "[0.1, 0.2, 0.3]")), tmp_path / "out"
    monkeypatch.setattr(SEARCHING, "run_cells", Pretended(0))
    with pytest.raises(KeyboardInterrupt):
        search(path, out=out)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(out / "optuna.log")))
    optuna.load_study(storage=storage, study_name="search").ask()  # and no value
    monkeypatch.setattr(SEARCHING, "run_cells", Pretended())
    found = search(path, out=out)
    assert sorted(one.keys["local.lr"] for one in found.trials) == [0.1, 0.2, 0.3]
    assert all(one.accuracy is not None for one in found.trials)
