"""Runs that are stopped, killed, damaged or out of disk, and how they go on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedstill import cli
from fedstill.build import build
from fedstill.callbacks import Callback, RunInfo
from fedstill.config import to_toml
from fedstill.errors import InputError, RunError
from fedstill.experiment import Result, resume, run
from fedstill.federation import Record
from fedstill.runs import RunDirectory, read_metrics
from fedstill.runs.directory import metrics_up_to
from fedstill.runs.files import disk_errors
from small import same_state, same_weights, small, untimed
from stopping import Stop, last_state, stopped, store_of

FEDAVG = ["method=fedavg", "train.rounds=4", "train.participation=0.5"]
SCAFFOLD_FEDFTG = ["method=scaffold+fedftg", "fedftg.mode=paper", "train.rounds=4", "train.participation=0.5"]
METHODS = {"fedavg": FEDAVG, "scaffold+fedftg": SCAFFOLD_FEDFTG}


def checkpoints(path: Path) -> list[int]:
    return sorted(int(file.stem.removeprefix("round-")) for file in (path / "checkpoints").glob("*.json"))


def lines(path: Path) -> list[Record]:
    return untimed(read_metrics(path))


def assert_same_run(path: Path, result: Result, whole: Path, expected: Result) -> None:
    """The tensors of the last checkpoint, the result and the metrics are those of the run that was not stopped."""
    assert same_weights(result.weights, expected.weights)
    assert same_state(last_state(path), last_state(whole))
    assert lines(path) == lines(whole) == untimed(result.records) == untimed(expected.records)
    assert (path / "config.toml").read_text() == (whole / "config.toml").read_text()


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Result]]:
    """Return the runs that nobody stopped, by method."""
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: (folder / name, run(small(*keys), directory=folder / name)) for name, keys in METHODS.items()
    }  # fmt: skip


@pytest.fixture
def finished(whole_runs: dict[str, tuple[Path, Result]], tmp_path: Path) -> Path:
    """Return a copy of a finished SCAFFOLD+FedFTG run of four rounds, to damage."""
    shutil.copytree(whole_runs["scaffold+fedftg"][0], tmp_path / "run")
    return tmp_path / "run"


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# Stopped and resumed


@pytest.mark.parametrize(
    "stop",
    [
        Stop(client_of=0),
        Stop(client_of=1),
        Stop(after=1),
        Stop(after=3),
        Stop(client_of=3),
    ],
    ids=["in round 1", "in round 2", "after round 1", "after round 3", "in the last round"],
)
@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path: Path, name: str, stop: Stop, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    path = tmp_path / "run"
    stopped(small(*METHODS[name]), path, stop)
    done = stop.client_of if stop.client_of is not None else stop.after
    assert len(read_metrics(path)) == done
    assert checkpoints(path)[-1:] == ([done] if done else [])
    assert_same_run(path, resume(path), *whole_runs[name])
    log = (path / "log.txt").read_text()
    assert f"stopped after round {done}: KeyboardInterrupt" in log
    assert f"resumed after round {done}" in log
    assert "finished" in log


def test_a_stopped_run_with_threads_goes_on_to_the_bits_of_serial(
    tmp_path: Path, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    path = tmp_path / "run"
    stopped(small(*SCAFFOLD_FEDFTG, "execution.executor=threads", "execution.workers=2"), path, Stop(client_of=1))
    whole, expected = whole_runs["scaffold+fedftg"]
    assert same_weights(resume(path).weights, expected.weights)
    assert same_state(last_state(path), last_state(whole))


def test_a_run_can_be_stopped_many_times(tmp_path: Path, whole_runs: dict[str, tuple[Path, Result]]) -> None:
    path = tmp_path / "run"
    stopped(small(*SCAFFOLD_FEDFTG), path, Stop(client_of=0))
    for round in (1, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            resume(path, [Stop(after=round)])
    assert_same_run(path, resume(path), *whole_runs["scaffold+fedftg"])


def test_released_control_variates_survive_a_checkpoint(tmp_path: Path) -> None:
    # Without a refinement the global model and the one before refinement are the same tensors.
    for number, keys in enumerate(
        (
            ["method=scaffold", "scaffold.mode=code", "train.rounds=3"],
            ["method=scaffold+fedftg", "fedftg.mode=code", "train.rounds=3"],
            ["method=scaffold+fedftg", "fedftg.mode=code", "fedftg.iterations=0", "train.rounds=3"],
        )
    ):
        whole, path = tmp_path / f"whole {number}", tmp_path / f"run {number}"
        expected = run(small(*keys), directory=whole)
        stopped(small(*keys), path, Stop(client_of=1))
        assert_same_run(path, resume(path), whole, expected)


def test_a_batchnorm_model_and_the_class_weighted_head_survive_a_checkpoint(tmp_path: Path) -> None:
    keys = ["model.name=cnn", "model.width=4", "model.norm=bn", "fusion.head=class-weighted", "train.rounds=3"]
    expected = run(small(*keys), directory=tmp_path / "whole")
    stopped(small(*keys), tmp_path / "run", Stop(client_of=2))
    assert_same_run(tmp_path / "run", resume(tmp_path / "run"), tmp_path / "whole", expected)


def test_a_run_without_refinement_goes_on_where_checkpoints_are_rare(tmp_path: Path) -> None:
    keys = [*FEDAVG, "train.rounds=5", "checkpoint.every=2"]
    expected = run(small(*keys), directory=tmp_path / "whole")
    assert checkpoints(tmp_path / "whole") == [4, 5]
    path = tmp_path / "run"
    stopped(small(*keys), path, Stop(client_of=3))
    assert checkpoints(path) == [2, 3], "Ctrl-C keeps the last whole round, due or not"
    # As after a kill, which leaves no time for that:
    for file in (path / "checkpoints").glob("round-00003*"):
        file.unlink()
    assert len(read_metrics(path)) == 3
    assert_same_run(path, resume(path), tmp_path / "whole", expected)


def test_a_finished_run_has_nothing_to_resume_and_says_what_it_gave(
    finished: Path, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    before = files(finished)
    result = resume(finished)
    assert same_weights(result.weights, whole_runs["scaffold+fedftg"][1].weights)
    assert result.accuracies() == whole_runs["scaffold+fedftg"][1].accuracies()
    after = files(finished)
    assert {name for name in after if after[name] != before.get(name)} == {"log.txt"}


# What is kept


def listed(path: Path, manifest: Path) -> dict[int, int]:
    """Return client -> the round of its file, as a checkpoint's index says."""
    entry = json.loads(manifest.read_text())["clients"]
    rows = [json.loads(line) for line in (path / entry["file"]).read_bytes()[: entry["bytes"]].splitlines()]
    return {row["client"]: row["round"] for row in rows if "round" in row}


