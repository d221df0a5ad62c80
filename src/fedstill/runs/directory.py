"""A run's directory: what was run, where, and what came out.

======================== ==========================================================
``config.toml``          the resolved configuration, with its schema version
``environment.json``     versions, commit, device
``partition.json``       protocol, class counts by client, fingerprints of the shares and of the data
``metrics.jsonl``        one line per round
``tensorboard/``         the same as TensorBoard events
``tracking/``            which MLflow and W&B runs are told of it (:mod:`fedstill.trackers`)
``checkpoints/``         the last checkpoints (``clients/``: the clients' states)
``log.txt``              what happened, with times
======================== ==========================================================
"""

from __future__ import annotations

import json
import logging
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, Literal

from fedstill.config import Config, EvalSettings, config_from, to_toml
from fedstill.data.fingerprint import Fingerprints, differing
from fedstill.errors import InputError
from fedstill.evaluation import Record
from fedstill.federation import Federation
from fedstill.runs.checkpoint import CheckpointStore, manifests, round_of
from fedstill.runs.environment import environment
from fedstill.runs.files import WriteError, disk_errors, sha256, write_atomically
from fedstill.runs.metrics import METRICS, flatten, metrics_up_to

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows, where a run directory has no lock
    fcntl = None

if TYPE_CHECKING:
    from fedstill.runs.events import EventFile


BEGUN = "partition.json"
"""Written last of what a run starts with."""
START = ("lock", "config.toml", "environment.json", "log.txt", BEGUN)
"""What a run writes until it has begun, the first of them first."""


