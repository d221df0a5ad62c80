"""Run an experiment from a configuration, and go on with one that was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from fedstill.build import build
from fedstill.config import Config, config_from, load_config
from fedstill.errors import FedstillError, InputError
from fedstill.evaluation import Record
from fedstill.execution.allocator import keep_freed_memory
from fedstill.federation import Federation, FederationState
from fedstill.presets import DEFAULT, preset
from fedstill.runs.directory import RunDirectory
from fedstill.runs.store import ClientFiles
from fedstill.weights import Weights


class Observer(Protocol):
    """Is told how a run goes on; the command line's progress display is one."""

    def started(self, federation: Federation, state: FederationState, notes: list[str]) -> None:
        """Before the first round of this process."""

    def client_done(self, round: int, done: int, of: int) -> None:
        """After each client."""

    def round_done(self, record: Record) -> None:
        """After each round."""


class Silent:
    """An observer that shows nothing."""

    def started(self, federation: Federation, state: FederationState, notes: list[str]) -> None:
        """Show nothing."""

    def client_done(self, round: int, done: int, of: int) -> None:
        """Show nothing."""

    def round_done(self, record: Record) -> None:
        """Show nothing."""


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
    """

    config: Config
    records: list[Record]
    weights: Weights
    federation: Federation
    directory: Path | None = None

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
    observer: Observer | None = None,
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
    observer : Observer, optional

    Raises
    ------
    InputError
        Bad input; nothing has been written.
    RunError
        The run cannot go on; its last good checkpoint is intact.
    """
    settings = _config(config, overrides)
    path = Path(directory) if directory is not None else None
    if path is not None and path.exists():
        raise InputError(f"{path}: exists already; name another directory, or go on with 'fedstill resume {path}'")
    federation, notes = build(settings)
    if path is None:
        return _go_on(federation, federation.start(), [], None, notes, observer or Silent())
    with closing(RunDirectory.create(path, federation)) as files:
        return _go_on(federation, federation.start(), [], files, notes, observer or Silent())


def resume(directory: Path | str, observer: Observer | None = None) -> Result:
    """Go on with a run from its newest checkpoint, to the same bits as if it had not been stopped.

    Raises
    ------
    InputError
        If there is no run there, or its checkpoint is corrupt or foreign.
    """
    path = Path(directory)
    config = RunDirectory.read_config(path)
    federation, notes = build(config)
    with closing(RunDirectory.open(path, federation)) as files:
        state = files.store.load() or federation.start()
        records = files.cut_metrics(state.round)
        files.log(f"resumed after round {state.round}")
        return _go_on(federation, state, records, files, notes, observer or Silent())


def _go_on(
    federation: Federation,
    state: FederationState,
    records: list[Record],
    files: RunDirectory | None,
    notes: list[str],
    observer: Observer,
) -> Result:
    keep_freed_memory()
    config = federation.config
    saved = state
    observer.started(federation, state, notes)
    federation.on_client = observer.client_done
    if files:
        for line in notes:
            files.log(line)
    leave = ExitStack()
    try:
        on_disk = _client_files(federation, files, leave)
        while state.round < config.train.rounds:
            following, record = federation.run_round(state)
            if files:
                files.record(record)
            # Only now: a round that is stopped before its line is whole is done again by a resume.
            state = following
            del following  # it holds what the cohort keeps
            records.append(record)
            if on_disk:
                state = replace(state, clients=on_disk.put(state.clients, state.round, let_go=True))
            if files and (state.round % config.checkpoint.every == 0 or state.round == config.train.rounds):
                state = saved = files.store.save(state)
            elif on_disk and not files:
                on_disk.remove(rounds=())
            observer.round_done(record)
    except (KeyboardInterrupt, FedstillError) as error:
        if files:
            _leave_resumable(files, state, saved, error)
        raise
    finally:
        federation.executor.close()
        leave.close()
    if files:
        files.log("finished")
    return Result(config, records, state.server.weights, federation, files.path if files else None)


def _client_files(federation: Federation, files: RunDirectory | None, leave: ExitStack) -> ClientFiles | None:
    """Return where each round's client states go, in a temporary directory where there is no other; None for memory."""
    if federation.config.execution.client_states != "disk":
        return None
    if files:
        return files.store.files
    return ClientFiles(Path(leave.enter_context(TemporaryDirectory(prefix="fedstill-"))), federation.device)


def _leave_resumable(files: RunDirectory, state: FederationState, saved: FederationState, error: BaseException) -> None:
    """Write the last whole round, if there is one that no checkpoint has, and say what happened in the log."""
    try:
        if state is not saved:
            files.store.save(state)
        files.log(f"stopped after round {state.round}: {str(error) or type(error).__name__}")
    except FedstillError:
        # The disk that stopped the run refuses this too; the checkpoint before is intact, the first error goes up.
        return


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
