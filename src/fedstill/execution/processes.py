"""Several clients at a time, each worker a process with an interpreter of its own.

Threads share Python's lock, which small models hold most of the time; processes do not. Samples and weights are in
memory that processes share; per round, a worker gets its clients' work in one message and answers client by client.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedstill.data.dataset import Samples
from fedstill.execution.allocator import keep_freed_memory
from fedstill.execution.executors import Models, SerialExecutor
from fedstill.execution.parcels import Inbox, Outbox, Parcel, pickled
from fedstill.pool import Worker, end

if TYPE_CHECKING:
    from fedstill.client import ClientResult, ClientWork, LocalTrainer

SHARED_MEMORY = Path("/dev/shm")


class ProcessExecutor:
    """A part of the cohort in each of several processes, one client after another in each.

    Gives the same bits as :class:`SerialExecutor` for the same ``threads``. Processes start with the first round and
    end with :meth:`close`, or when a client fails.

    Parameters
    ----------
    models : sequence of Stateless
        The architectures, on the CPU.
    workers : int
        Processes.
    threads : int
        Threads inside an operation.
    bf16 : bool
        Products in bfloat16.
    """

    def __init__(self, models: Models, workers: int, threads: int = 1, bf16: bool = False) -> None:
        self.models, self.count, self.threads, self.bf16 = models, workers, threads, bf16
        self._workers: list[Worker] = []
        self._out: dict[Worker, Outbox] = {}
        self._in: dict[Worker, Inbox] = {}
        self._trainer: LocalTrainer | None = None

    def run(self, train: LocalTrainer, works: Sequence[ClientWork]) -> Iterator[ClientResult]:
        """Yield the results as they come; when one fails or the caller stops, the processes end."""
        try:
            self._make_ready(train)
            parts = dealt(works, [train.steps_of(work.client) for work in works], self.count)
            for worker, part in zip(self._workers, parts, strict=True):
                self._out[worker].clear()
                worker.pipe.send(Train(self._out[worker].put(part)))
            for worker, parcel in self._news(self._workers):
                yield self._in[worker].take(parcel)
        except BaseException:
            self.close()
            raise

    def _make_ready(self, train: LocalTrainer) -> None:
        """Start the processes, and give them the trainer where they do not have it yet."""
        if not self._workers:
            self._workers = [Worker.start() for _ in range(self.count)]
            self._out = {worker: Outbox() for worker in self._workers}
            self._in = {worker: Inbox() for worker in self._workers}
            self._trainer = None
        if self._trainer is not train:
            rest = pickled((SerialExecutor(self.models, self.threads, self.bf16), without_samples(train)))
            for worker in self._workers:
                worker.pipe.send(MakeReady(rest, train.samples, train.public))
            for _ in self._news(self._workers):
                pass
            self._trainer = train

    @staticmethod
    def _news(workers: Sequence[Worker]) -> Iterator[tuple[Worker, Any]]:
        """Yield who tells what until all are done; raise what one of them raised."""
        busy: dict[Any, Worker] = {worker.pipe: worker for worker in workers}
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                kind, content = busy[pipe].receive()
                if kind == "news":
                    yield busy[pipe], content
                elif kind == "done":
                    del busy[pipe]
                else:
                    raise content

    def close(self) -> None:
        """End the processes."""
        end(self._workers)
        self._workers, self._trainer, self._out, self._in = [], None, {}, {}


@dataclass(frozen=True)
class MakeReady:
    """The job that gives a worker what stays the same from round to round; samples arrive in shared memory."""

    rest: bytes
    samples: Samples
    public: Samples | None

    def __call__(self, tell: Callable[[object], None]) -> None:
        """Keep it."""
        global _place
        keep_freed_memory()
        executor, trainer = pickle.loads(self.rest)  # of the program that started this process, through its pipe
        _place = Place(executor, replace(trainer, samples=self.samples, public=self.public))


@dataclass(frozen=True)
class Train:
    """The job that trains some clients; it tells each result."""

    works: Parcel

    def __call__(self, tell: Callable[[object], None]) -> None:
        """Train them one after another."""
        assert _place is not None
        _place.out.clear()
        for result in _place.executor.run(_place.trainer, _place.inbox.take(self.works)):
            tell(_place.out.put(result))


@dataclass(frozen=True)
class Place:
    """What a worker process keeps between its jobs."""

    executor: SerialExecutor
    trainer: LocalTrainer
    inbox: Inbox = field(default_factory=Inbox)
    out: Outbox = field(default_factory=Outbox)


_place: Place | None = None
"""In a worker process: what :class:`MakeReady` left for :class:`Train`."""


def without_samples(train: LocalTrainer) -> LocalTrainer:
    """Return a trainer whose samples are to come."""
    return replace(train, samples=Samples(torch.empty(0), torch.empty(0, dtype=torch.int64)), public=None)


def dealt(works: Sequence[ClientWork], steps: Sequence[int], workers: int) -> list[list[ClientWork]]:
    """Deal clients to workers, the longest first and each to the worker that has the fewest steps so far."""
    parts: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for place in sorted(range(len(works)), key=lambda place: -steps[place]):
        least = loads.index(min(loads))
        parts[least].append(place)
        loads[least] += steps[place]
    return [[works[place] for place in sorted(part)] for part in parts]


def why_no_processes(train: LocalTrainer, models: Models) -> str | None:
    """Say why clients cannot be trained in other processes; None where they can."""
    try:
        content = pickled((models, without_samples(train)))
    except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as error:  # what objects raise there
        return f"its method or its model cannot be sent to another process ({str(error).splitlines()[0]})"
    if b"__main__" in content:
        return "its method or its model is defined in the program that was started, not in a module"
    size = 2 * bytes_in(train)  # and as much again for weights on their way, which nobody knows yet
    if SHARED_MEMORY.is_dir() and (free := shutil.disk_usage(SHARED_MEMORY).free) < size:
        return f"it needs {size / 2**20:,.0f} MiB of shared memory, and {SHARED_MEMORY} has {free / 2**20:,.0f}"
    return None


def bytes_in(train: LocalTrainer) -> int:
    """Return how much of shared memory a trainer's samples take."""
    sets = [train.samples, *([train.public] if train.public else [])]
    return sum(value.numel() * value.element_size() for one in sets for value in (one.x, one.y))
