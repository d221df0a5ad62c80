"""The command ``fedstill reproduce``: what it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.markup import escape

from fedstill.config import Config
from fedstill.data import list_datasets
from fedstill.errors import InputError
from fedstill.federation import cohort_size
from fedstill.names import unknown
from fedstill.reproduce.engine import Plan, carry_out, default_seeds, due, file_of
from fedstill.reproduce.metrics import Scale
from fedstill.reproduce.runs import configs_of, missing_file, needs, study_of, why_not
from fedstill.reproduce.sheet import Sheet
from fedstill.reproduce.tables import Cell, Table, list_tables, load_table
from fedstill.studies.sweep import Standing

SCALES: tuple[Scale, ...] = get_args(Scale)


def scale_of(word: str) -> Scale:
    """Return the scale that a command line names."""
    for scale in SCALES:
        if word == scale:
            return scale
    raise unknown("scale", word, SCALES)


def plan_of(table: str | None, only: str | None, scale: Scale, seeds: int | None, out: Path | None) -> Plan:
    """Return the plan that a command line asks for."""
    if table is None:
        raise InputError(f"name a table or a figure: {', '.join(list_tables())}; --list says more about each")
    return Plan.of(table, only, scale=scale, seeds=seeds, out=out)


def by_command(
    plan: Plan, out: Console, err: Console, workers: int | None, *, retry_failed: bool, dry_run: bool, show: bool
) -> bool:
    """Run a plan, or print what there is; return whether a run of its cells has failed."""
    if dry_run:
        print_plan(plan, retry_failed, out)
        return False
    if show:
        print_sheet(plan.sheet(), plan.cells, out)
        return False
    sheet = carry_out(plan, workers, retry_failed, err)
    print_sheet(sheet, plan.cells, out)
    out.print(escape(f"the table is in {file_of(sheet.table, plan.out, 'md')} and .json, the runs are beside it"))
    return any(one.state == "failed" for cell in sheet.cells if cell.cell in plan.cells for one in cell.seeds)


def print_list(scale: Scale, out: Console) -> None:
    """Print every table: its id, title, cells, what its runs cost, the data that it needs and whether they are there.

    Parameters
    ----------
    scale : {"paper", "small"}
        The form whose cost is printed.
    out : Console
    """
    for paper in dict.fromkeys(id.partition("/")[0] for id in list_tables()):
        tables = [load_table(id) for id in list_tables(paper=paper)]
        configs = configs_of(study_of(tables[0].paper, tables, scale, seeds=1))
        for table in tables:
            _print_entry(table, {cell.run: configs[cell.run] for cell in table.cells}, scale, out)


def _print_entry(table: Table, configs: Mapping[tuple[str, str], Config], scale: Scale, out: Console) -> None:
    seeds = default_seeds(table.paper, scale)
    out.print(f"[bold]{table.id}[/]  {escape(f'{table.paper.name}, {table.title}')}")
    out.print(f"    {len(table.cells)} cells; {cost(list(configs.values()), seeds)}")
    out.print(f"    data: {', '.join(_data(name) for name in needs(configs.values()))}")
    lacking = {run: reason for run, config in configs.items() if (reason := why_not(config))}
    if lacking:
        possible = sum(cell.run not in lacking for cell in table.cells)
        out.print(escape(f"    can be run: {possible or 'none'}; {'; '.join(dict.fromkeys(lacking.values()))}"))


def _data(name: str) -> str:
    if name not in [known for known, _ in list_datasets()]:
        return f"{name} (fedstill does not read it)"
    file = missing_file(name)
    return escape(f"{name} ({'found' if file is None else f'missing: {file}'})")


def cost(runs: Sequence[Config], seeds: int) -> str:
    """Return in words what some runs cost, each with a number of seeds."""
    rounds = [config.train.rounds for config in runs]
    active = [cohort_size(config.train.participation, config.data.clients) for config in runs]
    trained = sum(number * clients for number, clients in zip(rounds, active, strict=True))
    each = f"{min(rounds):,}" if min(rounds) == max(rounds) else f"{min(rounds):,} to {max(rounds):,}"
    return (
        f"{len(runs) * seeds:,} runs of {each} rounds; {sum(rounds) * seeds:,} rounds and {trained * seeds:,} times "
        f"a client's training in all"
    )


def print_plan(plan: Plan, retry_failed: bool, out: Console) -> None:
    """Print which runs are there and which would be made; nothing is run or written."""
    standings = plan.runnable()
    todo = due(standings, retry_failed)
    for one in standings:
        out.print(escape(f"{_state(one, retry_failed)}: {one.cell.label}  ({plan.out / one.cell.directory})"))
    there = len(standings) - len(todo)
    out.print(f"{len(plan.cells)} cells; {len(todo)} runs to do, {there} done or failed before")
    if todo:
        out.print(f"to do: {cost([one.cell.config for one in todo], 1)}")


def _state(one: Standing, retry_failed: bool) -> str:
    if one.state == "interrupted":
        return f"to go on after round {one.rounds}"
    return "to run" if due([one], retry_failed) else one.state


def print_sheet(sheet: Sheet, cells: Sequence[Cell], out: Console) -> None:
    """Print some cells of a table: as tables on a terminal, else as Markdown."""
    if not out.is_terminal:
        out.print(escape(sheet.markdown(cells)), end="")
        return
    title, reference, form, what = sheet.head
    out.print(f"[bold]{escape(title)}[/]\n{escape(reference)}")
    out.print(f"[bold red]{escape(form)}[/]" if sheet.scale == "small" else escape(form))
    out.print(escape(what))
    for part in sheet.rich(cells):
        out.print(part)
    for line in sheet.foot:
        out.print(escape(line))
