"""The fenced code blocks of a page: what each is, what its markers say, and how a reader would run it."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import typer

from fedstill import cli
from fedstill.config import keys, load_config
from fedstill.methods.registry import compose
from fedstill.studies.plan import Study, StudyTable

ROOT = Path(__file__).resolve().parents[2]
CODE = {"sh", "python", "toml"}
OUTPUT = {"", "text"}
REASONS = {"hours", "network", "GPU", "data"}
"""Why a block is not run: it takes too long, or needs a network, a GPU, or a data set that is not embedded."""

FENCE = re.compile(r"(?P<indent>\s*)(?P<fence>```+|~~~+)\s*(?P<language>\S*)")
MARKER = re.compile(r"\s*<!--\s*(.*?)\s*-->\s*")
FILE = re.compile(r"# ([\w-]+\.(?:py|toml))\n")


class WrongBlock(AssertionError):
    """A block that is neither run nor rightly marked."""


@dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is that of its fence, ``markers`` are the comments just before it."""

    page: Path
    line: int
    language: str
    text: str
    markers: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name in its first line, ``# mine.toml``, under which the reader is to save it."""
        found = FILE.match(self.text)
        return found[1] if found else None

    @property
    def continues(self) -> bool:
        """Whether it goes on in the folder, and with the names, of the block before."""
        return "continues" in self.markers

    @property
    def not_run(self) -> str | None:
        """The reason why it is not run."""
        return next((one.removeprefix("not run").lstrip(": ") for one in self.markers if "not run" in one), None)

    def wrong(self, what: str) -> WrongBlock:
        return WrongBlock(f"{self.where}: {what}")

    def check(self) -> None:
        """Refuse a language or a marker that is not known, and output that is a command."""
        if self.language not in CODE | OUTPUT:
            raise self.wrong(f"language {self.language!r}; code is {sorted(CODE)}, output has none or is text")
        if self.language in OUTPUT and re.search(r"^(\$ |fedstill )", self.text, re.MULTILINE):
            raise self.wrong("a command in a block of output")
        for marker in self.markers:
            if marker not in {"continues", "part", *(f"not run: {reason}" for reason in REASONS)}:
                raise self.wrong(f"marker {marker!r}; there are continues, part, and not run: {sorted(REASONS)}")


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, number = [], 0
    while number < len(lines):
        opening = FENCE.fullmatch(lines[number])
        if opening is None:
            number += 1
            continue
        end = number + 1
        while end < len(lines) and lines[end].strip() != opening["fence"]:
            end += 1
        text = "\n".join(line.removeprefix(opening["indent"]) for line in lines[number + 1 : end]) + "\n"
        markers = tuple(markers_above(lines[:number]))
        found.append(Block(page, number + 1, opening["language"], text, markers))
        number = end + 1
    return found


def markers_above(lines: Iterable[str]) -> Iterator[str]:
    """Yield the comments at the end of some lines, blank lines between them or not."""
    for line in reversed([line for line in lines if line.strip()]):
        marker = MARKER.fullmatch(line)
        if marker is None:
            return
        yield marker[1]


def chains(blocks: Iterable[Block]) -> list[list[Block]]:
    """Return the blocks that are run, each with those that continue it; TOML without a file's name makes nothing."""
    found: list[list[Block]] = []
    newest: list[Block] = []
    for block in blocks:
        if block.language not in CODE or block.not_run is not None:
            continue
        if block.continues and newest:
            newest.append(block)
            continue
        found.append([block])
        if block.language != "toml" or block.file:
            newest = found[-1]
    return found


def commands(block: Block) -> Iterator[tuple[list[str], int]]:
    """Yield the words of every command of a shell block, and the exit code that its comment speaks of."""
    for line in block.text.replace("\\\n", " ").splitlines():
        code = re.search(r"#.*exit code (\d)", line)
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end], int(code[1]) if code else 0
            words = words[end + 1 :]


