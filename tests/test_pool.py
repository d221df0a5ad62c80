"""Jobs in worker processes: order, news, errors, ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from fedstill.errors import InputError, RunError
from fedstill.pool import Failure, outcomes, run_jobs


@dataclass(frozen=True)
class Square:
    number: int
    seconds: float = 0.0

    def __call__(self, tell: Callable[[object], None]) -> int:
        tell(self.number)
        time.sleep(self.seconds)
        return self.number**2


@dataclass(frozen=True)
class Fail:
    error: Exception

    def __call__(self, tell: Callable[[object], None]) -> int:
        raise self.error


@dataclass(frozen=True)
class Die:
    def __call__(self, tell: Callable[[object], None]) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


@dataclass(frozen=True)
class Leave:
    def __call__(self, tell: Callable[[object], None]) -> int:
        raise SystemExit(3)


def test_results_and_news_belong_to_their_jobs() -> None:
    heard: list[tuple[int, int]] = []
    jobs = [Square(3, 0.3), Square(5), Square(7)]
    assert run_jobs(jobs, 2, lambda job, news: heard.append((job, news))) == [9, 25, 49]
    assert sorted(heard) == [(0, 3), (1, 5), (2, 7)]
    assert run_jobs([], 2) == []


@pytest.mark.parametrize(
    ("job", "error", "text"),
    [
        (Fail(InputError("no such thing")), InputError, "no such thing"),
        (Fail(ValueError("a bug")), RuntimeError, "ValueError: a bug"),
        (Die(), RunError, "killed by signal 9"),
        (Leave(), RunError, "ended with exit code 3"),
    ],
)
def test_an_error_ends_all(job: Fail | Die | Leave, error: type[Exception], text: str) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=text):
        run_jobs([Square(2, 120), job], 2)
    assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()


def test_the_others_go_on_where_failures_are_told() -> None:
    jobs = [Fail(InputError("no such thing")), Square(3), Die(), Square(5), Fail(ValueError("a bug")), Square(7)]
    ended = dict(outcomes(jobs, 2))
    assert sorted(ended) == [0, 1, 2, 3, 4, 5]
    assert [ended[position] for position in (1, 3, 5)] == [9, 25, 49]
    errors = {position: one.error for position, one in ended.items() if isinstance(one, Failure)}
    assert [type(errors[position]) for position in (0, 2, 4)] == [InputError, RunError, RuntimeError]
    assert "killed by signal 9" in str(errors[2])
    assert "ValueError: a bug" in str(errors[4])
    assert not multiprocessing.active_children()


def test_leaving_early_ends_all() -> None:
    ended = outcomes([Square(3), Square(2, 120), Square(2, 120)], 2)
    assert next(ended) == (0, 9)
    ended.close()
    assert not multiprocessing.active_children()


def test_an_interrupt_ends_all() -> None:
    def interrupt(job: int, news: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's background job starts with SIGINT ignored, and so may the tests.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs([Square(2, 120), Square(3, 120)], 2, interrupt)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not multiprocessing.active_children()
