"""A configuration from a TOML file, a table, and overrides."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedstill.config.problems import explain, lines_of
from fedstill.config.schema import Config
from fedstill.errors import InputError
from fedstill.methods.scaffold import ScaffoldSettings
from fedstill.settings import ModedSettings

Table = dict[str, Any]


def load_config(path: Path | None = None, overrides: Sequence[str] = (), base: Table | None = None) -> Config:
    """Return the configuration of a TOML file with ``key=value`` overrides.

    Parameters
    ----------
    path : Path, optional
        TOML file; without one, ``base`` or the defaults.
    overrides : sequence of str
        Such as ``train.rounds=200`` or ``method=scaffold+fedftg``; a value is TOML, or else a string.

    Raises
    ------
    InputError
        For a missing or malformed file, unknown keys, wrong types, impossible values; it names the key, the
        file and line where there is one, and the nearest right name.
    """
    table, text = read_toml(path) if path is not None else (deepcopy(base or {}), "")
    _set_keys(table, [parse_override(override) for override in overrides])
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        raise InputError(explain(error, path, lines_of(text), overrides)) from error


def config_with(base: Mapping[str, Any], values: Mapping[str, Any]) -> Config:
    """Return the configuration of a table in which dotted keys are set, such as ``{"data.beta": 0.1}``.

    Raises
    ------
    InputError
        As :func:`load_config` does.
    """
    table = deepcopy(dict(base))
    _set_keys(table, [(key, deepcopy(value)) for key, value in values.items()])
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        raise InputError(explain(error, None, {}, ())) from error


def config_from(table: Mapping[str, Any], where: str) -> Config:
    """Return the configuration in a table, for example that of a run directory."""
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, None, {}, ())}") from error


def _set_keys(table: Table, values: Sequence[tuple[str, Any]]) -> None:
    _let_an_overriding_mode_speak(table, {key for key, _ in values})
    for key, value in values:
        _set(table, key, value)


def _let_an_overriding_mode_speak(table: Table, overridden: set[str]) -> None:
    """Forget what the file's own mode had set, where the file is complete and an override names another mode.

    A run's ``config.toml`` holds every key; without this a mode given on the command line would set none.
    """
    given = {name: own for name, own in table.items() if isinstance(own, dict)}
    if "fedftg.mode" in overridden and "scaffold" in given:
        complete = _forget_mode(given["scaffold"], ScaffoldSettings)
        if complete and "scaffold.mode" not in overridden:
            given["scaffold"].pop("mode", None)
    kinds = {name: field.annotation for name, field in Config.model_fields.items() if f"{name}.mode" in overridden}
    for name, kind in kinds.items():
        if name in given and isinstance(kind, type) and issubclass(kind, ModedSettings):
            _forget_mode(given[name], kind)


def _forget_mode(table: Table, settings: type[ModedSettings]) -> bool:
    set_by = settings.set_by(str(table.get("mode", "paper")))
    complete = set_by.keys() <= table.keys()
    for key, value in set_by.items() if complete else ():
        if table[key] == value:
            del table[key]
    return complete


def read_toml(path: Path) -> tuple[Table, str]:
    """Return a TOML file's table and its text.

    Raises
    ------
    InputError
        If it is missing, unreadable or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte-order mark before it
        return tomllib.loads(text), text
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error


def parse_override(override: str) -> tuple[str, Any]:
    """Return the key and the value of ``key=value``; what is not TOML is a string."""
    key, equals, raw = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{override!r} is not an override: write key=value, for example train.rounds=200")
    try:
        return key.strip(), tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), raw.strip()


def _set(table: Table, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    place: Any = table
    for parent in parents:
        place = place.setdefault(parent, {}) if isinstance(place, dict) else _entry(place, parent, key)
        if not isinstance(place, dict | list):
            raise InputError(f"{key}: {parent!r} is a value, not a table")
    if isinstance(place, list):
        place = _entry(place, leaf, key)
    place[leaf] = value


def _entry(tables: list[Any], place: str, key: str) -> Any:
    """Return one of several tables of the same name, such as ``model.0``."""
    if not place.isdigit() or int(place) >= len(tables):
        table = key.partition(".")[0]
        raise InputError(
            f"{key}: there are {len(tables)} [[{table}]] tables; say which one, {table}.0 to {table}.{len(tables) - 1}"
        )
    return tables[int(place)]
