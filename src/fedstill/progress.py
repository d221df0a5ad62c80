"""How a run is shown while it goes on: live in a terminal, or told to another process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedstill.callbacks import Callback, RunInfo
from fedstill.evaluation import Record
from fedstill.experiment import accuracies


class ProgressDisplay(Callback):
    """Shows a bar for the rounds, one for the cohort, and a line for each round."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._rounds: TaskID | None = None
        self._clients: TaskID | None = None

    def on_run_start(self, run: RunInfo) -> None:
        """Show what begins, and what is worth knowing about its data."""
        federation, config = run.federation, run.federation.config
        self.bars.console.print(
            f"[bold]{escape(config.method)}[/] on {escape(config.data.name)}: {len(federation.info.samples)} clients, "
            f"{config.data.partition}, seed {config.seed.data}/{config.seed.train}"
        )
        for line in run.notes:
            self.bars.console.print(f"[yellow]note[/] {escape(line)}")
        self._rounds = self.bars.add_task("rounds ", total=config.train.rounds, completed=run.state.round)
        self._clients = self.bars.add_task("clients", total=None)
        self.bars.start()

    def on_client_end(self, round: int, done: int, of: int) -> None:
        """Move the cohort's bar."""
        if self._clients is not None:
            self.bars.update(self._clients, completed=done, total=of)

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        """Move the rounds' bar and print the round's line."""
        if self._rounds is not None:
            self.bars.advance(self._rounds)
        self.bars.console.print(round_line(record))

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """Leave the terminal as it was."""
        self.bars.stop()


Tell = Callable[[object], None]


@dataclass(frozen=True)
class News:
    """How far a run is, in rounds, its newest accuracy, and the seconds of the round that has just ended."""

    rounds: float
    accuracy: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Reporter(Callback):
    """Tells another process."""

    tell: Tell

    def on_run_start(self, run: RunInfo) -> None:
        """Tell that it begins; the notes are in the run's log."""
        self.tell(News(run.state.round))

    def on_client_end(self, round: int, done: int, of: int) -> None:
        """Tell the part of the round that is done; the server's work is still to come."""
        self.tell(News(round - 1 + done / (of + 1)))

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        """Tell the accuracy, where one was measured, and the seconds."""
        self.tell(News(round, newest_accuracy([record]), seconds_spent([record])))


def newest_accuracy(records: list[Record]) -> float | None:
    """Return a run's newest accuracy: on the test set, or else on what it was measured on."""
    found = (accuracies(records, on) for on in ("test", "validation", "clients"))
    return next((list(rounds.values())[-1] for rounds in found if rounds), None)


def seconds_spent(records: Iterable[Record]) -> float:
    """Return the seconds that some rounds took, evaluation included."""
    return float(sum(sum(record["seconds"].values()) for record in records))


def round_line(record: Record) -> str:
    """Return a round in one line: loss, accuracies, seconds by phase, megabytes."""
    parts = [f"round {record['round']:>3}", f"loss {record['train_loss']:.3f}"]
    for model in ("fused", "refined"):
        scores: Any = record.get(model)
        if scores:
            parts += [f"{model} {value['accuracy']:.1%} on {on}" for on, value in scores.items() if _is_score(value)]
    ensembles: Any = record.get("ensembles")
    if ensembles:
        parts.append(f"ensembles {ensembles['uniform']:.1%} uniform, {ensembles['class_weighted']:.1%} class-weighted")
    seconds: Any = record["seconds"]
    parts.append(" ".join(f"{phase} {spent:.1f}s" for phase, spent in seconds.items() if spent >= 0.05))
    parts.append(f"{megabytes([record]):.2f} MB")
    return " | ".join(part for part in parts if part)


def _is_score(value: object) -> bool:
    return isinstance(value, dict) and "accuracy" in value


def megabytes(records: Iterable[Record]) -> float:
    """Return what was sent in both directions, in 10^6 bytes."""
    total = 0
    for record in records:
        sent: Any = record["bytes"]
        total += sum(sum(kinds.values()) for kinds in sent.values())
    return total / 1e6
