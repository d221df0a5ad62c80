"""Clients trained in processes of their own: the bits of serial, errors, ends, and when `auto` takes them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedstill.build import build
from fedstill.client import ClientWork
from fedstill.errors import InputError, RunError
from fedstill.execution import processes
from fedstill.execution.parcels import Inbox, Outbox
from fedstill.execution.processes import ProcessExecutor, dealt
from fedstill.methods.fedavg import FedAvgObjective
from fedstill.payload import Payload
from small import play, same_state, small, untimed

TWO = ["execution.executor=processes", "execution.workers=2"]
SKEWED = ["data.partition=dirichlet-per-class", "data.beta=1.0", "data.min_size=5"]


@pytest.mark.parametrize(
    "keys",
    [
        ["method=scaffold+fedftg", "train.participation=0.75", *SKEWED],
        ["method=moon", "train.rounds=3", "moon.previous_models=2", "model.name=cnn", "model.width=4"],
        ["method=fedmd", "public.name=digits", "fedmd.public_epochs=1", "fedmd.private_epochs=1"],
    ],
    ids=lambda keys: keys[0],
)
def test_processes_give_the_bits_of_serial(keys: list[str]) -> None:
    _, serial, records = play(*keys)
    federation, state, found = play(*keys, *TWO)
    assert type(federation.executor).__name__ == "ProcessExecutor"
    assert same_state(state, serial)
    assert untimed(found) == untimed(records)
    assert not multiprocessing.active_children()


def test_an_error_names_the_client_and_the_next_round_starts_anew() -> None:
    federation, _ = build(small(*TWO, "local.clip_norm=none"))
    state, usual = federation.start(), federation.trainer
    federation.trainer = build(small("local.lr=1e30", "local.clip_norm=none"))[0].trainer
    with pytest.raises(RunError, match=r"round 1, client [0-3]: the training loss became"):
        federation.run_round(state)
    assert not multiprocessing.active_children()
    federation.trainer = usual
    after, _ = federation.run_round(state)
    federation.executor.close()
    assert same_state(after, play("local.clip_norm=none", rounds=1)[1])


def test_a_process_that_is_killed_is_an_error_not_a_hang() -> None:
    federation, _ = build(small(*TWO))
    state, _ = federation.run_round(federation.start())
    victim = multiprocessing.active_children()[0].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(RunError, match="worker process was killed by signal 9"):
        federation.run_round(state)
    assert not multiprocessing.active_children()


def test_a_caller_that_stops_in_the_middle_ends_the_processes() -> None:
    federation, _ = build(small(*TWO))
    state = federation.start()
    results = federation.executor.run(federation.trainer, [federation.work(state, client) for client in range(4)])
    assert next(iter(results)).client in range(4)
    results.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_clients_are_dealt_by_their_steps() -> None:
    works = [ClientWork(0, client, Payload(), {}) for client in range(5)]
    # 9 steps to the first worker, 5 and 4 to the second; 3 to the first of equals, and 1 to the second, which has less.
    parts = dealt(works, [4, 9, 1, 5, 3], 2)
    assert [[work.client for work in part] for part in parts] == [[1, 4], [0, 2, 3]]
    assert dealt(works[:1], [7], 3)[1:] == [[], []]


def test_what_is_sent_arrives_to_the_bit() -> None:
    big = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    content = {
        "big": big, "again": big, "column": big.view(100, 10)[:, 3], "empty": torch.empty(0, 3),
        "half": big.bfloat16(), "counts": torch.tensor([1, 2], dtype=torch.int32), "one": torch.tensor(1.5),
        "nan": torch.tensor([float("nan"), -0.0]), "true": torch.tensor([True, False]), "text": "and more",
    }  # fmt: skip
    out, inbox = Outbox(), Inbox()
    found = inbox.take(out.put(content))
    assert found.pop("text") == content.pop("text")
    for name, value in content.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found[name], value))
        assert torch.equal(one, other)
    assert found["again"] is found["big"], "a broadcast to many clients is written once"
    assert out.used < 1.8 * big.numel() * 4


def test_what_is_sent_later_leaves_what_came_before_alone() -> None:
    out, inbox = Outbox(), Inbox()
    first = inbox.take(out.put([torch.ones(8)]))
    assert out.put([torch.ones(8)]).memory is None, "there is room for a second one"
    larger = out.put([torch.full((5000,), 2.0)])
    assert larger.memory is not None
    assert torch.equal(inbox.take(larger)[0], torch.full((5000,), 2.0))
    out.clear()
    again = inbox.take(out.put([torch.full((5000,), 3.0)]))
    assert torch.equal(again[0], torch.full((5000,), 3.0))
    assert torch.equal(first[0], torch.ones(8))


def chosen(*keys: str) -> str:
    """Return what the executor `auto` becomes."""
    federation, notes = build(small("execution.executor=auto", "execution.workers=2", *keys))
    assert notes == []
    return federation.config.execution.executor


def test_auto_takes_processes_for_long_runs_of_small_models() -> None:
    # 200 samples, 4 clients, batches of 16: 4 x 4 steps a round.
    assert chosen("train.rounds=1249") == "threads"
    assert chosen("train.rounds=1250") == "processes"
    assert chosen("train.rounds=2499", "train.participation=0.5") == "threads"
    assert chosen("train.rounds=2500", "train.participation=0.5") == "processes"
    assert chosen("train.rounds=1250", "model.name=cnn", "model.width=4") == "threads"
    assert chosen("train.rounds=9999", "train.participation=0.25") == "threads", "one client in a round"


class Unsendable(FedAvgObjective):
    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("it holds an open file")


def test_what_cannot_be_sent_is_trained_on_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    federation, _ = build(small())
    federation.trainer.objective = Unsendable()
    why = processes.why_no_processes(federation.trainer, [federation.model])
    assert why is not None
    assert "it holds an open file" in why

    monkeypatch.setattr(processes, "SHARED_MEMORY", Path(__file__).parent)
    monkeypatch.setattr(processes.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**15})())
    federation, notes = build(small(*TWO))
    assert federation.config.execution.executor == "threads"
    # 200 pictures of 64 float32 and their labels take 52,800 bytes.
    assert [note for note in notes if "0 MiB of shared memory" in note and "trained on threads" in note]


def test_weights_without_room_are_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(memory: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(RunError, match=r"no shared memory for 1 MiB .*--shm-size.*executor = 'threads'"):
        Outbox().put(torch.zeros(2**17))


def test_there_are_no_more_processes_than_clients_in_a_round() -> None:
    keys = ["execution.executor=processes", "execution.workers=16", "data.clients=4"]
    counts = [build(small(*keys, f"train.participation={part}"))[0].executor for part in (1.0, 0.5, 0.3)]
    # 0.3 of 4 clients are 1.2: one.
    assert [executor.count for executor in counts if isinstance(executor, ProcessExecutor)] == [4, 2, 1]


def test_processes_are_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"execution\.executor = 'processes' trains on a CPU"):
        build(small(*TWO, "execution.device=cuda"))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import fedstill
from fedstill.methods.fedavg import FedAvgObjective
from small import small

class Mine(FedAvgObjective):
    pass

result = fedstill.run(small("execution.executor=processes", "execution.workers=2"))
print(result.federation.config.execution.executor, result.records[-1]["round"])

from fedstill.execution.processes import why_no_processes
result.federation.trainer.objective = Mine()
print(why_no_processes(result.federation.trainer, [result.federation.model]))
"""


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "processes 2"
    assert second == "its method or its model is defined in the program that was started, not in a module"
