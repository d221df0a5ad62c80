"""The files that clients' states lie in, and the index that says which.

``clients/7/round-00003.safetensors`` is the state that client 7 left in round 3, written once. An index
(``checkpoints/index-00001.jsonl``) is only ever appended to: a checkpoint names it, the length up to which it counts
and the SHA-256 of that much, so that a round adds its cohort's lines and touches nobody else's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedstill.client_states import ClientStates
from fedstill.errors import InputError, RunError
from fedstill.runs.files import disk_errors, sha256, write_atomically
from fedstill.tensor_bytes import dump_tensors, load_tensors
from fedstill.weights import State, Tensors


def write_tensors(path: Path, tensors: Tensors) -> str:
    """Write a safetensors file, whole or not at all, and return its SHA-256."""
    data = dump_tensors(tensors)
    write_atomically(path, data)
    return sha256(data)


def read_tensors(path: Path, digest: str, device: torch.device) -> Tensors:
    """Read a safetensors file.

    Raises
    ------
    InputError
        If it is not there, or not the file that was written.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: a checkpoint names this file, and it cannot be read") from error
    if sha256(data) != digest:
        raise InputError(f"{path}: corrupt: its SHA-256 is not the one in the checkpoint")
    try:
        tensors = load_tensors(data)
    except ValueError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error
    return {name: value.to(device) for name, value in tensors.items()}


def grouped(prefix: str, state: State) -> Tensors:
    """Return a state's tensors by one name each; a group without any leaves its own name, with nothing in it."""
    nothing = {"": torch.zeros(0)}
    return {
        f"{prefix}{group}/{name}": value
        for group, tensors in state.items()
        for name, value in (tensors or nothing).items()
    }


