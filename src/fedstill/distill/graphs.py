"""A server step's pieces as CUDA graphs, recorded once in a refinement and replayed.

A small model's kernels are shorter than the time Python takes to start them. A graph starts all of a piece's kernels
at once: the same kernels, on the same memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from fedstill.distill.log import Log
from fedstill.errors import RunError

Piece = Callable[..., tuple[Tensor, ...]]
"""A part of the server step: tensors -> tensors. What else it reads and changes stays where it is in memory, it draws
no random numbers, and the host waits for none of its values."""


@dataclass
class Recorder:
    """Makes pieces of one refinement that are recorded.

    Parameters
    ----------
    on : bool
        Whether pieces are recorded; otherwise they stay as they are.
    log : Log
        Where pieces note values. Those of a recorded piece are noted again at every replay.
    """

    on: bool
    log: Log

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run what is in the block on another stream: a graph may not be recorded on the default one."""
        if not self.on:
            yield
            return
        outside, inside = torch.cuda.current_stream(), recording_stream()
        inside.wait_stream(outside)
        with torch.cuda.stream(inside):
            yield
        outside.wait_stream(inside)

    def of(self, piece: Piece) -> Piece:
        """Return a piece that is recorded at its second call; a first one lets libraries and optimisers get ready."""
        return Recorded(piece, self) if self.on else piece


@dataclass
class Recorded:
    """A piece and its graph."""

    piece: Piece
    recorder: Recorder
    ready: bool = False
    graph: torch.cuda.CUDAGraph | None = None
    given: list[Tensor] = field(default_factory=list)
    found: tuple[Tensor, ...] = ()
    noted: Log = field(default_factory=Log)

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Run the piece."""
        if not self.ready:
            self.ready = True
            with warnings.catch_warnings():  # of an optimiser that can be recorded and, this time, is not
                warnings.filterwarnings("ignore", ".*capturable=True")
                return self.piece(*given)
        if self.graph is None:
            self.graph = self._record(given)
        for own, value in zip(self.given, given, strict=True):
            own.copy_(value)
        self.graph.replay()
        for name, values in self.noted.trace.items():
            for value in values:
                self.recorder.log.add(**{name: value.clone()})
        return tuple(value.clone() for value in self.found)

    def _record(self, given: tuple[Tensor, ...]) -> torch.cuda.CUDAGraph:
        """Return the graph of a call; nothing is computed, so that nothing has changed yet."""
        self.given = [value.clone() for value in given]
        graph = torch.cuda.CUDAGraph()
        try:
            with self.recorder.log.into(self.noted), torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self.found = self.piece(*self.given)
        except RuntimeError as error:
            reason = reason_of(error)
            raise RunError(
                f"execution.cuda_graphs: the server's step cannot be recorded ({reason}); start anew without it"
            ) from error
        return graph


def reason_of(error: BaseException) -> str:
    """Return the first line of what came first: that a recording was broken off is said on top of why."""
    while error.__context__ is not None:
        error = error.__context__
    return next(iter(str(error).splitlines()), type(error).__name__)


@cache
def recording_stream() -> torch.cuda.Stream:
    """Return the one stream on which graphs are recorded; each would keep working memory of its own."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
