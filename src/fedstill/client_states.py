"""What the clients keep between rounds: in memory, or where it is read from when a client is in a cohort."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from fedstill.weights import State


class Place(Protocol):
    """Where a state lies that is not in memory."""

    def read(self) -> State:
        """Return the state; it is not held here."""


class ClientStates(Mapping[int, State]):
    """Client -> state, never changed: ``states | updates`` is the next round's.

    Parameters
    ----------
    entries : mapping
        Client -> its state, or the place where it lies.
    written : object or None
        The write that has everything but ``changed``; None where nothing has been written.
    changed : iterable of int
        The clients whose states are newer than that write.
    """

    def __init__(
        self,
        entries: Mapping[int, State | Place] | None = None,
        written: object | None = None,
        changed: Iterable[int] = (),
    ) -> None:
        self._entries = dict(entries or {})
        self._written = written
        self._changed = frozenset(changed)

    @staticmethod
    def of(states: Mapping[int, State]) -> ClientStates:
        """Return any mapping of states as one of these."""
        return states if isinstance(states, ClientStates) else ClientStates(states)

    def __getitem__(self, client: int) -> State:
        entry = self._entries[client]
        return entry if isinstance(entry, dict) else entry.read()

    def __contains__(self, client: object) -> bool:
        return client in self._entries  # Mapping's own would read the state

    def __iter__(self) -> Iterator[int]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __or__(self, updates: Mapping[int, State]) -> ClientStates:
        # Copies references only, which for 10,000 clients is less work than writing one of them to disk.
        return ClientStates({**self._entries, **updates}, self._written, self._changed.union(updates))

    def changed_since(self, write: object | None) -> list[int]:
        """Return the clients whose states a write does not have; all, where it is not the write these follow on."""
        return sorted(self._changed) if write is not None and write is self._written else sorted(self._entries)

    def after(self, write: object, places: Mapping[int, Place]) -> ClientStates:
        """Return the same states once they are written; those in ``places`` are let go."""
        return ClientStates({**self._entries, **places}, write)

    @property
    def in_memory(self) -> list[int]:
        """The clients whose states are held in memory."""
        return [client for client, entry in self._entries.items() if isinstance(entry, dict)]
