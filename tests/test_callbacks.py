"""Callbacks: when they are called and with what, how they end a run, and that they change nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fedstill
from fedstill import Callback, InputError, RunError, RunInfo, StopRun
from fedstill.evaluation import Record
from fedstill.runs import read_metrics
from small import SMALL, same_weights, small, untimed

FOUR = ("train.rounds=4",)


class Note(Callback):
    """Writes down what it is told; raises what it is given, at one event of one round."""

    def __init__(self, told: list[Any], name: str = "note", at: str = "", failure: BaseException | None = None) -> None:
        self.told, self.name, self.at, self.failure = told, name, at, failure

    def note(self, event: str, round: int, *more: Any) -> None:
        self.told.append((self.name, event, round, *more))
        if self.failure is not None and self.at == f"{event} {round}":
            raise self.failure

    def on_run_start(self, run: RunInfo) -> None:
        self.note("start", run.state.round, len(run.records))

    def on_client_end(self, round: int, done: int, of: int) -> None:
        self.note("client", round, done, of)

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        self.note("round", round, record["round"], run.state.round, len(run.records))

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        self.note("end", run.state.round, error)


@pytest.fixture(scope="module")
def whole() -> fedstill.Result:
    """Return four rounds that nothing stopped."""
    return fedstill.run(small(*FOUR))


def checkpoints(path: Path) -> list[int]:
    return sorted(int(file.stem.removeprefix("round-")) for file in (path / "checkpoints").glob("*.json"))


def log(path: Path) -> list[str]:
    """Return the log's lines without their times."""
    return [line.split(" ", 2)[2] for line in (path / "log.txt").read_text().splitlines()]


# When, and with what


def test_the_order_of_the_calls() -> None:
    told: list[Any] = []
    fedstill.run(small("data.clients=2"), callbacks=[Note(told, "a"), Note(told, "b")])
    assert told == [
        *[(name, "start", 0, 0) for name in "ab"],
        *[(name, "client", 1, done, 2) for done in (1, 2) for name in "ab"],
        *[(name, "round", 1, 1, 1, 1) for name in "ab"],
        *[(name, "client", 2, done, 2) for done in (1, 2) for name in "ab"],
        *[(name, "round", 2, 2, 2, 2) for name in "ab"],
        *[(name, "end", 2, None) for name in "ba"],
    ]


def test_a_function_is_called_after_every_round() -> None:
    told: list[tuple[int, float, float]] = []

    def watch(round: int, record: Record, run: RunInfo) -> None:
        federation = run.federation
        score = fedstill.evaluate(
            federation.model, run.state.server.weights, federation.evaluation.sets["test"], 10, batch_size=1000
        )
        told.append((round, record["fused"]["test"]["accuracy"], score.accuracy))

    result = fedstill.run(small(), callbacks=[watch, lambda *told: True, partial(print, end="")])
    assert [(round, accuracy) for round, accuracy, _ in told] == list(result.accuracies().items())
    assert [accuracy for _, accuracy, _ in told] == [accuracy for *_, accuracy in told]


def test_what_a_callback_sees_is_on_the_disk_already(tmp_path: Path) -> None:
    path = tmp_path / "run"
    seen: list[Any] = []

    def look(round: int, record: Record, run: RunInfo) -> None:
        assert run.directory == path
        seen.append((round, [line["round"] for line in read_metrics(path)], checkpoints(path)))

    fedstill.run(small(), directory=path, callbacks=[look])
    assert seen == [(1, [1], [1]), (2, [1, 2], [1, 2])]


def test_a_run_with_callbacks_has_the_bits_of_one_without(tmp_path: Path) -> None:
    method = "method=fedavg+fedftg"

    def draw(round: int, record: Record, run: RunInfo) -> None:
        torch.manual_seed(round)
        torch.rand(7)

    plain = fedstill.run(small(method), directory=tmp_path / "plain")
    called = fedstill.run(small(method), directory=tmp_path / "called", callbacks=[draw, Note([])])
    assert same_weights(plain.weights, called.weights)
    assert untimed(plain.records) == untimed(called.records) == untimed(read_metrics(tmp_path / "called"))
    assert (tmp_path / "plain" / "config.toml").read_text() == (tmp_path / "called" / "config.toml").read_text()


def test_a_resumed_run_calls_for_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fedstill.run(small(), directory=path, callbacks=[Note([], at="round 1", failure=KeyboardInterrupt())])
    told: list[Any] = []
    fedstill.resume(path, callbacks=[Note(told)])
    assert [entry[1:] for entry in told if entry[1] != "client"] == [
        ("start", 1, 1),
        ("round", 2, 2, 2, 2),
        ("end", 2, None),
    ]
    told.clear()
    fedstill.resume(path, callbacks=[Note(told)])
    assert [entry[1:] for entry in told] == [("start", 2, 2), ("end", 2, None)]


