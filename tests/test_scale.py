"""Federations with many clients: what a round touches and holds, wherever the clients' states wait."""

from __future__ import annotations

import gc
import importlib
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedstill.build import build
from fedstill.callbacks import Callback, RunInfo
from fedstill.client_states import ClientStates
from fedstill.data.dataset import RawDataSet
from fedstill.errors import InputError, RunError
from fedstill.evaluation import LISTED_CLIENTS, Score, by_label_mix
from fedstill.execution import choices
from fedstill.experiment import resume, run
from fedstill.federation import FederationState, Record
from fedstill.methods.base import FederationInfo
from fedstill.runs import read_metrics
from fedstill.runs import store as files_of_clients
from fedstill.runs.checkpoint import CheckpointStore
from fedstill.runs.store import ClientIndex
from small import same_state, same_weights, small, untimed
from stopping import Stop, last_state, stopped

BUILD = importlib.import_module("fedstill.build")  # fedstill.build is the function too
MANY = [
    "method=scaffold",
    "data.clients=2000",
    "data.train_samples=4000",
    "data.test_samples=50",
    "train.participation=0.01",
    "model.hidden=[3]",
    "eval.ensemble_samples=10",
]
FEW = ["method=scaffold", "data.clients=20", "train.participation=0.15", "model.hidden=[3]"]


@pytest.fixture
def enough_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every name of a data set stand for 5,000 noisy images of 4 x 4."""
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (5000, 4, 4), dtype=np.uint8)
    y = draw.integers(0, 10, 5000)
    names = tuple(str(label) for label in range(10))
    raw = RawDataSet("noise", x, y, x[:0], y[:0], names, (0.5,), (0.3,), held_out=100)
    monkeypatch.setattr(BUILD, "load_raw", lambda *_: raw)


class Watch(Callback):
    """Calls something after every round."""

    def __init__(self, look: Callable[[Record], object]) -> None:
        self.look = look

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        self.look(record)


def client_files(path: Path) -> dict[str, int]:
    """Return the clients' files and when each was written."""
    found = [file for file in (path / "clients").rglob("*") if file.is_file()]
    return {f"{file.parent.name}/{file.name}": file.stat().st_mtime_ns for file in found}


def named(path: Path) -> set[str]:
    """Return the clients' files that the kept checkpoints name."""
    found = set()
    for manifest in (path / "checkpoints").glob("*.json"):
        entry = json.loads(manifest.read_text())["clients"]
        lines = map(json.loads, (path / entry["file"]).read_bytes()[: entry["bytes"]].splitlines())
        newest = {line["client"]: line["round"] for line in lines if "round" in line}
        found |= {f"{client}/round-{round:05d}.safetensors" for client, round in newest.items()}
    return found


def cohort_files(record: Record) -> set[str]:
    return {f"{client}/round-{record['round']:05d}.safetensors" for client in record["cohort"]}


# The same bits


@pytest.mark.usefixtures("enough_samples")
def test_two_thousand_clients_resume_to_the_same_bits_from_memory_and_from_disk(tmp_path: Path) -> None:
    made = {}
    for where in ("memory", "disk"):
        config = small(*MANY, f"execution.client_states={where}")
        whole = run(config, directory=tmp_path / where)
        stopped(config, tmp_path / f"stopped {where}", Stop(after=1))
        again = resume(tmp_path / f"stopped {where}")
        assert same_weights(whole.weights, again.weights)
        assert same_state(last_state(tmp_path / where), last_state(tmp_path / f"stopped {where}"))
        assert untimed(whole.records) == untimed(again.records)
        made[where] = (whole, last_state(tmp_path / where))
    assert same_weights(made["memory"][0].weights, made["disk"][0].weights)
    assert same_state(made["memory"][1], made["disk"][1])
    assert untimed(made["memory"][0].records) == untimed(made["disk"][0].records)


@pytest.mark.parametrize(("begin", "then"), [("disk", "memory"), ("memory", "disk")])
def test_the_place_may_change_between_two_runs(tmp_path: Path, begin: str, then: str) -> None:
    keys = [*FEW, "train.rounds=6", "checkpoint.every=4"]
    expected = run(small(*keys), directory=tmp_path / "whole")
    stopped(small(*keys, f"execution.client_states={begin}"), tmp_path / "run", Stop(after=3))
    file = tmp_path / "run/config.toml"
    file.write_text(file.read_text().replace(f'client_states = "{begin}"', f'client_states = "{then}"'))
    assert same_weights(resume(tmp_path / "run").weights, expected.weights)
    assert same_state(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))


