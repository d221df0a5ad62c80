"""How a cohort's clients are trained: one after another, or several at a time on threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from fedstill.models.stateless import Stateless

if TYPE_CHECKING:
    from fedstill.client import ClientResult, ClientWork, LocalTrainer

Work = TypeVar("Work")
Result = TypeVar("Result")
Models = Sequence[Stateless]
"""The architectures of a federation."""


class Executor(Protocol):
    """Runs the trainer for every client's work; results come in any order."""

    def run(self, train: LocalTrainer, works: Sequence[ClientWork]) -> Iterator[ClientResult]:
        """Yield the results as they come."""

    def close(self) -> None:
        """Free what the executor holds."""


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Set the number of threads inside an operation, for this thread of the program."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def bf16_products(models: Models, wanted: bool) -> Iterator[None]:
    """Compute convolutions and matrix products in bfloat16 where it is wanted; weights and sums stay as they are."""
    device = next(models[0].module.parameters()).device.type
    # Without the cache: it would keep the weights of the first step for all steps of a client.
    with torch.autocast(device, torch.bfloat16, enabled=wanted, cache_enabled=False):
        yield


class SerialExecutor:
    """One client after another; an error comes straight from the client that made it."""

    def __init__(self, models: Models, threads: int = 1, bf16: bool = False) -> None:
        self.models = models
        self.threads = threads
        self.bf16 = bf16

    def run(self, train: Callable[[Models, Work], Result], works: Sequence[Work]) -> Iterator[Result]:
        """Yield the results in order."""
        for work in works:
            with intra_op_threads(self.threads), bf16_products(self.models, self.bf16):
                result = train(self.models, work)
            yield result

    def close(self) -> None:
        """Do nothing."""


class ThreadExecutor:
    """Several clients at a time, each thread with its own copy of the architectures.

    Gives the same bits as :class:`SerialExecutor` for the same ``threads``: a client's result depends on its
    own streams alone, and each worker sets its own number of intra-op threads.
    """

    def __init__(self, models: Models, workers: int, threads: int = 1, bf16: bool = False) -> None:
        self._local = threading.local()
        self.bf16 = bf16

        def start() -> None:
            torch.get_num_threads()  # sets up this thread's count, which would otherwise undo the next line later
            torch.set_num_threads(threads)
            self._local.models = [model.clone() for model in models]

        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="client", initializer=start)

    def run(self, train: Callable[[Models, Work], Result], works: Sequence[Work]) -> Iterator[Result]:
        """Yield the results as they come; when one fails or the caller stops, the rest is cancelled."""
        stop = threading.Event()

        def one(work: Work) -> Result:
            if stop.is_set():
                raise InterruptedError("another client of the cohort failed")
            with bf16_products(self._local.models, self.bf16):
                return train(self._local.models, work)

        futures = [self._pool.submit(one, work) for work in works]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            stop.set()
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