# What ends a run


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    ("at", "event", "done"),
    [("round 2", "on_round_end", 2), ("client 3", "on_client_end", 2), ("start 0", "on_run_start", 0)],
)
def test_an_exception_ends_the_run_and_it_can_be_resumed(
    tmp_path: Path, at: str, event: str, done: int, every: int, whole: fedstill.Result
) -> None:
    path, told = tmp_path / "run", []
    keys = (*FOUR, f"checkpoint.every={every}")
    broken = Note(told, "broken", at, KeyError("accuracy"))
    with pytest.raises(RunError, match=f"^callback Note failed in {event}: KeyError: 'accuracy'$") as caught:
        fedstill.run(small(*keys), directory=path, callbacks=[Note(told, "whole"), broken])
    assert caught.value.__cause__ is broken.failure
    assert [line["round"] for line in read_metrics(path)] == list(range(1, done + 1))
    assert checkpoints(path)[-1:] == ([done] if done else [])
    assert log(path)[-1] == f"stopped after round {done}: {caught.value}"
    # Those that had started are told, and with what.
    assert ("whole", "end", done, caught.value) in told
    assert (("broken", "end", done, caught.value) in told) == (event != "on_run_start")
    assert same_weights(fedstill.resume(path).weights, whole.weights)


def test_an_exception_in_a_run_without_a_directory() -> None:
    def watch(round: int, record: Record, run: RunInfo) -> None:
        raise ValueError("no")

    with pytest.raises(RunError, match=r"^callback watch failed in on_round_end: ValueError: no$"):
        fedstill.run(small(), callbacks=[watch])


@pytest.mark.parametrize(
    ("at", "done"),
    [("round 1", 1), ("client 2", 1), ("client 1", 0), ("start 0", 0)],
)
def test_a_callback_stops_a_run_early(tmp_path: Path, at: str, done: int, whole: fedstill.Result) -> None:
    path, told = tmp_path / "run", []
    early = Note(told, "early", at, StopRun("good enough"))
    result = fedstill.run(small(*FOUR), directory=path, callbacks=[early, Note(told, "other")])
    assert result.stopped == "Note: good enough"
    assert [record["round"] for record in result.records] == list(range(1, done + 1))
    assert checkpoints(path)[-1:] == ([done] if done else [])
    assert log(path)[-1] == f"stopped after round {done} by Note: good enough"
    ends = [(name, type(error), str(error)) for name, event, _, *(error,) in filter(is_end, told)]
    assert ends == [(name, StopRun, "Note: good enough") for name in ("other", "early")]
    # The other callback had the same rounds, although the first one of them wished to stop.
    rounds = {name: [entry[2] for entry in told if entry[:2] == (name, "round")] for name in ("early", "other")}
    assert rounds["early"] == rounds["other"] == list(range(1, done + 1))

    resumed = fedstill.resume(path)
    assert resumed.stopped is None
    assert same_weights(resumed.weights, whole.weights)
    assert untimed(resumed.records) == untimed(whole.records)
    assert log(path)[-1] == "finished"


def is_end(entry: Any) -> bool:
    return bool(entry[1] == "end")


def test_a_run_that_is_stopped_between_checkpoints_gets_one(tmp_path: Path) -> None:
    def enough(round: int, record: Record, run: RunInfo) -> None:
        if len(run.records) == 2:
            raise StopRun

    result = fedstill.run(small(*FOUR, "checkpoint.every=3"), directory=tmp_path / "run", callbacks=[enough])
    assert result.stopped == "enough"
    assert checkpoints(tmp_path / "run") == [2]


def test_a_wish_to_stop_after_the_last_round_comes_too_late(tmp_path: Path) -> None:
    told: list[Any] = []
    last = Note(told, at="round 2", failure=StopRun("done"))
    result = fedstill.run(small(), directory=tmp_path / "run", callbacks=[last])
    assert result.stopped is None
    assert told[-1] == ("note", "end", 2, None)
    assert log(tmp_path / "run")[-1] == "finished"


def test_a_callback_that_fails_at_the_end_does_not_hide_how_the_run_ended(tmp_path: Path) -> None:
    told: list[Any] = []
    clumsy = Note(told, "clumsy", "end 2", OSError("gone"))
    with pytest.raises(RunError, match=r"callback Note failed in on_run_end: OSError: gone"):
        fedstill.run(small(), directory=tmp_path / "run", callbacks=[Note(told, "first"), clumsy])
    assert told[-1] == ("first", "end", 2, None)
    assert log(tmp_path / "run")[-1] == "finished"

    def fail(round: int, record: Record, run: RunInfo) -> None:
        raise ValueError("the real reason") if round == 2 else StopIteration

    clumsy.at = "end 1"
    with pytest.raises(RunError, match=r"callback fail failed in on_round_end: StopIteration") as caught:
        fedstill.run(small(), callbacks=[clumsy, fail])
    assert caught.value.__notes__ == ["callback Note failed in on_run_end: OSError: gone"]


# What is refused


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([3], r"callbacks\[0\]: 3 is neither a fedstill.Callback nor a function"),
        ([print, Note], r"callbacks\[1\]: Note is a class; give an object of it"),
        ([lambda record: None], r"callbacks\[0\]: <lambda> is to be called with \(round, record, run\)"),
        (Note([]), r"is not a list; write callbacks=\[...\]"),
    ],
)
@pytest.mark.parametrize("go", ["run", "resume"])
def test_what_is_no_callback_is_refused_before_anything_is_done(tmp_path: Path, given: Any, says: str, go: str) -> None:
    path = tmp_path / "run"
    calls: dict[str, Callable[[], object]] = {
        "run": lambda: fedstill.run(SMALL, directory=path, callbacks=given),
        "resume": lambda: fedstill.resume(path, callbacks=given),
    }
    if go == "resume":
        fedstill.run(SMALL, "train.rounds=1", directory=path)
    before = log(path) if go == "resume" else None
    with pytest.raises(InputError, match=says):
        calls[go]()
    assert (log(path) if path.exists() else None) == before