@dataclass
class Reader:
    """Somebody who follows a page, in an empty folder."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "page"})
    unused: dict[str, Block] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.delenv("FEDSTILL_DATA", raising=False)
        self.monkeypatch.setattr(sys, "path", [*sys.path])
        self.monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def follow(self, chain: Iterable[Block]) -> None:
        """Do what some blocks say, one after another."""
        known = set(sys.modules)
        try:
            for block in chain:
                self.unused = {name: file for name, file in self.unused.items() if Path(name).stem not in block.text}
                {"sh": self.shell, "python": self.python, "toml": self.toml}[block.language](block)
        finally:
            for name in set(sys.modules) - known:
                if str(getattr(sys.modules[name], "__file__", "")).startswith(str(self.folder)):
                    del sys.modules[name]
        for name, block in self.unused.items():
            raise block.wrong(f"no block that continues it uses {name}")

    def shell(self, block: Block) -> None:
        for words, code in commands(block):
            if words[0] == "fedstill":
                told = self.fedstill(words[1:])
                assert told == code, f"{block.where}: {shlex.join(words)}: exit code {told}"
            elif words[0] == "export" and len(words) == 2 and "=" in words[1]:
                self.export(*words[1].split("=", 1))
            elif words[0] == "python" and len(words) == 2 and (self.folder / words[1]).is_file():
                runpy.run_path(words[1], run_name="__main__")
            else:
                raise block.wrong(f"{shlex.join(words)!r} cannot be run: it needs a marker <!-- not run: reason -->")

    def fedstill(self, words: list[str]) -> int:
        """Run a command in this process; the last two words may be ``> file``."""
        *arguments, sign, file = [*words, "", ""] if ">" not in words else words
        self.monkeypatch.setattr(sys, "argv", ["fedstill", *(arguments if sign == ">" else words)])
        printed = StringIO()
        with pytest.raises(SystemExit) as ended, redirect_stdout(printed) if sign == ">" else nullcontext():
            cli.main()
        if sign == ">":
            Path(file).write_text(printed.getvalue(), encoding="utf-8")
        return int(ended.value.code or 0)

    def export(self, name: str, value: str) -> None:
        self.monkeypatch.setenv(name, value)
        if name == "PYTHONPATH":
            sys.path[:0] = [str(self.folder / part) for part in value.split(os.pathsep)]

    def python(self, block: Block) -> None:
        code = compile("\n" * block.line + block.text, block.where, "exec")
        if block.file:
            (self.folder / block.file).write_text(block.text, encoding="utf-8")
            self.unused[block.file] = block
        else:
            exec(code, self.names)

    def toml(self, block: Block) -> None:
        table = tomllib.loads(block.text)
        if "part" in block.markers:
            return
        path = self.folder / (block.file or "page.toml")
        path.write_text(block.text, encoding="utf-8")
        if table.keys() & StudyTable.model_fields.keys():
            assert Study.load(path).cells
        else:
            compose(load_config(path))


def check_unrun(block: Block) -> None:
    """Check what can be checked of a block that is not run: its syntax; commands, options, keys, targets, scripts."""
    if block.language == "python":
        compile(block.text, block.where, "exec")
    elif block.language == "toml":
        tomllib.loads(block.text)
    else:
        for words, _ in commands(block):
            check_command(block, words)


def check_command(block: Block, words: list[str]) -> None:
    while "=" in words[0]:
        words = words[1:]  # a variable before the command
    if words[0] == "make" and not re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
        raise block.wrong(f"the Makefile has no target {words[1]}")
    if missing := [word for word in words if word.startswith("studies/") and not (ROOT / word).is_file()]:
        raise block.wrong(f"there is no {missing[0]}")
    if words[0] != "fedstill":
        return
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    if words[1] not in group.commands:
        raise block.wrong(f"there is no command {words[1]}")
    try:
        parsed = group.commands[words[1]].make_context(words[1], [word for word in words[2:] if word != ">"]).params
    except Exception as error:  # a usage error, of click or of Typer's own copy of it
        raise block.wrong(f"{shlex.join(words)}: {error}") from error
    for word in [*(parsed.get("arguments") or []), *(parsed.get("overrides") or [])]:
        key = re.sub(r"^model\.\d+\.", "model.", word.partition("=")[0])
        if "=" in word and key not in keys():
            raise block.wrong(f"there is no key {key}")