def test_two_checkpoints_are_kept_and_the_clients_files_they_name(tmp_path: Path) -> None:
    path = tmp_path / "run"
    keys = ["method=scaffold", "data.clients=8", "train.participation=0.25", "train.rounds=6"]
    run(small(*keys), directory=path)
    assert checkpoints(path) == [5, 6]
    named = set()
    for manifest in (path / "checkpoints").glob("*.json"):
        content = json.loads(manifest.read_text())
        named |= {content["server"]["file"], content["clients"]["file"]}
        named |= {f"clients/{client}/round-{round:05d}.safetensors" for client, round in listed(path, manifest).items()}
    kept = {str(file.relative_to(path)) for file in path.rglob("*-*") if file.suffix in (".safetensors", ".jsonl")}
    assert kept == named
    cohort: Any = read_metrics(path)[-1]["cohort"]
    rounds = listed(path, path / "checkpoints/round-00006.json")
    assert {client for client, round in rounds.items() if round == 6} == set(cohort)
    assert min(rounds.values()) < 5, "a client of long ago keeps its file"
    assert not list(path.rglob("*.partial"))


def test_more_checkpoints_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    run(small(*FEDAVG, "checkpoint.keep=3"), directory=tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [2, 3, 4]


def test_the_directory_holds_what_the_run_was(finished: Path) -> None:
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["versions"].keys() >= {"python", "torch", "fedstill", "numpy"}
    assert environment.keys() >= {"commit", "device"}
    partition = json.loads((finished / "partition.json").read_text())
    federation, _ = build(RunDirectory.read_config(finished))
    assert partition["fingerprint"] == federation.partition.fingerprint
    assert sum(map(sum, partition["class_counts"])) == 200
    assert "schema_version = 1" in (finished / "config.toml").read_text()
    assert "auto" not in (finished / "config.toml").read_text().split("[execution]")[1]


def test_tensorboard_shows_every_round_once_although_the_run_was_stopped(tmp_path: Path) -> None:
    path = tmp_path / "run"
    stopped(small(*SCAFFOLD_FEDFTG, "checkpoint.every=3"), path, Stop(after=2))
    for file in (path / "checkpoints").glob("*"):
        file.unlink()
    resume(path)
    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    for tag in ("refined/test/accuracy", "refinement/fedftg/student_loss", "bytes/up/weights", "seconds/train"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4]
    records: list[Any] = read_metrics(path)
    shown = [event.value for event in events.Scalars("fused/test/loss")]
    assert shown == pytest.approx([record["fused"]["test"]["loss"] for record in records], rel=1e-6)


# Damage


def test_a_metrics_line_that_was_cut_short_is_dropped(
    tmp_path: Path, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    path = tmp_path / "run"
    stopped(small(*FEDAVG), path, Stop(after=2))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "coh')
    assert len(read_metrics(path)) == 2
    assert_same_run(path, resume(path), *whole_runs["fedavg"])


def test_a_damaged_metrics_line_before_the_last_is_refused(finished: Path) -> None:
    text = (finished / "metrics.jsonl").read_text().splitlines()
    (finished / "metrics.jsonl").write_text("\n".join([text[0], text[1][:20], *text[2:]]) + "\n")
    before = files(finished)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: damaged line"):
        resume(finished)
    assert files(finished)["metrics.jsonl"] == before["metrics.jsonl"]


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        (3, r"round 4 is missing, .*; put .* to go on from round-00003 instead, remove .*/round-00004\.json$"),
        (1, r"rounds 2 to 4 are missing, .*; put .* to begin again at round 1, remove .*/checkpoints and give"),
        (0.5, "rounds 1 to 4 are missing"),
        (0, "rounds 1 to 4 are missing"),
        (None, "rounds 1 to 4 are missing"),
    ],
)
def test_metrics_that_end_before_the_checkpoint_are_refused(
    finished: Path, kept: float | None, says: str, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    file = finished / "metrics.jsonl"
    written = file.read_text().splitlines(keepends=True)
    if kept is None:
        file.unlink()
    else:
        file.write_text(written[0][:40] if kept == 0.5 else "".join(written[: int(kept)]))
    before = files(finished)
    with pytest.raises(InputError, match=rf"metrics\.jsonl: {says}") as caught:
        resume(finished)
    assert "\n" not in str(caught.value)
    assert files(finished) == before
    if kept == 3:
        (finished / "checkpoints/round-00004.json").unlink()
    else:
        shutil.rmtree(finished / "checkpoints")
    assert_same_run(finished, resume(finished), *whole_runs["scaffold+fedftg"])


def test_metrics_without_a_round_in_their_middle_are_refused(finished: Path) -> None:
    file = finished / "metrics.jsonl"
    written = file.read_text().splitlines(keepends=True)
    file.write_text(written[0] + written[3])
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: round 4 stands where round 2 belongs; remove this line"):
        resume(finished)


@pytest.mark.parametrize("last", ["3", "{}", '{"round": 4}', '{"round": "4", "bytes": {}, "seconds": {}}'])
def test_a_last_line_that_is_no_rounds_is_refused(finished: Path, last: str) -> None:
    file = finished / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]) + last + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:4: not a round's metrics.*; remove this line"):
        metrics_up_to(finished, 4)


