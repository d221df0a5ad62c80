"""Run an experiment from a configuration, and go on with one that was stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedstill.build import build
from fedstill.callbacks import Callback, Callbacks, RoundFunction, RunInfo, StopRun
from fedstill.config import Config, config_from, load_config
from fedstill.errors import FedstillError, InputError
from fedstill.evaluation import Record
from fedstill.execution.allocator import keep_freed_memory
from fedstill.federation import Federation, FederationState
from fedstill.presets import DEFAULT, preset
from fedstill.runs.directory import RunDirectory, began, refuse_taken
from fedstill.runs.files import WriteError
from fedstill.runs.store import ClientFiles
from fedstill.trackers import trackers_of
from fedstill.weights import Weights


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Parameters
    ----------
    config : Config
        As resolved.
    records : list of dict
        One per round, the lines of ``metrics.jsonl``.
    weights : Weights
        The final global model.
    federation : Federation
        To go on with: evaluate, refine, look at the partition.
    directory : Path or None
    stopped : str or None
        The callback that ended the run early, and its reason; None for a run that reached its last round.
    """

    config: Config
    records: list[Record]
    weights: Weights
    federation: Federation
    directory: Path | None = None
    stopped: str | None = None

    def accuracies(self, on: str = "test") -> dict[int, float]:
        """Return round -> accuracy of the final model of each evaluated round."""
        return accuracies(self.records, on)


def accuracies(records: list[Record], on: str = "test", model: str | None = None) -> dict[int, float]:
    """Return round -> accuracy; of the refined model where there is one, unless ``model`` says which."""
    found: dict[int, float] = {}
    for record in records:
        scores: Any = record.get(model) if model else record.get("refined", record.get("fused"))
        if scores and on in scores:
            found[int(str(record["round"]))] = float(scores[on]["accuracy"])
    return found


def run(
    config: Config | Mapping[str, Any] | Path | str | None = None,
    *overrides: str,
    directory: Path | str | None = None,
    callbacks: Sequence[Callback | RoundFunction] = (),
) -> Result:
    """Run an experiment from the start.

    Parameters
    ----------
    config : Config, mapping, path or None
        A configuration, a nested mapping like its TOML, the path of a TOML file; None for the
        preset that `fedstill run` takes.
    *overrides : str
        Such as ``"train.rounds=3"``; not with a ready :class:`Config`.
    directory : path, optional
        Where the run is written; it must not exist. Without one nothing is written.
    callbacks : sequence of Callback or function, optional
        What is called as the run goes on; a function is called after each round with its number, its record
        and a :class:`RunInfo`.

    Raises
    ------
    InputError
        Bad input; nothing has been written.
    RunError
        The run cannot go on; its last good checkpoint, where there is one, is intact.
    """
    settings = _config(config, overrides)
    path = Path(directory) if directory is not None else None
    if path is not None:
        refuse_taken(path)
    called = _callbacks(settings, callbacks)
    federation, notes = build(settings)
    if path is None:
        return _Loop(federation, federation.start(), [], None, notes, called).run()
    with closing(RunDirectory.create(path, federation)) as files:
        return _Loop(federation, federation.start(), [], files, notes, called).run()


def resume(directory: Path | str, callbacks: Sequence[Callback | RoundFunction] = ()) -> Result:
    """Go on with a run from its newest checkpoint, to the same bits as if it had not been stopped.

    Parameters
    ----------
    directory : path
    callbacks : sequence of Callback or function, optional
        As for :func:`run`.

    Raises
    ------
    InputError
        If there is no run there, or its checkpoint is corrupt or foreign.
    RunError
        The run cannot go on; its last good checkpoint, where there is one, is intact.
    """
    path = Path(directory)
    config = RunDirectory.read_config(path)
    called = _callbacks(config, callbacks)
    federation, notes = build(config)
    with closing(RunDirectory.open(path, federation)) as files:
        state = files.store.load() or federation.start()
        records = files.cut_metrics(state.round)
        files.log(f"resumed after round {state.round}")
        return _Loop(federation, state, records, files, notes, called).run()


def _callbacks(config: Config, given: Sequence[Callback | RoundFunction]) -> Callbacks:
    """Return the configuration's trackers and what the caller gave; wrong ones are refused before anything is made."""
    own = Callbacks.of(given).given
    return Callbacks([*trackers_of(config.tracking, own), *own])


