"""Write the two reference pages: the configuration's from its schema, the commands' from the command line.

``make docs-reference`` runs it; a test compares the pages with what it would write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import cleandoc, signature
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedstill import presets
from fedstill.cli import app
from fedstill.config import Config
from fedstill.data import list_augmentations, list_datasets, list_protocols
from fedstill.markdown import grid
from fedstill.methods.registry import list_methods
from fedstill.models import list_models
from fedstill.settings import ModedSettings

DOCS = Path(__file__).resolve().parents[1] / "docs"

CONFIGURATION = """\
# Configuration reference

A configuration is a TOML file, or a mapping in Python; a key on the command line is `key=value` with the table before
a dot, `train.rounds=200`. What is not given has the default. `fedstill show PRESET` prints a preset with every key.
Unknown keys and wrong types are refused with the file, the line and the nearest right name.

This page is made from the schema; `make docs-reference` writes it anew."""

COMMANDS = """\
# Command reference

`fedstill COMMAND --help` says the same. Exit codes: 0 all is well; 1 a run cannot go on, or a check fails; 2 bad
input, and nothing has been written; 130 stopped by Ctrl-C or SIGTERM.

This page is made from the command line's own declarations; `make docs-reference` writes it anew."""


def pages() -> dict[Path, str]:
    """Return the generated pages: where each lies, and its text."""
    return {DOCS / "configuration.md": configuration_page(), DOCS / "commands.md": commands_page()}


def configuration_page() -> str:
    """Return the configuration reference."""
    lines = [CONFIGURATION, "", "## Top level", ""]
    tables = {name: found for name, field in Config.model_fields.items() if (found := table_of(field))}
    own = {name: field for name, field in Config.model_fields.items() if name not in tables}
    lines.append(keys_table("", own))
    for name, settings in tables.items():
        lines += ["", f"## `[{name}]`", *about(settings, name)]
        if get_origin(Config.model_fields[name].annotation) is tuple:
            lines += [
                "",
                f"Several `[[{name}]]` tables give a federation [several architectures](different-models.md).",
            ]
        lines += ["", keys_table(f"{name}.", settings.model_fields)]
        if issubclass(settings, ModedSettings):
            lines += ["", *modes_table(name, settings)]
    names: dict[str, Mapping[str, str]] = {
        "Methods (`method`)": list_methods(),
        "Data sets (`data.name`)": dict(list_datasets()),
        "Partitions (`data.partition`)": dict(list_protocols()),
        "Augmentations (`data.augment`)": dict(list_augmentations()),
        "Models (`model.name`)": list_models(),
        "Presets": presets.list_presets(),
    }
    for title, entries in names.items():
        rows = [(f"`{name}`", in_cell(text)) for name, text in entries.items()]
        lines += ["", f"## {title}", "", grid(("name", ""), rows, left=None)]
    return "\n".join(lines) + "\n"


def table_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the settings class of a key that is a table, or a tuple of tables."""
    parts = (field.annotation, *get_args(field.annotation))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)


def about(settings: type[BaseModel], name: str) -> Iterator[str]:
    """Yield what a settings class says of itself, without its own name, and where a method's page is."""
    first = cleandoc(settings.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    text = first.removeprefix(f"``[{name}]``").lstrip(":. ").replace("``", "`")
    if text:
        yield from ("", text[:1].upper() + text[1:])
    if (DOCS / "methods" / f"{name}.md").is_file():
        yield from ("", f"The method: [{name}](methods/{name}.md).")


def keys_table(prefix: str, fields: Mapping[str, FieldInfo]) -> str:
    """Return a row for every key."""
    rows = [
        (f"`{prefix}{name}`", kind(field), value(field.default), in_cell(field.description or ""))
        for name, field in fields.items()
    ]
    return grid(("key", "value", "default", ""), rows, left=None)


def modes_table(name: str, settings: type[ModedSettings]) -> list[str]:
    """Return what each mode sets."""
    modes = get_args(settings.model_fields["mode"].annotation)
    by_mode = {mode: settings.set_by(mode) for mode in modes}
    rows = [
        (f"`{name}.{key}`", *(value(by_mode[mode][key]) for mode in modes))
        for key in sorted({key for keys in by_mode.values() for key in keys})
    ]
    said = f"`{name}.mode` sets these keys where they are not given:"
    return [said, "", grid(("key", *(f"`{mode}`" for mode in modes)), rows, left=None)]


def kind(field: FieldInfo) -> str:
    """Return the type of a key's value in words, with its choices and bounds."""
    return " ".join(part for part in (type_in_words(field.annotation), bounds(field.metadata)) if part)


def type_in_words(annotation: Any) -> str:
    """Return the words for a type."""
    words = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    if annotation in words:
        return words[annotation]
    parts = [part for part in get_args(annotation) if part is not NoneType and part is not Ellipsis]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{json.dumps(part)}`" for part in parts)
    if get_origin(annotation) is tuple:
        one = type_in_words(parts[0])
        return f"list of {one}s" if one in words.values() else f"list of {one}"
    return type_in_words(parts[0])  # a union with None, or something annotated


def bounds(metadata: Iterable[Any]) -> str:
    """Return the bounds of a number, such as ``> 0, ≤ 1``."""
    signs: dict[type, tuple[str, str]] = {Gt: (">", "gt"), Ge: ("≥", "ge"), Lt: ("<", "lt"), Le: ("≤", "le")}
    found = [(signs[type(one)], one) for one in metadata if type(one) in signs]
    return ", ".join(f"{sign} {getattr(one, name)}" for (sign, name), one in found)


def value(given: object) -> str:
    """Return a value as TOML has it; nothing for what is not set."""
    return "" if given is None else f"`{json.dumps(given)}`"  # numbers, texts and lists are written alike in both


def commands_page() -> str:
    """Return the command reference."""
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    lines = [COMMANDS]
    for name, command in group.commands.items():
        assert command.callback is not None
        lines += ["", f"## `fedstill {name}`", "", command.help or "", *parameters(command.callback, command.params)]
    return "\n".join(lines) + "\n"


def parameters(callback: Callable[..., Any], params: Iterable[Any]) -> Iterator[str]:
    """Yield the tables of a command's arguments and options."""
    hints, given = get_type_hints(callback), signature(callback).parameters
    arguments, options = [], []
    for param in params:
        names = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
        what, default = in_cell(param.help or ""), given[param.name].default
        if param.param_type_name == "argument":
            needed = ("" if param.required else "may be left out") + (", any number" if param.nargs < 0 else "")
            shown = param.metavar or param.name.upper()
            arguments.append((in_cell(shown), needed.removeprefix(", "), what))
        else:
            takes = taken(hints[param.name], param.metavar, param.multiple)
            options.append((names, takes, "" if default in (None, False) else f"`{default}`", what))
    if arguments:
        yield from ("", grid(("argument", "", ""), arguments, left=None))
    if options:
        yield from ("", grid(("option", "takes", "default", ""), options, left=None))


def taken(hint: Any, metavar: str | None, multiple: bool) -> str:
    """Return what an option takes; nothing for a switch."""
    kinds = [part for part in (get_args(hint) or (hint,)) if part is not NoneType]
    if kinds == [bool]:
        return ""
    words = {int: "whole number", float: "number", str: "text", Path: "path"}
    return (f"`{metavar}`" if metavar else words.get(kinds[0], "text")) + (", repeatable" if multiple else "")


def in_cell(text: str) -> str:
    """Return text that neither ends a cell nor begins HTML."""
    return " ".join(text.split()).replace("|", "&#124;").replace("<", "&lt;")


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