def under(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def ungrouped(tensors: Tensors, prefix: str) -> State:
    """Return the state that :func:`grouped` took apart."""
    state: State = {}
    for key, value in under(tensors, prefix).items():
        group, _, name = key.partition("/")
        own = state.setdefault(group, {})
        if name:
            own[name] = value
    return state


@dataclass(frozen=True, slots=True)
class StoredState:
    """A client's state on disk."""

    root: Path
    client: int
    round: int
    sha256: str
    device: torch.device

    @property
    def path(self) -> Path:
        """The file."""
        return self.root / "clients" / str(self.client) / f"round-{self.round:05d}.safetensors"

    def state(self) -> State:
        """Return the state; an InputError names a file that is missing or corrupt."""
        return ungrouped(read_tensors(self.path, self.sha256, self.device), "")

    def read(self) -> State:
        """Return the state for a round that is under way."""
        try:
            return self.state()
        except InputError as error:
            raise RunError(
                f"{error}; put it back, or remove the checkpoints from round {self.round} on, if there are older ones"
            ) from error


@dataclass
class ClientFiles:
    """The clients' files under one directory.

    Parameters
    ----------
    root : Path
    device : torch.device
        Where tensors are put when they are read.
    live : dict
        Client -> its newest file.
    unlisted : dict
        Those that no index has yet.
    superseded : list
        Files with a newer one, and the round from which that one counts.
    """

    root: Path
    device: torch.device
    live: dict[int, StoredState] = field(default_factory=dict)
    unlisted: dict[int, StoredState] = field(default_factory=dict)
    superseded: list[tuple[StoredState, int]] = field(default_factory=list)
    _last: object | None = None

    def put(self, states: Mapping[int, State], round: int, let_go: bool) -> ClientStates:
        """Write the states that have changed since the last call, and return them all as written.

        Parameters
        ----------
        states : mapping
        round : int
            The rounds done.
        let_go : bool
            Whether what is on disk need not stay in memory.
        """
        states = ClientStates.of(states)
        changed = states.changed_since(self._last)
        written = {client: self._write(client, round, states[client]) for client in changed}
        # Only now: a write that was cut short is done again.
        for client, new in written.items():
            old = self.live.get(client)
            if old is not None and old.path != new.path:
                self.superseded.append((old, round))
            self.live[client] = new
        self.unlisted |= written
        self._last = object()
        return states.after(self._last, written if let_go else {})

    def opened(self, live: dict[int, StoredState], let_go: bool) -> ClientStates:
        """Return the states that a checkpoint names: to be read when they are needed, or all read now."""
        self.live, self.unlisted, self.superseded = dict(live), {}, []
        self._last = object()
        return ClientStates(live if let_go else {client: one.state() for client, one in live.items()}, self._last)

    def remove(self, rounds: Collection[int]) -> None:
        """Remove the superseded files that no checkpoint of these rounds names."""
        with disk_errors(self.root):
            for one, until in self.superseded:
                if not any(one.round <= kept < until for kept in rounds):
                    one.path.unlink(missing_ok=True)
        self.superseded = [
            (one, until) for one, until in self.superseded if any(one.round <= kept < until for kept in rounds)
        ]

    def sweep(self, named: Iterable[StoredState], round: int) -> None:
        """Look at all files, once in a process: remove what no checkpoint names, remember what older ones name."""
        known = {one.path for one, _ in self.superseded} | {one.path for one in self.live.values()}
        for one in named:
            if one.path not in known:
                self.superseded.append((one, round))
                known.add(one.path)
        with disk_errors(self.root):
            for path in (self.root / "clients").rglob("round-*"):
                if path not in known:
                    path.unlink()

    def _write(self, client: int, round: int, state: State) -> StoredState:
        one = StoredState(self.root, client, round, "", self.device)
        return StoredState(self.root, client, round, write_tensors(one.path, grouped("", state)), self.device)


@dataclass
class ClientIndex:
    """The index that the newest checkpoint names.

    Parameters
    ----------
    root : Path
    file : str
        Its name under ``root``; empty before the first.
    size, lines : int
        Bytes and lines that count.
    """

    root: Path
    file: str = ""
    size: int = 0
    lines: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    SLACK = 1000
    """How many outdated lines an index may have beside as many as it has clients, before a new one is begun."""

    def add(self, new: list[Any], everything: Callable[[], list[Any]], clients: int, round: int) -> dict[str, Any]:
        """Append the lines of a checkpoint, or begin a new index with all, and return how to name it."""
        if self._is_whole() and self.lines + len(new) <= 2 * clients + self.SLACK:
            data = _lines(new)
            path = self.root / self.file
            with disk_errors(path), path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self.lines += len(new)
        else:
            lines = everything()
            data = _lines(lines)
            name = f"checkpoints/index-{round:05d}.jsonl"
            write_atomically(self.root / name, data)
            self.file, self.size, self.lines, self._digest = name, 0, len(lines), hashlib.sha256()
        self.size += len(data)
        self._digest.update(data)
        return {"file": self.file, "bytes": self.size, "sha256": self._digest.hexdigest()}

    def _is_whole(self) -> bool:
        """Say whether the file ends where the last checkpoint says; lines after that, cut or not, are nobody's."""
        path = self.root / self.file
        return bool(self.file) and path.is_file() and path.stat().st_size == self.size

    @staticmethod
    def read(root: Path, entry: Mapping[str, Any]) -> tuple[ClientIndex, list[Any]]:
        """Return an index as far as a checkpoint says, and its lines.

        Raises
        ------
        InputError
            If it is missing or not what was written.
        """
        name, size = str(entry["file"]), int(entry["bytes"])
        path = root / name
        try:
            with path.open("rb") as file:
                data = file.read(size)
        except OSError as error:
            raise InputError(f"{path}: a checkpoint names this file, and it cannot be read") from error
        digest = hashlib.sha256(data)
        if digest.hexdigest() != entry["sha256"]:
            raise InputError(f"{path}: corrupt: its SHA-256 is not the one in the checkpoint")
        lines = [json.loads(line) for line in data.splitlines()]
        return ClientIndex(root, name, size, len(lines), digest), lines


def _lines(entries: Iterable[Any]) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()
