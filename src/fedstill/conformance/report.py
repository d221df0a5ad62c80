"""The command ``fedstill conformance``: what it runs and prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedstill.conformance.findings import Finding
from fedstill.conformance.replays import folder
from fedstill.conformance.runner import check_method, conformance, keys_of, list_checks
from fedstill.errors import InputError

MARKS = {True: "[green]holds[/]", False: "[red]FAILS[/]", None: "-"}


def by_command(
    arguments: Sequence[str], method: str | None, like: str | None, references: Path | None, out: Console
) -> bool:
    """Check what a command line names, print the findings, and say whether any check fails."""
    keys = keys_of([argument for argument in arguments if "=" in argument])
    names = [argument for argument in arguments if "=" not in argument]
    if not (place := references or folder()).is_dir():
        raise InputError(f"{'--references' if references else 'FEDSTILL_GOLDEN'}: there is no folder {place}")
    if method is not None and names:
        raise InputError("--method and names do not go together; give one or the other")
    if method is None and like is not None:
        raise InputError("--like says what a method of your own claims to be: name it with --method")
    if method is not None:
        found = check_method(method, like=like, keys=keys, references=references)
    else:
        found = conformance(names or None, keys=keys, references=references)
    print_findings(found, out)
    return any(one.held is False for one in found)


def print_findings(found: Sequence[Finding], out: Console) -> None:
    """Print a row for each finding, and how many hold."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("method", "check", ""):
        table.add_column(title, no_wrap=True)
    table.add_column("found", overflow="fold")
    for one in found:
        if out.is_terminal:
            table.add_row(escape(one.method), one.check, MARKS[one.held], escape(one.detail))
        else:  # nobody's terminal is to be fitted
            out.print(f"{escape(one.method)}  {one.check}  {MARKS[one.held]}  {escape(one.detail)}")
    if out.is_terminal:
        out.print(table)
    held = [one.held for one in found]
    out.print(f"{held.count(True)} hold, {held.count(False)} fail, {held.count(None)} do not apply")


def print_checks(out: Console) -> None:
    """Print every check: its name, the methods it applies to, what it checks."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("check", "applies to"):
        table.add_column(title, no_wrap=True)
    table.add_column("what it checks", overflow="fold")
    for one in list_checks():
        if out.is_terminal:
            table.add_row(one.name, one.scope, escape(one.what))
        else:
            out.print(escape(f"{one.name}  ({one.scope})  {one.what}"))
    if out.is_terminal:
        out.print(table)
