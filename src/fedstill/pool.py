"""Independent jobs in worker processes, with news from each while it runs."""

from __future__ import annotations

import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Literal, Protocol, TypeVar

from fedstill.errors import FedstillError, RunError

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")
Message = tuple[Literal["news", "done", "refused", "failed"], Any]


class Job(Protocol[Result_co]):
    """A piece of work; it and all it tells and returns must be picklable."""

    def __call__(self, tell: Callable[[object], None]) -> Result_co:
        """Do the work; ``tell`` sends news to where it was started."""


def run_jobs(
    jobs: Sequence[Job[Result]], workers: int, hear: Callable[[int, Any], None] = lambda job, news: None
) -> list[Result]:
    """Run every job in one of ``workers`` new processes.

    The processes end with this call, however it ends: finished, by an error in a job, or by Ctrl-C.

    Parameters
    ----------
    jobs : sequence of Job
        Started in this order.
    workers : int
        Jobs at a time.
    hear : callable
        ``hear(job, news)`` is called here, in the calling process, with the job's position and what it told.

    Returns
    -------
    list
        The results in the order of ``jobs``.

    Raises
    ------
    FedstillError
        What a job raised first, or RunError where a process ended before its job did.
    """
    context = get_context("spawn")
    waiting = deque(enumerate(jobs))
    results: dict[int, Result] = {}
    busy: dict[Connection, int] = {}
    processes: dict[Connection, SpawnProcess] = {}

    def go_on(pipe: Connection) -> None:
        if waiting:
            busy[pipe], job = waiting.popleft()
            pipe.send(job)
        else:
            pipe.close()

    try:
        for _ in range(min(workers, len(jobs))):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,), daemon=True)
            with _interrupts_ignored():
                process.start()
            processes[here] = process
            there.close()
            go_on(here)
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                kind, content = _receive(pipe, processes[pipe])
                if kind == "news":
                    hear(busy[pipe], content)
                    continue
                if kind != "done":
                    raise content if kind == "refused" else RuntimeError(f"in a worker process:\n{content}")
                results[busy.pop(pipe)] = content
                go_on(pipe)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()
    return [results[position] for position in range(len(jobs))]


def _receive(pipe: Connection, process: SpawnProcess) -> Message:
    try:
        message: Message = pipe.recv()
    except (EOFError, ConnectionError) as error:
        process.join(timeout=5)
        code = process.exitcode or 0
        how = f"was killed by signal {-code}; was there enough memory?" if code < 0 else f"ended with exit code {code}"
        raise RunError(f"a worker process {how}") from error
    return message


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Let a process that starts here inherit that Ctrl-C is not for it: its parent ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(pipe: Connection) -> None:
    """Do what comes through the pipe until it is closed; a worker whose parent is gone ends at its next word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def send(kind: str, content: object) -> None:
        try:
            pipe.send((kind, content))
        except ConnectionError:
            raise SystemExit from None

    while True:
        try:
            job: Job[object] = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            result = job(lambda news: send("news", news))
        except FedstillError as error:
            send("refused", error)
        except Exception:
            send("failed", traceback.format_exc())
        else:
            send("done", result)