@dataclass
class RunDirectory:
    """The files of one run."""

    path: Path
    config: Config
    store: CheckpointStore
    _events: EventFile | None = None
    _lock: IO[str] | None = None

    @staticmethod
    def create(path: Path, federation: Federation) -> RunDirectory:
        """Make the directory of a new run, whole or not at all.

        Raises
        ------
        InputError
            If it is there already; nothing is written over but the start of a run that never began.
        RunError
            If it cannot be written.
        """
        refuse_taken(path)
        remove_start(path)
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"{path}: this directory cannot be made ({error.strerror or error})") from error
        config = federation.config
        held: IO[str] | None = None
        try:
            held = lock(path)
            run = RunDirectory(path, config, _store(path, config, federation), _lock=held)
            write_atomically(path / "config.toml", to_toml(config).encode())
            write_json(path / "environment.json", environment(config.execution.device))
            run.log(f"started: {config.method} on {config.data.name}, {config.train.rounds} rounds")
            write_json(path / BEGUN, _partition_record(federation))
        except BaseException:  # Ctrl-C too: what is left could neither be gone on with nor be begun again
            (path / BEGUN).unlink(missing_ok=True)
            remove_start(path)
            if held is not None:
                held.close()
            raise
        return run

    @staticmethod
    def read_config(path: Path) -> Config:
        """Return the resolved configuration of a run.

        Raises
        ------
        InputError
            If there is no run at ``path``, or its configuration cannot be read.
        """
        file = path / "config.toml"
        if is_start(path) and file.exists():
            raise InputError(
                f"{path}: this run was stopped before it began; give 'fedstill run' again with --out {path}"
            )
        try:
            table: dict[str, Any] = tomllib.loads(file.read_text())
        except FileNotFoundError as error:
            raise InputError(f"{path}: not a run directory, it has no config.toml") from error
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: not valid TOML: {error}") from error
        return config_from(table, str(file))

    @staticmethod
    def open(path: Path, federation: Federation) -> RunDirectory:
        """Open the directory of a run to go on with it.

        Raises
        ------
        InputError
            If the data, or the partition that they give, are others now than when the run began.
        """
        stored = read_fingerprints(path)
        if stored.data is not None and (others := differing(stored.data, federation.data_fingerprints)):
            raise InputError(
                f"{path}: the {others} are not those that this run began with; put the data back as they were "
                f"({_places(federation.config)}), or begin a new run"
            )
        if stored.partition != federation.partition.fingerprint:
            raise InputError(f"{path}: the data give another partition than when this run began")
        return RunDirectory(path, federation.config, _store(path, federation.config, federation), _lock=lock(path))

    def cut_metrics(self, round: int) -> list[Record]:
        """Keep the whole metrics lines up to ``round`` and return them.

        Raises
        ------
        InputError
            If some of them are missing or damaged; nothing is written.
        """
        kept = metrics_up_to(self.path, round)[:round]
        write_atomically(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept).encode())
        return kept

    def record(self, record: Record) -> None:
        """Add one round's metrics, as a line and as TensorBoard events."""
        file = self.path / METRICS
        with disk_errors(file), file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            os.fsync(lines.fileno())  # before the checkpoint, which must not know rounds that the metrics do not
        with disk_errors(self.path / "tensorboard"):
            step = int(str(record["round"]))
            if self._events is None:
                from fedstill.runs.events import EventFile

                self._events = EventFile(self.path / "tensorboard", step)
            self._events.add(flatten(record), step)

    def to_go_on(self, error: WriteError) -> WriteError:
        """Return an error that stopped the run with what is there to go on from."""
        saved = manifests(self.path)
        since = f"its checkpoint of round {round_of(saved[-1])} is good" if saved else "from round 1"
        return WriteError(error.what, error.remedy, f"go on with 'fedstill resume {self.path}', {since}")

    def close(self) -> None:
        """Let others use the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def log(self, line: str) -> None:
        """Add a line to the log, with the time."""
        stamp = logging.Formatter().formatTime(logging.makeLogRecord({}))
        file = self.path / "log.txt"
        with disk_errors(file), file.open("a") as lines:
            lines.write(f"{stamp} {line}\n")


@dataclass(frozen=True)
class RunFingerprints:
    """What a run wrote of its data: the digest of who holds what, and those of the samples; None in older runs."""

    partition: str
    data: Fingerprints | None


def read_fingerprints(path: Path) -> RunFingerprints:
    """Return the fingerprints of a run.

    Raises
    ------
    InputError
        If the file is missing or damaged.
    """
    file = path / "partition.json"
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: missing or damaged") from error
    partition, data = map(stored.get, ("fingerprint", "data_fingerprint")) if isinstance(stored, dict) else (None, None)
    if not isinstance(partition, str):
        raise InputError(f"{file}: damaged, it has no fingerprint")
    if not isinstance(data, dict | None):
        raise InputError(f"{file}: damaged, its data_fingerprint is no table")
    return RunFingerprints(partition, data)


def began(path: Path) -> bool:
    """Say whether a run can be gone on with; what is written before this file can be made again."""
    return (path / BEGUN).exists()


def is_start(path: Path) -> bool:
    """Say whether a directory has no more than what a run that never began leaves, such as one that was killed."""
    if not path.is_dir() or began(path):
        return False
    names = {file.name for file in path.iterdir()}
    return "lock" in names and all(name.removesuffix(".partial") in START for name in names)


def refuse_taken(path: Path) -> None:
    """Refuse a directory for a new run that has anything in it but the start of one that never began.

    Raises
    ------
    InputError
        If there is something, or another process is at it.
    """
    if running(path):
        raise InputError(f"{path}: another process is running it")
    if path.exists() and not is_start(path):
        or_go_on = f", or go on with 'fedstill resume {path}'" if began(path) else ""
        raise InputError(f"{path}: exists already; name another directory{or_go_on}")


def remove_start(path: Path) -> None:
    """Remove what a run that never began has left, with its directory; anything else stays."""
    if is_start(path):
        with disk_errors(path):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


def _partition_record(federation: Federation) -> dict[str, object]:
    return {
        "protocol": federation.partition.protocol,
        "fingerprint": federation.partition.fingerprint,
        "data_fingerprint": dict(federation.data_fingerprints),
        "class_counts": federation.partition.counts.tolist(),
    }


def _places(config: Config) -> str:
    """Return the keys that say where a run's data are."""
    keys = {"data.name": config.data.name, "data.root": config.data.root, "public.name": config.public.name}
    return ", ".join(f"{key} = {value!r}" for key, value in keys.items() if value is not None)


def lock(path: Path) -> IO[str]:
    """Keep other processes from running in a directory until the file returned is closed, or this process ends.

    Raises
    ------
    InputError
        If another process is at it.
    """
    with disk_errors(path):
        file = (path / "lock").open("w")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise InputError(f"{path}: another process is running it") from error
    return file


def running(path: Path) -> bool:
    """Say whether a process is at a run; nothing is written."""
    file = path / "lock"
    if fcntl is None or not file.is_file():
        return False
    try:
        with file.open() as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    return False


def _store(path: Path, config: Config, federation: Federation) -> CheckpointStore:
    same_bits = config.execution.executor != "vectorized"  # how clients are batched moves the last bits
    free = {"client_states"} | ({"executor", "workers"} if same_bits else set())
    only_measured = set(EvalSettings.model_fields) - {"models"}  # "all" needs what clients have kept from the start
    computed = config.model_dump(
        mode="json",
        exclude={
            "eval": only_measured, "execution": free, "checkpoint": True, "tracking": True,
            "data": {"root"}, "fedmd": {"pretraining_cache"},
        },
    )  # fmt: skip
    key = json.dumps([computed, federation.partition.fingerprint], sort_keys=True)
    states: Literal["memory", "disk"] = "disk" if config.execution.client_states == "disk" else "memory"
    holds = len(federation.groups), len(federation.method.refinements)
    return CheckpointStore(path, config.checkpoint.keep, sha256(key.encode()), federation.device, states, holds)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())
