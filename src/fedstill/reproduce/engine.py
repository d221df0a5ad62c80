"""Reproduce a table: plan its runs, run what is missing, and fill the table with what there is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path

from rich.console import Console

from fedstill.config import Config
from fedstill.data.sources import ROOT_VARIABLE
from fedstill.errors import InputError
from fedstill.reproduce.choose import chosen
from fedstill.reproduce.metrics import Scale
from fedstill.reproduce.runs import configs_of, found_runs, missing_file, needs, study_of, why_not
from fedstill.reproduce.sheet import Sheet
from fedstill.reproduce.tables import HOME, Cell, Paper, Table, list_tables, load_table
from fedstill.runs.files import write_atomically
from fedstill.studies.plan import Study
from fedstill.studies.sweep import Standing, check, opened, pace_of, run_cells, survey


@dataclass(frozen=True)
class Plan:
    """Some cells of a table, and the study of all runs of its paper.

    Parameters
    ----------
    table : Table
    cells : tuple of Cell
        Those that are asked for.
    scale : {"paper", "small"}
    seeds : int
    study : Study
    out : Path
        The paper's results folder.
    """

    table: Table
    cells: tuple[Cell, ...]
    scale: Scale
    seeds: int
    study: Study
    out: Path

    @staticmethod
    def of(
        id: str,
        only: str | None = None,
        *,
        scale: Scale = "paper",
        seeds: int | None = None,
        out: Path | None = None,
        home: Traversable = HOME,
    ) -> Plan:
        """Return the plan for a table.

        Parameters
        ----------
        id : str
            Such as ``fedftg/table1``; `fedstill reproduce --list` lists them.
        only : str, optional
            Words that choose cells, such as ``cifar10,beta=0.3,fedftg``.
        scale : {"paper", "small"}
            The paper's setting, or a form that a laptop finishes and that reproduces nothing.
        seeds : int, optional
            Seeds 0 to ``seeds - 1``; by default as many as the paper has, one in the small form.
        out : Path, optional
            Results folder; by default ``runs/reproduce/<paper>``, with ``-small`` for the small form. Tables of a
            paper share their runs there.
        home : Traversable
            Folder of the papers' folders.

        Raises
        ------
        InputError
            For an unknown table, or words that choose nothing.
        """
        table = load_table(id, home)
        cells = chosen(table, only)
        number = default_seeds(table.paper, scale) if seeds is None else seeds
        tables = [load_table(other, home) for other in list_tables(home, table.folder)]
        study = study_of(table.paper, tables, scale, number)
        small = "-small" if scale == "small" else ""
        return Plan(table, cells, scale, number, study, out or Path("runs", "reproduce", f"{table.folder}{small}"))

    def runnable(self) -> list[Standing]:
        """Return how far the runs of the cells are, without those that fedstill cannot make.

        Raises
        ------
        InputError
            If it can make none of them, or the results folder holds something else.
        """
        configs = configs_of(self.study)
        reasons = {cell.run: why_not(configs[cell.run]) for cell in self.cells}
        if all(reasons.values()):
            raise InputError(f"{self.table.id}: {next(iter(reasons.values()))}, so that none of these cells can be run")
        asked = {run for run, reason in reasons.items() if reason is None}
        return [one for one in survey(self.study, self.out) if (one.cell.setting, one.cell.variant) in asked]

    def sheet(self) -> Sheet:
        """Return the table with what there is in the results folder."""
        configs = configs_of(self.study)
        found = found_runs(self.study, self.out)
        planned = max(self.seeds, default_seeds(self.table.paper, self.scale))
        return Sheet.of(self.table, found, self.scale, planned, lambda cell: why_not(configs[cell.run]))


def default_seeds(paper: Paper, scale: Scale) -> int:
    """Return how many seeds a cell should have: the paper's, and one in the small form."""
    return paper.seeds if scale == "paper" else 1


def due(standings: Sequence[Standing], retry_failed: bool) -> list[Standing]:
    """Return the runs that are still to be done."""
    states = {"new", "interrupted"} | ({"failed"} if retry_failed else set())
    return [one for one in standings if one.state in states]


def carry_out(plan: Plan, workers: int | None, retry_failed: bool, console: Console) -> Sheet:
    """Run what a plan has not got yet, then write its table and return it.

    Parameters
    ----------
    plan : Plan
    workers : int or None
        Runs at a time; None for one per core.
    retry_failed : bool
        Run again what failed before.
    console : Console
        Where progress is shown.

    Raises
    ------
    InputError
        If data are missing or a run cannot be built; nothing has been run.
    """
    standings = plan.runnable()
    todo = due(standings, retry_failed)
    check_data([one.cell.config for one in todo])
    check([one.cell for one in todo])
    with opened(plan.study, plan.study.cells, plan.out):
        if todo:
            run_cells(todo, plan.out, workers, console, pace_of(standings))
        sheet = plan.sheet()
        write(sheet, plan.out)
    return sheet


def check_data(configs: Sequence[Config]) -> None:
    """Raise InputError where the file of a data set is missing."""
    files = [file for name in needs(configs) if (file := missing_file(name))]
    if files:
        raise InputError(
            f"data are missing: {' and '.join(files)}; set {ROOT_VARIABLE} to the folder that holds the data sets, "
            f"or choose other cells with --only"
        )


def write(sheet: Sheet, out: Path) -> None:
    """Write a table into the results folder, as Markdown and as JSON."""
    write_atomically(file_of(sheet.table, out, "md"), sheet.markdown().encode())
    record = json.dumps(sheet.record(), indent=1, ensure_ascii=False) + "\n"
    write_atomically(file_of(sheet.table, out, "json"), record.encode())


def file_of(table: Table, out: Path, suffix: str) -> Path:
    """Return where a table is written."""
    return out / f"{table.id.partition('/')[2]}.{suffix}"
