"""Callbacks: what a run calls as it goes on, such as a progress display, a tracker, or a function of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedstill.errors import InputError, RunError
from fedstill.evaluation import Record
from fedstill.federation import Federation, FederationState


class StopRun(Exception):
    """Raised by a callback to end a run early, with the reason as its text; the run can be resumed."""


@dataclass(frozen=True)
class RunInfo:
    """A run as its callbacks see it: to be read, not to be changed.

    Parameters
    ----------
    federation : Federation
        With the configuration, ``federation.config``, and the partition.
    state : FederationState
        After the newest round: its number, the global models, what clients and server keep.
    records : sequence of dict
        The lines of ``metrics.jsonl`` so far, those from before a resume too.
    notes : tuple of str
        What is worth knowing about the data.
    directory : Path or None
        The run's directory, where it has one.
    """

    federation: Federation
    state: FederationState
    records: Sequence[Record]
    notes: tuple[str, ...] = ()
    directory: Path | None = None


class Callback:
    """What a run calls: a subclass overrides what it wants; rounds are counted from 1.

    Any of the first three may raise :class:`StopRun`. Any other exception ends the run as a :class:`RunError` that
    names the callback. In both cases the last whole round is saved first, and the run can be resumed.
    """

    def on_run_start(self, run: RunInfo) -> None:
        """Before the first round of this process; ``run.records`` are those that a resumed run had already."""

    def on_client_end(self, round: int, done: int, of: int) -> None:
        """After each client: so many of the round's cohort are done; StopRun here gives the begun round up."""

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        """After each round, when its metrics and its checkpoint are written."""

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """At the end, if the start went well.

        Parameters
        ----------
        run : RunInfo
        error : BaseException or None
            What ended the run before its last round: a :class:`StopRun`, a KeyboardInterrupt, an error.
        """


RoundFunction = Callable[[int, Record, RunInfo], object]
"""A function that is called as ``on_round_end`` is; what it returns does not matter."""


@dataclass(frozen=True)
class OnRoundEnd(Callback):
    """A function as a callback."""

    function: RoundFunction

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        """Call the function."""
        self.function(round, record, run)


@dataclass
class Callbacks:
    """All callbacks of a run, called in order; those of the end in reverse.

    A callback that raises StopRun does not keep the others from being called.
    """

    given: list[Callback]
    _started: list[Callback] = field(default_factory=list)

    @staticmethod
    def of(given: Sequence[Callback | RoundFunction]) -> Callbacks:
        """Return what a user gave.

        Raises
        ------
        InputError
            For what is not a list of Callbacks and functions of (round, record, run).
        """
        if not isinstance(given, Sequence):
            raise InputError(f"callbacks: {given!r} is not a list; write callbacks=[...]")
        return Callbacks([_callback(place, one) for place, one in enumerate(given)])

    def run_started(self, run: RunInfo) -> None:
        """Call every ``on_run_start``."""

        def start(one: Callback) -> None:
            try:
                one.on_run_start(run)
            except StopRun:
                self._started.append(one)
                raise
            self._started.append(one)

        self._each("on_run_start", start)

    def client_ended(self, round: int, done: int, of: int) -> None:
        """Call every ``on_client_end``; here rounds are counted from 0, as the federation does."""
        self._each("on_client_end", lambda one: one.on_client_end(round + 1, done, of))

    def round_ended(self, record: Record, run: RunInfo) -> None:
        """Call every ``on_round_end``."""
        self._each("on_round_end", lambda one: one.on_round_end(run.state.round, record, run))

    def run_ended(self, run: RunInfo, error: BaseException | None) -> RunError | None:
        """Call ``on_run_end`` of all that were started, whatever others raise; return the first problem."""
        problems = []
        for one in reversed(self._started):
            try:
                one.on_run_end(run, error)
            except Exception as failure:
                problems.append(_problem(one, "on_run_end", failure))
        self._started.clear()
        return next(iter(problems), None)

    def _each(self, event: str, call: Callable[[Callback], None]) -> None:
        stop: StopRun | None = None
        for one in self.given:
            try:
                call(one)
            except StopRun as asked:
                stop = stop or StopRun(f"{_name(one)}: {asked}" if str(asked) else _name(one))
            except Exception as failure:
                raise _problem(one, event, failure) from failure
        if stop:
            raise stop


def _callback(place: int, given: object) -> Callback:
    if isinstance(given, Callback):
        return given
    if isinstance(given, type):
        raise InputError(f"callbacks[{place}]: {given.__name__} is a class; give an object of it")
    if not callable(given):
        raise InputError(f"callbacks[{place}]: {given!r} is neither a fedstill.Callback nor a function")
    try:
        inspect.signature(given).bind(1, {}, None)
    except TypeError as error:
        name = getattr(given, "__name__", repr(given))
        raise InputError(f"callbacks[{place}]: {name} is to be called with (round, record, run): {error}") from error
    except ValueError:  # a built-in that does not tell its parameters
        pass
    return OnRoundEnd(given)


def _name(one: Callback) -> str:
    function = one.function if isinstance(one, OnRoundEnd) else type(one)
    return str(getattr(function, "__qualname__", type(function).__qualname__)).rpartition("<locals>.")[2]


def _problem(one: Callback, event: str, failure: Exception) -> RunError:
    problem = RunError(f"callback {_name(one)} failed in {event}: {type(failure).__name__}: {failure}")
    problem.__cause__ = failure
    return problem
