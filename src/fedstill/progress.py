"""The live display of a run in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedstill.evaluation import Record
from fedstill.federation import Federation, FederationState


class ProgressDisplay:
    """Shows a bar for the rounds, one for the cohort, and a line for each round; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._rounds: TaskID | None = None
        self._clients: TaskID | None = None

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rounds is not None:
            self.bars.stop()

    def started(self, federation: Federation, state: FederationState, notes: list[str]) -> None:
        """Show what begins, and what is worth knowing about its data."""
        config = federation.config
        self.bars.console.print(
            f"[bold]{escape(config.method)}[/] on {escape(config.data.name)}: {len(federation.info.samples)} clients, "
            f"{config.data.partition}, seed {config.seed.data}/{config.seed.train}"
        )
        for line in notes:
            self.bars.console.print(f"[yellow]note[/] {escape(line)}")
        self.bars.start()
        self._rounds = self.bars.add_task("rounds ", total=config.train.rounds, completed=state.round)
        self._clients = self.bars.add_task("clients", total=None)

    def client_done(self, round: int, done: int, of: int) -> None:
        """Move the cohort's bar."""
        if self._clients is not None:
            self.bars.update(self._clients, completed=done, total=of)

    def round_done(self, record: Record) -> None:
        """Move the rounds' bar and print the round's line."""
        if self._rounds is not None:
            self.bars.advance(self._rounds)
        self.bars.console.print(round_line(record))


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