def test_clients_that_take_part_again_before_a_checkpoint_leave_no_files(tmp_path: Path) -> None:
    keys = ["method=scaffold", "data.clients=6", "train.participation=0.5", "train.rounds=8", "checkpoint.every=3"]
    expected = run(small(*keys), directory=tmp_path / "whole")
    path = tmp_path / "run"
    stopped(small(*keys, "execution.client_states=disk"), path, Stop(after=5))
    for file in (path / "checkpoints").glob("round-00005*"):  # as after a kill, which leaves no time for it
        file.unlink()
    assert same_weights(resume(path).weights, expected.weights)
    assert client_files(path).keys() == named(path)


def test_label_counts_come_back_whatever_round_they_came_in(tmp_path: Path) -> None:
    keys = [*FEW, "fusion.head=class-weighted", "train.rounds=4"]
    whole = run(small(*keys), directory=tmp_path / "whole")
    stopped(small(*keys, "execution.client_states=disk"), tmp_path / "run", Stop(after=2))
    again = resume(tmp_path / "run")
    assert untimed(again.records) == untimed(whole.records), "nobody is asked twice, which the bytes would show"
    seen = {client for record in whole.records for client in record["cohort"]}
    assert last_state(tmp_path / "run").label_counts.keys() == seen


def test_own_models_and_last_uploads_are_measured_from_disk_as_from_memory() -> None:
    for keys in (["method=alone"], ["method=moon", 'eval.models=["sel","all"]', "model.projection=4"]):
        keys = [*keys, "data.client_test=0.3", 'eval.on=["test","clients"]', "train.participation=0.5"]
        found = [run(small(*keys, f"execution.client_states={where}")).records for where in ("memory", "disk")]
        assert untimed(found[0]) == untimed(found[1])


# What a round touches