def flip(path: Path, at: int = -100) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def damage_server(path: Path) -> str:
    flip(path / "checkpoints/round-00004.safetensors")
    return r"round-00004\.safetensors: corrupt"


def damage_header(path: Path) -> str:
    flip(path / "checkpoints/round-00004.safetensors", 3)
    return r"round-00004\.safetensors: corrupt"


def cut_server(path: Path) -> str:
    file = path / "checkpoints/round-00004.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return r"round-00004\.safetensors: corrupt"


def remove_server(path: Path) -> str:
    (path / "checkpoints/round-00004.safetensors").unlink()
    return r"round-00004\.safetensors: a checkpoint names this file, and it cannot be read"


def damage_client(path: Path) -> str:
    file = next((path / "clients").rglob("round-00004.safetensors"))
    flip(file)
    return rf"clients/{file.parent.name}/round-00004\.safetensors: corrupt"


def cut_manifest(path: Path) -> str:
    file = path / "checkpoints/round-00004.json"
    file.write_text(file.read_text()[:200])
    return r"round-00004\.json: not a checkpoint, or a damaged one"


def other_json(path: Path) -> str:
    (path / "checkpoints/round-00004.json").write_text("[1, 2]")
    return r"round-00004\.json: not a checkpoint, or a damaged one"


