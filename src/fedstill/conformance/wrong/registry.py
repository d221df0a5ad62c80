"""The table of wrong methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedstill.config import Config


@dataclass(frozen=True)
class Wrong:
    """A wrong method: its mistake, the family it claims to be of, and the checks that must catch it."""

    name: str
    mistake: str
    like: str
    caught_by: tuple[str, ...]
    make: Callable[[Config], Any]


WRONG: dict[str, Wrong] = {}


def wrong(like: str, *caught_by: str) -> Callable[[Callable[[Config], Any]], Callable[[Config], Any]]:
    """Enter a wrong method in the table."""

    def enter(make: Callable[[Config], Any]) -> Callable[[Config], Any]:
        name = make.__name__.replace("_", "-")
        assert name not in WRONG, f"two wrong methods {name}"
        WRONG[name] = Wrong(name, " ".join((inspect.getdoc(make) or "").split()), like, caught_by, make)
        return make

    return enter