@pytest.mark.usefixtures("enough_samples")
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_round_touches_its_cohorts_files_and_no_others(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before, read, looked = tmp_path / "run", dict[str, int](), list[Path](), list[str]()
    sizes: list[int] = []
    original, rglob = files_of_clients.read_tensors, Path.rglob

    def reading(file: Path, *rest: Any) -> Any:
        read.append(file)
        return original(file, *rest)

    def looking(self: Path, pattern: str) -> Any:
        looked.append(pattern)
        return rglob(self, pattern)

    def look(record: Record) -> None:
        now = {str(k): v for k, v in client_files(path).items()}
        looked.remove("*")  # this function's own
        assert {name for name, time in now.items() if before.get(name) != time} == cohort_files(record)
        assert len(read) <= len(record["cohort"])
        sizes.append((path / f"checkpoints/round-{record['round']:05d}.json").stat().st_size)
        before.clear()
        before.update(now)
        read.clear()

    monkeypatch.setattr(files_of_clients, "read_tensors", reading)
    monkeypatch.setattr(Path, "rglob", looking)
    config = small(*MANY, f"execution.client_states={where}", "train.rounds=6", "train.participation=0.04")
    result = run(config, directory=path, callbacks=[Watch(look)])
    assert looked == ["round-*"], "all clients' files are looked through once in a process"
    assert max(sizes) - min(sizes) <= 4, "a checkpoint does not grow with the clients seen, but for digits"
    again = [set(one["cohort"]) & set(other["cohort"]) for one, other in zip(result.records, result.records[1:])]
    assert any(again), "someone took part twice, so that states were read"


@pytest.mark.usefixtures("enough_samples")
def test_the_disk_holds_the_states_and_memory_none() -> None:
    def live() -> int:
        gc.collect()  # below, isinstance would wake lazy objects
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    held = {}
    for where in ("memory", "disk"):
        counts: list[int] = []
        keys = [*MANY, "train.rounds=5", "eval.on=[]", f"execution.client_states={where}"]
        run(small(*keys), callbacks=[Watch(lambda _, counts=counts: counts.append(live()))])  # type: ignore[misc]
        held[where] = counts
    tensors_of_a_state = 4  # the weights and biases of two layers
    assert held["memory"][-1] - held["memory"][1] >= 50 * tensors_of_a_state
    assert held["disk"][-1] - held["disk"][1] < tensors_of_a_state


def test_a_checkpoint_lets_go_of_what_lies_on_disk(tmp_path: Path) -> None:
    for where in ("memory", "disk"):
        federation, _ = build(small(*FEW, f"execution.client_states={where}"))
        store = CheckpointStore(tmp_path / where, 2, "test", client_states=where)  # type: ignore[arg-type]
        state, seen = federation.start(), set[int]()
        for _ in range(4):
            state, record = federation.run_round(state)
            assert isinstance(state.clients, ClientStates)
            new = set(record["cohort"])
            assert set(state.clients.in_memory) == (new if where == "disk" else seen | new)
            earlier, state = state, store.save(state)
            assert isinstance(state.clients, ClientStates)
            seen |= new
            assert set(state.clients.in_memory) == (set() if where == "disk" else seen)
            assert same_state(earlier, state)
        assert set(state.clients) == seen


def test_without_a_run_directory_the_states_lie_in_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: set[int] = set()

    def look(record: Record) -> None:
        seen.update(record["cohort"])
        assert len(list(tmp_path.rglob("*.safetensors"))) == len(seen), "one file for each client that has a state"

    keys = [*FEW, "train.rounds=5"]
    found = run(small(*keys, "execution.client_states=disk"), callbacks=[Watch(look)])
    assert not list(tmp_path.iterdir())
    assert same_weights(found.weights, run(small(*keys)).weights)
    with pytest.raises(KeyboardInterrupt):
        run(small(*keys, "execution.client_states=disk"), callbacks=[Stop(after=2)])
    assert not list(tmp_path.iterdir())


# The index


def test_an_index_is_begun_anew_before_outdated_lines_outweigh_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClientIndex, "SLACK", 0)
    keys = ["method=scaffold", "data.clients=6", "train.participation=0.5", "train.rounds=14", "checkpoint.keep=3"]
    path, begun = tmp_path / "run", set[str]()

    def look(record: Record) -> None:
        newest = json.loads((path / f"checkpoints/round-{record['round']:05d}.json").read_text())["clients"]
        begun.add(newest["file"])
        lines = (path / newest["file"]).read_bytes()[: newest["bytes"]].splitlines()
        assert len(lines) <= 2 * len({json.loads(line)["client"] for line in lines})

    expected = run(small(*keys), directory=path, callbacks=[Watch(look)])
    assert len(begun) > 2
    kept = {json.loads(file.read_text())["clients"]["file"] for file in (path / "checkpoints").glob("*.json")}
    assert {f"checkpoints/{file.name}" for file in (path / "checkpoints").glob("*.jsonl")} == kept
    for round in (14, 13):  # every checkpoint that is kept can be gone on from
        (path / f"checkpoints/round-{round:05d}.json").unlink()
    assert last_state(path).round == 12
    assert same_weights(resume(path).weights, expected.weights)


@pytest.mark.parametrize("extra", [b'{"client": 1, "rou', b'{"client": 1, "round": 9, "sha256": "0"}\n'])
def test_lines_that_no_checkpoint_names_are_nobodys(tmp_path: Path, extra: bytes) -> None:
    keys = [*FEW, "train.rounds=5"]
    expected = run(small(*keys), directory=tmp_path / "whole")
    path = tmp_path / "run"
    stopped(small(*keys), path, Stop(after=3))
    with next((path / "checkpoints").glob("*.jsonl")).open("ab") as file:
        file.write(extra)
    assert same_weights(resume(path).weights, expected.weights)
    assert same_state(last_state(path), last_state(tmp_path / "whole"))


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run(small(*FEW), directory=path)
    index = next((path / "checkpoints").glob("*.jsonl"))
    data = index.read_bytes()
    index.write_bytes(data.replace(b'"round": 2', b'"round": 1', 1))
    with pytest.raises(InputError, match=r"index-00001\.jsonl: corrupt.*to go on from round-00001 instead, remove"):
        resume(path)
    index.unlink()
    with pytest.raises(InputError, match=r"index-00001\.jsonl: a checkpoint names this file, and it cannot be read"):
        resume(path)


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_state_on_disk_is_refused_when_its_client_is_in_a_cohort(tmp_path: Path, damage: str) -> None:
    keys = ["method=scaffold", "data.clients=4", "train.rounds=3", "execution.client_states=disk"]
    path = tmp_path / "run"
    stopped(small(*keys), path, Stop(after=2))
    file = path / "clients/3/round-00002.safetensors"
    whole = file.read_bytes()
    if damage == "flip":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    else:
        file.unlink()
    with pytest.raises(RunError, match=r"clients/3/round-00002\.safetensors: .*; put it back, or remove") as caught:
        resume(path)
    assert "\n" not in str(caught.value)
    assert [record["round"] for record in read_metrics(path)] == [1, 2]
    file.write_bytes(whole)
    assert same_weights(resume(path).weights, run(small(*keys)).weights)


