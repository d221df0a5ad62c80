"""What is wrong with a configuration, and where."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from fedstill.config.dotted import nearest_key
from fedstill.config.schema import Config
from fedstill.errors import InputError

_PART = r"""(?:[\w\-]+|"[^"]*"|'[^']*')"""
_KEY = rf"{_PART}(?:\s*\.\s*{_PART})*"
"""A TOML key as it may be written: bare or quoted parts with dots between them."""


def explain(
    error: ValidationError,
    path: Path | None,
    lines: Mapping[str, int],
    overrides: Sequence[str],
    model: type[BaseModel] = Config,
) -> str:
    """Return one line on the first problem; where it is, what is wrong, and the nearest right name."""
    problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # it may be why another is missing
    key = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
    places = list(_outwards(problem["loc"]))
    given = {override.partition("=")[0].strip() for override in overrides} & set(places)
    line = next((lines[place] for place in places if place in lines), None)
    where = f"{path}:{line}: " if path and line and not given else f"{path}: " if path and not given else ""
    if problem["type"] == "extra_forbidden":
        near = nearest_key(key, model)
        return f"{where}unknown key {key!r}" + (f", did you mean {near!r}?" if near else "")
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = f", not {value!r}" if isinstance(value, str | int | float | bool | list) else ""
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    return f"{where}{key or 'configuration'}: {message[:1].lower()}{message[1:]}{shown}{more}"


def explained(error: ValidationError, path: Path, text: str, model: type[BaseModel]) -> InputError:
    """Return the error for a TOML file of another kind than a configuration; ``model`` is what it was read as."""
    return InputError(explain(error, path, lines_of(text), (), model))


def _outwards(loc: Sequence[str | int]) -> Iterator[str]:
    """Yield a problem's key and those of the tables around it, each with the places in lists and without them."""
    for end in range(len(loc), 0, -1):
        yield ".".join(str(part) for part in loc[:end])
        yield ".".join(part for part in loc[:end] if isinstance(part, str))


def lines_of(text: str) -> dict[str, int]:
    """Return the line of every key and table in a TOML text, as far as lines that begin with a key tell."""
    lines: dict[str, int] = {}
    tables: Counter[str] = Counter()
    prefix = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(rf"\s*(\[\[?)\s*({_KEY})\s*\]", line):
            name, dot, rest = _plain(header[2]).partition(".")
            tables[name] += header[1] == "[["
            place = f"{name}.{tables[name] - 1}{dot}{rest}" if tables[name] else f"{name}{dot}{rest}"
            lines[place] = number
            prefix = f"{place}."
        elif entry := re.match(rf"\s*({_KEY})\s*=", line):
            lines[f"{prefix}{_plain(entry[1])}"] = number
    return lines


def _plain(key: str) -> str:
    """Return a dotted key without its quotes and spaces."""
    return re.sub(r"""["'\s]""", "", key)
