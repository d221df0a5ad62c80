"""A paper's table with our numbers beside the paper's: in a terminal, as Markdown, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from fedstill.markdown import grid
from fedstill.reproduce.metrics import AtRound, RoundsTo, Scale
from fedstill.reproduce.runs import Found
from fedstill.reproduce.tables import NOT_AVAILABLE, Cell, Table, Unit
from fedstill.studies.results import RunData, SeedRun
from fedstill.studies.statistics import Spread, spread

NOT_RUN, CANNOT_RUN = "not run", "cannot run"
UNITS: dict[Unit, tuple[float, int]] = {"%": (100, 2), "fraction": (1, 3), "rounds": (1, 1), "points": (100, 1)}
"""Unit -> what a metric's value is multiplied with, and digits after the point."""
WIDEST = 6
"""Columns in a part of a table in a terminal."""


@dataclass(frozen=True)
class Ours:
    """What we have for a cell.

    Parameters
    ----------
    cell : Cell
    seeds : tuple of SeedRun
        Every seed of which there is something.
    values : dict
        Seed -> the metric's values, in the cell's unit, of whole runs; empty where a run does not give any.
    scale : {"paper", "small"}
    planned : int
        Seeds that the cell should have.
    why_not : str or None
        Why fedstill cannot make its runs.
    """

    cell: Cell
    seeds: tuple[SeedRun, ...]
    values: dict[str, list[float]]
    scale: Scale
    planned: int
    why_not: str | None

    @staticmethod
    def of(cell: Cell, found: Sequence[SeedRun], scale: Scale, planned: int, why_not: str | None) -> Ours:
        """Return what there is of a cell's runs."""
        factor = UNITS[cell.unit][0]

        def measured(run: RunData) -> list[float]:
            return [factor * value for value in cell.metric.of(run, scale)]

        whole = {one.seed: measured(one.run) for one in found if one.state == "whole" and one.run is not None}
        return Ours(cell, tuple(found), whole, scale, planned, why_not)

    @property
    def spread(self) -> Spread | None:
        """Mean and deviation over seeds; None unless every whole run has a value."""
        if not all(self.values.values()):
            return None
        return spread(value for values in self.values.values() for value in values)

    @property
    def text(self) -> str:
        """What stands in the table."""
        if not self.values:
            return self._without_a_run()
        metric, whole = self.cell.metric, len(self.values)
        if self.spread is None:
            text = "not reached" if isinstance(metric, RoundsTo) else "not measured"
            reached = sum(bool(values) for values in self.values.values())
            seeds = f"{reached} of {_seeds(whole)} did" if reached else ""
        else:
            text = number(self.spread, self.cell.unit)
            seeds = ""
        seeds = seeds or (_seeds(whole) if whole < self.planned else "")
        instead = metric.instead(self.scale) if isinstance(metric, AtRound | RoundsTo) else ""
        said = ", ".join(remark for remark in (instead, seeds) if remark)
        return f"{text} ({said})" if said else text

    def _without_a_run(self) -> str:
        if not self.seeds:
            return CANNOT_RUN if self.why_not else NOT_RUN
        failed = [one for one in self.seeds if one.state == "failed"]
        return "failed" if failed else "unfinished"

    @property
    def remarks(self) -> list[str]:
        """Seeds that are not whole, and why."""
        where = ", ".join(self.cell.run)
        return [f"{where}, seed {one.seed}: {one.reason}" for one in self.seeds if one.state != "whole"]

    def record(self) -> dict[str, Any]:
        """Return the cell for ``table.json``."""
        paper, ours = self.cell.paper, self.spread
        return {
            "row": self.cell.row,
            "column": self.cell.column,
            "setting": self.cell.setting.name,
            "method": self.cell.method.name,
            "metric": self.cell.metric.model_dump(mode="json"),
            "unit": self.cell.unit,
            "paper": {"mean": paper.mean, "deviation": paper.deviation} if paper else NOT_AVAILABLE,
            "ours": {"mean": ours.mean, "deviation": ours.std} if ours else self.text,
            "seeds": self.values,
            "runs": {one.seed: one.reason or one.state for one in self.seeds},
            "why_not": self.why_not,
        }


