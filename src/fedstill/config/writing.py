"""A configuration as TOML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from fedstill.config.schema import Config, scaffold_mode_under
from fedstill.settings import ModedSettings


def to_toml(config: Config, comments: bool = False) -> str:
    """Return the whole configuration as TOML.

    With ``comments`` each key has its description above it, and a key that a mode sets stands commented out, so
    that another mode can be named in the file.
    """
    follows = config.scaffold.mode == scaffold_mode_under(config.method, config.fedftg.mode)
    by_other_keys = {"scaffold.mode": "fedftg.mode"} if follows else {}
    return "\n".join(_section(config, "", comments, by_other_keys)).strip() + "\n"


def _section(model: BaseModel, prefix: str, comments: bool, set_by: Mapping[str, str]) -> Iterator[str]:
    tables: list[tuple[str, str, BaseModel]] = []
    by_mode = model.set_by(str(getattr(model, "mode", ""))) if isinstance(model, ModedSettings) else {}
    set_by = {
        **set_by,
        **{f"{prefix}{name}": "mode" for name, value in by_mode.items() if getattr(model, name) == value},
    }
    for name, field in sorted(type(model).model_fields.items(), key=lambda item: item[0] != "mode"):
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            tables.append((name, f"[{prefix}{name}]", value))
            continue
        if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            header = f"[{prefix}{name}]" if len(value) == 1 else f"[[{prefix}{name}]]"
            tables += [(name, header, part) for part in value]
            continue
        if comments and field.description:
            yield from (f"# {line}" for line in field.description.split("\n"))
        if comments and f"{prefix}{name}" in set_by:
            yield f"# {name} = {_toml_value(value)}   # set by {set_by[f'{prefix}{name}']}"
        elif value is None:
            if name == "clip_norm":
                yield 'clip_norm = "none"'
            elif comments:
                yield f"# {name} ="
        else:
            yield f"{name} = {_toml_value(value)}"
    for name, header, table in tables:
        yield from ("", header)
        yield from _section(table, f"{prefix}{name}.", comments, set_by)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(part) for part in value) + "]"
    # A JSON string is a TOML one, save for DEL.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