@dataclass
class _Loop:
    """The loop over rounds: each is run, recorded, adopted and saved, and only then told to the callbacks."""

    federation: Federation
    state: FederationState
    records: list[Record]
    files: RunDirectory | None
    notes: list[str]
    callbacks: Callbacks

    def __post_init__(self) -> None:
        self.saved = self.state

    def run(self) -> Result:
        """Run what is left, and tell the callbacks how it ended."""
        keep_freed_memory()
        try:
            stopped = self._stopped_or_finished()
        except BaseException as error:
            if problem := self.callbacks.run_ended(self.info(), error):
                error.add_note(str(problem))
            raise
        self.log(f"stopped after round {self.state.round} by {stopped}" if stopped else "finished")
        if problem := self.callbacks.run_ended(self.info(), stopped):
            raise problem
        path, reason = self.files.path if self.files else None, str(stopped) if stopped else None
        weights = self.state.server.weights
        return Result(self.federation.config, self.records, weights, self.federation, path, reason)

    def info(self) -> RunInfo:
        """Return what callbacks see."""
        path = self.files.path if self.files else None
        return RunInfo(self.federation, self.state, self.records, tuple(self.notes), path)

    def log(self, line: str) -> None:
        """Add a line to the log, where there is one."""
        if self.files:
            self.files.log(line)

    def _stopped_or_finished(self) -> StopRun | None:
        leave = ExitStack()
        try:
            for line in self.notes:
                self.log(line)
            self.callbacks.run_started(self.info())
            self._rounds(_client_files(self.federation, self.files, leave))
        except StopRun as asked:
            self._save()
            return asked if self.state.round < self.federation.config.train.rounds else None
        except (KeyboardInterrupt, FedstillError) as error:
            if self.files and began(self.files.path):  # else somebody has removed it
                self._leave_resumable(self.files, error)
                if isinstance(error, WriteError):
                    raise self.files.to_go_on(error) from error.__cause__
            raise
        finally:
            self.federation.executor.close()
            leave.close()
        return None

    def _rounds(self, on_disk: ClientFiles | None) -> None:
        config = self.federation.config
        self.federation.on_client = self.callbacks.client_ended
        self.federation.on_note = self.log
        while self.state.round < config.train.rounds:
            following, record = self.federation.run_round(self.state)
            if self.files:
                self.files.record(record)
            # Only now: a round that is stopped before its line is whole is done again by a resume.
            self.state = following
            del following  # it holds what the cohort keeps
            self.records.append(record)
            if on_disk:
                clients = on_disk.put(self.state.clients, self.state.round, let_go=True)
                self.state = replace(self.state, clients=clients)
            if self.state.round % config.checkpoint.every == 0 or self.state.round == config.train.rounds:
                self._save()
            if on_disk and not self.files:
                on_disk.remove(rounds=())
            self.callbacks.round_ended(record, self.info())

    def _save(self) -> None:
        """Write a checkpoint of the last whole round, if it has none."""
        if self.files and self.state is not self.saved:
            self.state = self.saved = self.files.store.save(self.state)

    def _leave_resumable(self, files: RunDirectory, error: BaseException) -> None:
        try:
            files.cut_metrics(self.state.round)  # a signal may have come between a round's line and its adoption
            self._save()
            self.log(f"stopped after round {self.state.round}: {str(error) or type(error).__name__}")
        except FedstillError:
            # The disk that stopped the run refuses this too; what was there before is intact, the first error goes up.
            return


def _client_files(federation: Federation, files: RunDirectory | None, leave: ExitStack) -> ClientFiles | None:
    """Return where each round's client states go, in a temporary directory where there is no other; None for memory."""
    if federation.config.execution.client_states != "disk":
        return None
    if files:
        return files.store.files
    return ClientFiles(Path(leave.enter_context(TemporaryDirectory(prefix="fedstill-"))), federation.device)


def _config(config: Config | Mapping[str, Any] | Path | str | None, overrides: tuple[str, ...]) -> Config:
    if isinstance(config, Config):
        if overrides:
            raise InputError("overrides go with a file or a mapping, not with a ready Config")
        return config
    if isinstance(config, Mapping):
        return config_from(config, "configuration") if not overrides else load_config(None, overrides, dict(config))
    if config is None:
        return load_config(None, overrides, preset(DEFAULT))
    return load_config(Path(config), overrides)