@dataclass(frozen=True)
class Sheet:
    """A table with what we have.

    Parameters
    ----------
    table : Table
    scale : {"paper", "small"}
    cells : tuple of Ours
        One for each of the table's cells.
    """

    table: Table
    scale: Scale
    cells: tuple[Ours, ...]

    @staticmethod
    def of(table: Table, found: Found, scale: Scale, seeds: int, why_not: Callable[[Cell], str | None]) -> Sheet:
        """Return a table filled with the runs that were found; ``seeds`` is how many a cell should have."""
        cells = (Ours.of(cell, found.get(cell.run, ()), scale, seeds, why_not(cell)) for cell in table.cells)
        return Sheet(table, scale, tuple(cells))

    @property
    def ours(self) -> str:
        """What our lines are called."""
        return "ours" if self.scale == "paper" else "small form"

    @property
    def head(self) -> list[str]:
        """What stands above: paper, title, form, unit."""
        paper = self.table.paper
        form = "The paper's setting, with the deviations below."
        if self.scale == "small":
            form = f"Small form, not the paper's setting: {paper.small.form}. Its values reproduce nothing."
        units = ", ".join(dict.fromkeys("per cent" if cell.unit == "%" else cell.unit for cell in self.table.cells))
        metrics = dict.fromkeys(cell.metric.words(self.scale) for cell in self.table.cells)
        listed = list(metrics) if len(metrics) < WIDEST else [next(iter(metrics)), "...", list(metrics)[-1]]
        said = "; ".join(listed)
        pooled = all(cell.metric.kind == "top5" for cell in self.table.cells)
        over = "these rounds of all seeds" if pooled else "seeds"
        deviation = f"± is the standard deviation over {over}, a number of seeds in brackets what is there so far."
        return [
            f"{paper.name}, {self.table.title}",
            paper.reference,
            form,
            f"{_capital(said)}; in {units}. {deviation}",
        ]

    @property
    def foot(self) -> list[str]:
        """What stands below: deviations, notes, what cannot be run or failed."""
        lines = [f"Deviation: {text}" for text in (*self.table.deviations, *self.table.paper.deviations)]
        lines += [f"Note: {text}" for text in self.table.notes]
        if any(cell.cell.paper is None for cell in self.cells):
            lines.append(f"{_capital(NOT_AVAILABLE)}: the paper draws it only, or the text at hand does not have it.")
        reasons = dict.fromkeys(cell.why_not for cell in self.cells if cell.why_not and not cell.seeds)
        lines += [f"{_capital(CANNOT_RUN)}: {reason}." for reason in reasons]
        remarks = dict.fromkeys(remark for cell in self.cells for remark in cell.remarks)
        return lines + list(remarks)

    def lines(self, cells: Collection[Cell], columns: Sequence[str]) -> list[list[str]]:
        """Return the table's lines, two for each row: the paper's and ours.

        Parameters
        ----------
        cells : collection of Cell
            Those to be shown; the place of any other is empty.
        columns : sequence of str
        """
        by_place = {(one.cell.row, one.cell.column): one for one in self.cells if one.cell in cells}
        found = []
        for row in self.table.rows:
            own = [by_place.get((row, column)) for column in columns]
            if any(own):
                printed = [(one.cell.paper.text if one.cell.paper else NOT_AVAILABLE) if one else "" for one in own]
                found.append([row, "paper", *printed])
                found.append(["", self.ours, *(one.text if one else "" for one in own)])
        return found

    def markdown(self, cells: Collection[Cell] | None = None) -> str:
        """Return some cells as Markdown, by default all."""
        head = self.head
        columns = self._columns(cells or self.table.cells)
        rows = grid(["", "", *columns], self.lines(cells or self.table.cells, columns), left=2)
        bold = f"**{head[2]}**" if self.scale == "small" else head[2]
        foot = [f"- {line}" for line in self.foot]
        return "\n".join([f"# {head[0]}", "", head[1], "", bold, "", head[3], "", rows, "", *foot]) + "\n"

    def rich(self, cells: Collection[Cell]) -> list[RichTable]:
        """Return some cells as tables for a terminal, ``WIDEST`` columns each."""
        columns = self._columns(cells)
        parts = [columns[first : first + WIDEST] for first in range(0, len(columns), WIDEST)]
        return [self._rich_part(cells, part) for part in parts]

    def _columns(self, cells: Collection[Cell]) -> list[str]:
        present = {cell.column for cell in cells}
        return [column for column in self.table.columns if column in present]

    def _rich_part(self, cells: Collection[Cell], columns: Sequence[str]) -> RichTable:
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("", min_width=12)
        table.add_column("", no_wrap=True)
        for column in columns:
            table.add_column(escape(column), justify="right")
        for line in self.lines(cells, columns):
            table.add_row(*(escape(cell) for cell in line), style="" if line[0] else "bold", end_section=not line[0])
        return table

    def record(self) -> dict[str, Any]:
        """Return the whole table for ``table.json``."""
        paper = self.table.paper
        return {
            "table": self.table.id,
            "title": self.table.title,
            "reference": paper.reference,
            "scale": self.scale,
            "form": paper.small.form if self.scale == "small" else "the paper's setting",
            "deviations": [*self.table.deviations, *paper.deviations],
            "notes": list(self.table.notes),
            "cells": [cell.record() for cell in self.cells],
        }


def number(value: Spread, unit: Unit) -> str:
    """Return a mean with its deviation, if there is one, such as ``82.27 ± 0.67``."""
    digits = UNITS[unit][1]
    deviation = f" ± {value.std:.{digits}f}" if value.std is not None else ""
    return f"{value.mean:.{digits}f}{deviation}"


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