def test_any_mapping_of_states_can_be_saved(tmp_path: Path) -> None:
    federation, _ = build(small(*FEW))
    state, _ = federation.run_round(federation.start())
    once = CheckpointStore(tmp_path, 1, "test", client_states="disk").save(state)
    following, _ = federation.run_round(once)
    other = CheckpointStore(tmp_path / "other", 1, "test")  # one that has written none of them yet
    other.save(following)
    found = CheckpointStore(tmp_path / "other", 1, "test").load()
    assert found is not None
    assert same_state(found, following)


def test_a_group_with_nothing_in_it_comes_back(tmp_path: Path) -> None:
    # Such as MOON's buffers of a model that has none.
    models = build(small(*FEW))[0].start().models
    state = FederationState(1, models, {0: {"buffers": {}, "params": {"w": torch.ones(1)}}})
    CheckpointStore(tmp_path, 1, "test").save(state)
    found = CheckpointStore(tmp_path, 1, "test").load()
    assert found is not None
    assert found.clients[0].keys() == {"buffers", "params"}
    assert found.clients[0]["buffers"] == {}
    assert same_state(found, state)


# Records, settings, sizes


def test_records_do_not_grow_with_the_federation() -> None:
    score = Score(torch.tensor([1, 3]), torch.tensor([4, 4]), 0.0)  # accuracies by class: 1/4 and 3/4
    few = by_label_mix(score, [[1, 0]] * 20 + [[0, 1]] * (LISTED_CLIENTS - 20))
    assert few == [0.25] * 20 + [0.75] * (LISTED_CLIENTS - 20)
    # Of 300 clients the worst tenth are 30: twenty with 1/4 and ten with 3/4. One that holds nothing does not count.
    many = by_label_mix(score, [[1, 0]] * 20 + [[0, 1]] * 280 + [[0, 0]])
    assert many == {
        "mean": pytest.approx((20 * 0.25 + 280 * 0.75) / 300),
        "worst_decile": pytest.approx((20 * 0.25 + 10 * 0.75) / 30),
    }


@pytest.mark.usefixtures("enough_samples")
def test_a_line_of_metrics_is_as_long_with_many_clients_as_with_few() -> None:
    keys = [*MANY, "data.client_test=0.3", 'eval.on=["test","clients"]', "train.rounds=1"]
    lengths = []
    for clients in (400, 2000):
        (record,) = run(small(*keys, f"data.clients={clients}", f"train.participation={20 / clients}")).records
        assert record["fused"]["clients"]["per_client"].keys() == {"mean", "worst_decile"}
        lengths.append(len(json.dumps(record)))
    assert math.isclose(*lengths, rel_tol=0.15)


def test_auto_asks_what_a_model_for_every_client_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    federation, _ = build(small(*FEW))
    assert federation.config.execution.client_states == "memory"
    (size,) = {sum(value.nbytes for value in federation.initial.params.values())}
    for memory, keys, wanted in (
        (10 * 20 * size, [], "memory"),
        (10 * 20 * size - 1, [], "disk"),
        (10 * 20 * size, ['eval.models=["all"]'], "disk"),
        (1, ["execution.client_states=memory"], "memory"),
    ):
        monkeypatch.setattr(choices, "memory_of", lambda device, memory=memory: memory)
        assert build(small(*FEW, *keys))[0].config.execution.client_states == wanted


def test_omega_sums_the_federation_once() -> None:
    class Counted(tuple[int, ...]):
        asked = 0

        def __getitem__(self, at: Any) -> Any:
            Counted.asked += 1
            return super().__getitem__(at)

    info = FederationInfo(Counted(range(1, 1001)), 10, (1, 4, 4))
    assert [info.omega(client) for client in range(3)] == [pytest.approx(n * 1000 / 500500) for n in (1, 2, 3)]
    assert Counted.asked <= 1000 + 3
