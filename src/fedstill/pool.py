"""Independent jobs in worker processes, with news from each while it runs."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import ModuleType
from typing import Any, Literal, Protocol, TypeVar

from fedstill.errors import FedstillError, RunError

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")
Message = tuple[Literal["news", "done", "refused", "failed", "dead"], Any]


class Job(Protocol[Result_co]):
    """A piece of work; it and all it tells and returns must be picklable."""

    def __call__(self, tell: Callable[[object], None]) -> Result_co:
        """Do the work; ``tell`` sends news to where it was started."""


@dataclass(frozen=True)
class Failure:
    """How a job ended that gave no result."""

    error: Exception


def run_jobs(
    jobs: Sequence[Job[Result]], workers: int, hear: Callable[[int, Any], None] = lambda job, news: None
) -> list[Result]:
    """Run every job in one of ``workers`` new processes; the first that fails ends all.

    Parameters and processes as :func:`outcomes` has them.

    Returns
    -------
    list
        The results in the order of ``jobs``.

    Raises
    ------
    FedstillError
        What a job raised first, or RunError where a process ended before its job did.
    """
    results: dict[int, Result] = {}
    with closing(outcomes(jobs, workers, hear)) as ended:
        for position, outcome in ended:
            if isinstance(outcome, Failure):
                raise outcome.error
            results[position] = outcome
    return [results[position] for position in range(len(jobs))]


def outcomes(
    jobs: Sequence[Job[Result]], workers: int, hear: Callable[[int, Any], None] = lambda job, news: None
) -> Generator[tuple[int, Result | Failure], None, None]:
    """Run every job in one of ``workers`` new processes, and yield how each ended as it does.

    A job that fails, or that takes its process with it, does not stop the others. The processes end with this
    generator, however it ends: finished, closed, or by Ctrl-C.

    Parameters
    ----------
    jobs : sequence of Job
        Started in this order.
    workers : int
        Jobs at a time.
    hear : callable
        ``hear(job, news)`` is called here, in the calling process, with the job's position and what it told.

    Yields
    ------
    (int, result or Failure)
        A job's position, and what it returned or how it failed.
    """
    waiting = deque(enumerate(jobs))
    busy: dict[Connection, int] = {}
    workers_by_pipe: dict[Connection, Worker] = {}

    def start() -> None:
        worker = Worker.start()
        workers_by_pipe[worker.pipe] = worker
        go_on(worker.pipe)

    def go_on(pipe: Connection) -> None:
        if waiting:
            busy[pipe], job = waiting.popleft()
            pipe.send(job)
        else:
            pipe.close()

    try:
        for _ in range(min(workers, len(jobs))):
            start()
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                kind, content = workers_by_pipe[pipe].receive()
                if kind == "news":
                    hear(busy[pipe], content)
                    continue
                position = busy.pop(pipe)
                if kind != "dead":
                    go_on(pipe)
                else:
                    pipe.close()
                    if waiting:
                        start()
                yield position, content if kind == "done" else Failure(content)
    finally:
        end(list(workers_by_pipe.values()))


@dataclass(frozen=True, eq=False)
class Worker:
    """A new process that does the jobs that come through its pipe, until that is closed or it is ended."""

    pipe: Connection
    process: SpawnProcess

    @staticmethod
    def start() -> Worker:
        """Start a process; it knows nothing of the program that started it but where modules are found."""
        context = get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there,), daemon=True)
        with _interrupts_ignored(), _main_hidden():
            process.start()
        there.close()
        return Worker(here, process)

    def receive(self) -> Message:
        """Wait for its next word; one that has died says so."""
        try:
            kind, content = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(timeout=5)
            code = self.process.exitcode or 0
            killed = f"was killed by signal {-code}; was there enough memory?"
            return "dead", RunError(f"a worker process {killed if code < 0 else f'ended with exit code {code}'}")
        return kind, RuntimeError(f"in a worker process:\n{content}") if kind == "failed" else content


def end(workers: Sequence[Worker]) -> None:
    """End processes, whatever they are doing."""
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join()
        worker.pipe.close()


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Let a process that starts here not import the program that was started: that may be a script without a guard."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


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
        except Exception:  # what was sent cannot be made here, such as an object of a module that is not found
            send("failed", traceback.format_exc())
            continue
        try:
            result = job(lambda news: send("news", news))
        except FedstillError as error:
            send("refused", error)
        except Exception:  # a mistake of the job: its traceback is for the program that has sent it
            send("failed", traceback.format_exc())
        else:
            send("done", result)
