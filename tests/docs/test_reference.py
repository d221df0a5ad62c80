"""The generated pages are fresh, and say what the configuration and the command line do."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from blocks import ROOT
from typer.testing import CliRunner

from fedstill.cli import app
from fedstill.config import Config, keys, to_toml

TOOL = ROOT / "tools" / "reference.py"
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


def generated() -> dict[Path, str]:
    spec = importlib.util.spec_from_file_location("reference", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.pages())


def test_the_pages_are_fresh() -> None:
    for path, text in generated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: make docs-reference"


def test_the_configuration_page_has_every_key_with_its_default() -> None:
    tables = re.findall(r"^\| key \| value \| default .*\n[-| ]+\n((?:\| .*\n)+)", CONFIGURATION, re.MULTILINE)
    rows = dict(re.findall(r"^\| `([\w.]+)` \| [^|]+ \| (?:`(.*?)`)? ?\| ", "".join(tables), re.MULTILINE))
    assert sorted(rows) == sorted(keys())
    written = tomllib.loads(to_toml(Config()))
    for key, default in rows.items():
        *tables, name = key.split(".")
        table = written[tables[0]] if tables else written
        assert table.get(name) == (tomllib.loads(f"x = {default}")["x"] if default else None), key


def test_the_modes_are_those_that_a_configuration_gets() -> None:
    found = re.findall(r"^\| key \|((?: `\w+` \|)+)\n[-| ]+\n((?:\| `[\w.]+` .*\n)+)", CONFIGURATION, re.MULTILINE)
    tables = {re.match(r"\| `(\w+)\.", rows)[1]: (re.findall(r"`(\w+)`", head), rows) for head, rows in found}
    assert tables.keys() == {"scaffold", "moon", "feddf", "fedgen", "fedmd", "fedftg"}
    for name, (modes, rows) in tables.items():
        for row in rows.splitlines():
            key, *values = re.findall(r"`(.*?)`", row)
            for mode, value in zip(modes, values, strict=True):
                settings = getattr(Config.model_validate({name: {"mode": mode}}), name)
                assert getattr(settings, key.split(".")[1]) == tomllib.loads(f"x = {value}")["x"], (key, mode)


@pytest.mark.parametrize("section", COMMANDS.split("\n## ")[1:], ids=lambda text: text.split("`")[1])
def test_a_command_has_the_options_of_its_help(section: str) -> None:
    name = section.split("`")[1].split()[1]
    listed = set(re.findall(r"--[\w-]+", "".join(re.findall(r"^\| (`--.*?) \|", section, re.MULTILINE))))
    assert listed | {"--help"} == options_in_help(name)


def test_every_command_has_a_section() -> None:
    panel = help_of().partition("Commands")[2]
    assert re.findall(r"^│ (\w+) ", panel, re.MULTILINE) == re.findall(r"^## `fedstill (\w+)`", COMMANDS, re.MULTILINE)


def options_in_help(command: str) -> set[str]:
    """Return the options that a command's help lists, each at the beginning of a line of its panel."""
    lines = [line.strip("│ ") for line in help_of(command).splitlines()]
    return {name for line in lines if line.startswith("--") for name in re.findall(r"--[\w-]+", line.split("<")[0])}


def help_of(*command: str) -> str:
    told = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert told.exit_code == 0
    return told.output