def manifest_without_files(path: Path) -> str:
    file = path / "checkpoints/round-00004.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "server": 3}))
    return r"round-00004\.json: not a checkpoint, or a damaged one"


def says(path: Path, **keys: int) -> str:
    file = path / "checkpoints/round-00004.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return r"round-00004\.json: a damaged checkpoint: it says "


def other_round(path: Path) -> str:
    return says(path, round=-1) + "round -1"


def more_models(path: Path) -> str:
    return says(path, models=9) + r"9 model\(s\) of 1 refinement"


def more_refinements(path: Path) -> str:
    return says(path, refinements=3) + r"1 model\(s\) of 3 refinement"


def no_models(path: Path) -> str:
    return says(path, models=0) + r"0 model\(s\)"


def other_format(path: Path) -> str:
    file = path / "checkpoints/round-00004.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": "fedstill-checkpoint-9"}))
    return r"round-00004\.json: format 'fedstill-checkpoint-9', expected 'fedstill-checkpoint-4'"


def other_run(path: Path) -> str:
    file = path / "checkpoints/round-00004.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fingerprint": "0" * 64}))
    return r"round-00004\.json: it belongs to another experiment"


DAMAGES = [
    damage_server,
    damage_header,
    cut_server,
    remove_server,
    damage_client,
    cut_manifest,
    other_json,
    manifest_without_files,
    other_round,
    more_models,
    more_refinements,
    no_models,
    other_format,
    other_run,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_older_one_named(
    finished: Path, damage: Any, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    says = damage(finished)
    before = files(finished)
    with pytest.raises(InputError, match=f"{says}.*; to go on from round-00003 instead, remove .*00004.json") as caught:
        resume(finished)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert files(finished) == before, "nothing is written over"
    (finished / "checkpoints/round-00004.json").unlink()
    assert_same_run(finished, resume(finished), *whole_runs["scaffold+fedftg"])


def test_the_only_checkpoint_damaged_has_no_older_one_to_name(tmp_path: Path) -> None:
    path = tmp_path / "run"
    stopped(small(*FEDAVG), path, Stop(after=1))
    flip(path / "checkpoints/round-00001.safetensors")
    with pytest.raises(InputError, match="corrupt") as caught:
        resume(path)
    assert "to go on from" not in str(caught.value)


def test_a_damaged_older_checkpoint_does_not_stop_a_run(
    tmp_path: Path, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    path = tmp_path / "run"
    stopped(small(*FEDAVG, "checkpoint.keep=3"), path, Stop(after=2))
    (path / "checkpoints/round-00001.json").write_text("{")
    assert same_weights(resume(path).weights, whole_runs["fedavg"][1].weights)


def test_a_checkpoint_of_another_run_is_foreign(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    run(small(*SCAFFOLD_FEDFTG, "local.lr=0.05"), directory=other)
    shutil.rmtree(finished / "checkpoints")
    shutil.rmtree(finished / "clients")
    for folder in ("checkpoints", "clients"):
        shutil.copytree(other / folder, finished / folder)
    with pytest.raises(InputError, match=r"round-00004\.json: it belongs to another experiment than config\.toml"):
        resume(finished)


def test_after_an_edit_of_the_configuration_no_checkpoint_is_given_up(
    finished: Path, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    file = finished / "config.toml"
    config = file.read_text()
    file.write_text(config.replace("\nrounds = 4\n", "\nrounds = 5\n"))
    with pytest.raises(InputError, match=r"another experiment.*; where that was edited, put it back") as caught:
        resume(finished)
    assert "remove" not in str(caught.value)
    file.write_text(config)
    assert_same_run(finished, resume(finished), *whole_runs["scaffold+fedftg"])


def test_the_newest_whole_checkpoint_is_named_with_all_that_are_in_its_way(tmp_path: Path) -> None:
    path = tmp_path / "run"
    stopped(small(*FEDAVG, "checkpoint.keep=3"), path, Stop(after=3))
    for round in (2, 3):
        (path / f"checkpoints/round-0000{round}.json").write_text("{")
    with pytest.raises(InputError, match=r"from round-00001 instead, remove \S*00002\.json and \S*00003\.json$"):
        resume(path)


def test_what_does_not_change_the_numbers_may_change_between_two_runs(
    tmp_path: Path, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    path = tmp_path / "run"
    stopped(small(*SCAFFOLD_FEDFTG), path, Stop(after=2))
    config = (path / "config.toml").read_text()
    changed = config.replace('executor = "serial"', 'executor = "threads"').replace("\nevery = 1\n", "\nevery = 2\n", 1)
    assert changed != config
    (path / "config.toml").write_text(changed)
    assert same_weights(resume(path).weights, whole_runs["scaffold+fedftg"][1].weights)


def test_other_data_than_the_run_began_with_are_refused(finished: Path) -> None:
    stored = json.loads((finished / "partition.json").read_text())
    (finished / "partition.json").write_text(json.dumps({**stored, "fingerprint": "x"}))
    with pytest.raises(InputError, match="the data give another partition than when this run began"):
        resume(finished)
    (finished / "partition.json").write_text("[")
    with pytest.raises(InputError, match=r"partition\.json: missing or damaged"):
        resume(finished)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory, it has no config"):
        resume(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a run directory"):
        resume(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be read"):
        resume(tmp_path / "file")
    (tmp_path / "empty" / "config.toml").write_text("[data]\nbta = 1\n")
    with pytest.raises(InputError, match=r"config\.toml: unknown key 'data\.bta'"):
        resume(tmp_path / "empty")
    (tmp_path / "empty" / "config.toml").write_text("[data\n")
    with pytest.raises(InputError, match=r"config\.toml: not valid TOML"):
        resume(tmp_path / "empty")


def test_a_directory_that_exists_is_left_alone(finished: Path, tmp_path: Path) -> None:
    before = files(finished)
    with pytest.raises(InputError, match=r"exists already.*fedstill resume") as caught:
        run(small(*FEDAVG), directory=finished)
    assert caught.value.exit_code == 2
    assert files(finished) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        run(small(*FEDAVG), directory=tmp_path / "file")
    with pytest.raises(InputError, match="this directory cannot be made"):
        run(small(*FEDAVG), directory=tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_that_is_stopped_while_its_directory_is_made_leaves_none(tmp_path: Path, error: BaseException) -> None:
    def stop(*arguments: object) -> None:
        assert {file.name for file in (tmp_path / "run").iterdir()} == {"lock", "config.toml"}
        with disk_errors(tmp_path):
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedstill.runs.directory.environment", stop)
        with pytest.raises((KeyboardInterrupt, RunError)) as caught:
            run(small(*FEDAVG), directory=tmp_path / "run")
    assert "checkpoint" not in str(caught.value)
    assert "resume" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_leaves_of_a_run_that_never_began_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    for name in ("lock", "config.toml", "environment.json.partial"):
        (path / name).write_text("")
    with pytest.raises(InputError, match="stopped before it began; give 'fedstill run' again with --out"):
        resume(path)
    (path / "mine").write_text("keep this")
    with pytest.raises(InputError, match=r"exists already; name another directory$"):
        run(small(*FEDAVG), directory=path)
    (path / "mine").unlink()
    assert len(run(small(*FEDAVG, "train.rounds=1"), directory=path).records) == 1
    assert not (path / "environment.json.partial").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.toml").write_text("")
    with pytest.raises(InputError, match="exists already"):
        run(small(*FEDAVG), directory=tmp_path / "own")


def test_a_run_whose_directory_is_removed_does_not_make_it_anew(tmp_path: Path) -> None:
    path = tmp_path / "run"

    class Remove(Callback):
        def on_client_end(self, round: int, done: int, of: int) -> None:
            if round == 2 and done == 1:
                shutil.rmtree(path)

    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written \(No such file") as caught:
        run(small(*FEDAVG), directory=path, callbacks=[Remove()])
    assert "resume" not in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, r"\(No space .*; make room"), (errno.EISDIR, r"\(Is a directory\); see to it that it can be")],
)
def test_an_error_of_the_disk_says_what_there_is_to_go_on_from(tmp_path: Path, number: int, says: str) -> None:
    path = tmp_path / "run"

    class Break(Callback):
        def __init__(self, at: int, patch: pytest.MonkeyPatch) -> None:
            self.at, self.patch = at, patch

        def on_client_end(self, round: int, done: int, of: int) -> None:
            if round == self.at and done == 1:
                self.patch.setattr("os.fsync", self.refuse)

        def refuse(self, file: int) -> None:
            raise OSError(number, os.strerror(number))

    said = rf"metrics\.jsonl: cannot be written {says} and go on with 'fedstill resume {path}'"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match=f"{said}, from round 1$"):
        run(small(*FEDAVG), directory=path, callbacks=[Break(1, patch)])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError, match=f"{said}, its checkpoint of round 1 is"):
        resume(path, callbacks=[Break(2, patch)])


def test_training_that_turns_non_finite_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    federation, _ = build(small(*FEDAVG))
    original = type(federation.trainer).__call__

    def breaking(self: Any, model: Any, work: Any) -> Any:
        if work.round == 2:
            work = type(work)(work.round, work.client, work.payload, work.state, work.send_label_counts)
            for value in work.payload.weights().params.values():
                value.fill_(float("nan"))
        return original(self, model, work)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(federation.trainer), "__call__", breaking)
        with pytest.raises(RunError, match=r"round 3, client \d: the training loss became nan in local step 1"):
            run(small(*FEDAVG), directory=path)
    assert checkpoints(path) == [1, 2]
    assert "stopped after round 2: round 3, client" in (path / "log.txt").read_text()
    assert last_state(path).server.weights.all_finite()


# Signals and a full disk, in processes of their own

COMMAND = [sys.executable, "-c", "import sys; from fedstill.cli import main; sys.exit(main())"]


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield the command line at work on a long run, once two rounds are recorded."""
    path, file = tmp_path / "run", tmp_path / "mine.toml"
    file.write_text(to_toml(small("method=scaffold", "train.rounds=100000")))

    def hear_ctrl_c() -> None:  # a job in the background inherits that it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [*COMMAND, "run", str(file), "--out", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=hear_ctrl_c,
    )
    try:
        for _ in range(6000):
            if process.poll() is not None or len(list((path / "checkpoints").glob("*.json"))) >= 2:
                break
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_resumable_run_and_says_how(
    tmp_path: Path, long_run: subprocess.Popen[str], number: signal.Signals
) -> None:
    path = tmp_path / "run"
    long_run.send_signal(number)
    _, said = long_run.communicate(timeout=60)
    assert long_run.returncode == 130
    assert said.rstrip().splitlines()[-1] == f"stopped; go on with: fedstill resume {path}"
    assert "Traceback" not in said
    done = len(read_metrics(path))
    assert checkpoints(path)[-1] == done
    assert f"stopped after round {done}" in (path / "log.txt").read_text()
    assert last_state(path).round == done


HIT = """
import os, resource, signal, sys
from pathlib import Path
from fedstill import cli
from fedstill.callbacks import Callback

path, by = Path(sys.argv.pop(1)), sys.argv.pop(1)

class Hit(Callback):
    def on_client_end(self, round, done, of):
        if round != 3 or done != 1:
            return
        if by == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        largest = max(file.stat().st_size for file in path.rglob("*.safetensors"))
        room = {"no room at all": 0, "room for all but a checkpoint": largest - 1}[by]
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

cli.display = lambda quiet: [Hit()]
cli.main()
"""


def hit_in_round_3(path: Path, by: str) -> subprocess.CompletedProcess[str]:
    """Run SCAFFOLD+FedFTG by the command line and let something happen to its process in the third round."""
    file = path.with_name("mine.toml")
    file.write_text(to_toml(small(*SCAFFOLD_FEDFTG)))
    return subprocess.run(
        [sys.executable, "-c", HIT, str(path), by, "run", str(file), "--out", str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path: Path, whole_runs: dict[str, tuple[Path, Result]]) -> None:
    path = tmp_path / "run"
    assert hit_in_round_3(path, "kill").returncode == -signal.SIGKILL
    assert checkpoints(path) == [1, 2]
    assert "stopped" not in (path / "log.txt").read_text(), "it had no time to say anything"
    assert_same_run(path, resume(path), *whole_runs["scaffold+fedftg"])


@pytest.mark.parametrize(
    ("by", "file"), [("no room at all", "metrics.jsonl"), ("room for all but a checkpoint", "round-00003")]
)
def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, by: str, file: str, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    path = tmp_path / "run"
    done = hit_in_round_3(path, by)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error ")
    assert "cannot be written" in done.stderr
    assert "fedstill resume" in done.stderr
    assert file in done.stderr
    assert checkpoints(path) == [1, 2]
    assert last_state(path).round == 2
    assert not list(path.rglob("*.partial"))
    assert_same_run(path, resume(path), *whole_runs["scaffold+fedftg"])


def test_events_that_cannot_be_written_stop_a_run_like_anything_else(
    tmp_path: Path, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    path = tmp_path / "run"

    class Full(Callback):
        def on_client_end(self, round: int, done: int, of: int) -> None:
            if round == 3 and done == 1:
                file = next((path / "tensorboard").iterdir())
                file.unlink()
                file.symlink_to("/dev/full")

    before = threading.active_count()
    with pytest.raises(RunError, match=r"tensorboard: cannot be written \(No space left on device\)"):
        run(small(*FEDAVG), directory=path, callbacks=[Full()])
    assert threading.active_count() == before, "no writer thread is left to complain later"
    assert checkpoints(path) == [1, 2]
    next((path / "tensorboard").iterdir()).unlink()
    assert_same_run(path, resume(path), *whole_runs["fedavg"])


# The command line on the same


def test_the_command_resumes_and_reports(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["fedstill", "resume", str(finished), "--quiet"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    shown = capsys.readouterr()
    assert "accuracy on test: " in shown.out
    assert "after round 4" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("damage", [damage_server, cut_manifest, other_run])
def test_the_command_refuses_a_damaged_checkpoint_in_one_line(
    finished: Path, damage: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(finished)
    before = files(finished)
    monkeypatch.setattr(sys, "argv", ["fedstill", "resume", str(finished)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "round-00003" in shown.err
    assert shown.out == ""
    assert files(finished) == before


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(
    tmp_path: Path, whole_runs: dict[str, tuple[Path, Result]]
) -> None:
    path = tmp_path / "run"
    stopped(small(*FEDAVG), path, Stop(client_of=0))
    assert checkpoints(path) == []
    assert store_of(path).load() is None
    assert_same_run(path, resume(path), *whole_runs["fedavg"])


def test_a_run_that_is_under_way_is_left_alone(tmp_path: Path) -> None:
    where = tmp_path / "run"

    class Meddler(Callback):
        refused: str = ""

        def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
            with pytest.raises(InputError, match="another process is running it"):
                resume(where)
            Meddler.refused = "yes"

    run(small(), directory=where, callbacks=[Meddler()])
    assert Meddler.refused
    assert len(resume(where).records) == small().train.rounds
