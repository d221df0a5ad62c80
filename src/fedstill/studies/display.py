"""What is shown while the runs of a study go on: bars in a terminal, else a line for each run that has ended."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fedstill.progress import News
from fedstill.studies.plan import Cell


@dataclass
class Pace:
    """Measured seconds per round by kind of run; a kind is what differs in its seed alone."""

    seconds: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, seconds: float, rounds: int = 1) -> None:
        """Note the seconds that some rounds took."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        self.rounds[kind] = self.rounds.get(kind, 0) + rounds

    def means(self) -> dict[str, float]:
        """Return kind -> mean seconds per round."""
        return {kind: self.seconds[kind] / rounds for kind, rounds in self.rounds.items() if rounds}


def time_left(
    running: Sequence[tuple[str, float]], waiting: Sequence[tuple[str, float]], pace: Mapping[str, float], workers: int
) -> float | None:
    """Return the seconds until all runs have ended, if rounds take on average what they took so far.

    Parameters
    ----------
    running, waiting : sequence of (kind, rounds left)
        Those that wait start in this order, each as soon as another has ended.
    pace : mapping
        Kind -> seconds per round.
    workers : int
        Runs at a time.

    Returns
    -------
    float or None
        None where nothing was measured yet of a kind that is still to come.
    """
    if any(kind not in pace for kind, left in (*running, *waiting) if left > 0):
        return None
    ends = [left * pace[kind] for kind, left in running if left > 0]
    ends += [0.0] * (workers - len(ends))
    heapq.heapify(ends)
    for kind, left in waiting:
        heapq.heapreplace(ends, ends[0] + left * pace[kind])
    return max(ends, default=0.0)


class StudyDisplay:
    """Shows the runs that are to be done; a context manager.

    Parameters
    ----------
    console : Console
    cells : sequence of Cell
        In the order of work.
    done : sequence of int
        Rounds that each has already.
    pace : Pace
        What is known of their kinds.
    workers : int
    title : str
        Of the bar for all.
    """

    def __init__(
        self,
        console: Console,
        cells: Sequence[Cell],
        done: Sequence[int],
        pace: Pace,
        workers: int,
        title: str = "runs",
    ) -> None:
        self.console = console
        self.cells = cells
        self.pace = pace
        self.workers = workers
        self.rounds = [float(rounds) for rounds in done]
        self.accuracies: dict[int, float] = {}
        self.ended_runs: set[int] = set()
        self.bars = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[told]}"),
            console=console,
        )  # fmt: skip
        self.all = self.bars.add_task(title, total=len(cells), told="")
        self.tasks: dict[int, TaskID] = {}

    def __enter__(self) -> StudyDisplay:
        if self.console.is_terminal:
            self.bars.start()
        self._show_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def heard(self, position: int, news: News) -> None:
        """Show how far a run is."""
        cell = self.cells[position]
        self.rounds[position] = news.rounds
        if news.accuracy is not None:
            self.accuracies[position] = news.accuracy
        if news.seconds is not None:
            self.pace.add(cell.kind, news.seconds)
        if position not in self.tasks:
            self.tasks[position] = self.bars.add_task(cell.label, total=cell.config.train.rounds, told="")
        accuracy = f"  {self.accuracies[position]:.1%}" if position in self.accuracies else ""
        told = f"round {int(news.rounds)}/{cell.config.train.rounds}{accuracy}"
        self.bars.update(self.tasks[position], completed=news.rounds, told=told)
        self._show_all()

    def ended(self, position: int, failure: str | None) -> None:
        """Show that a run has ended: its accuracy, or the line that says why it failed."""
        self.ended_runs.add(position)
        if position in self.tasks:
            self.bars.remove_task(self.tasks.pop(position))
        cell = self.cells[position]
        accuracy = f"{self.accuracies[position]:.1%}" if position in self.accuracies else "done"
        told = f"[red]failed[/]: {escape(failure)}" if failure else accuracy
        self._show_all()
        left = "" if self.console.is_terminal or len(self.ended_runs) == len(self.cells) else f", {self._left()}"
        self.bars.console.print(f"{len(self.ended_runs)}/{len(self.cells)} {escape(cell.label)}: {told}{left}")

    def _show_all(self) -> None:
        told = f"{len(self.ended_runs)}/{len(self.cells)}, {self._left()}"
        self.bars.update(self.all, completed=len(self.ended_runs), told=told)

    def _left(self) -> str:
        left: dict[bool, list[tuple[str, float]]] = {True: [], False: []}
        for position, cell in enumerate(self.cells):
            if position not in self.ended_runs:
                rounds = cell.config.train.rounds - self.rounds[position]
                left[position in self.tasks].append((cell.kind, rounds))
        seconds = time_left(left[True], left[False], self.pace.means(), self.workers)
        return "time to the end unknown" if seconds is None else f"{timedelta(seconds=round(seconds))} to the end"
