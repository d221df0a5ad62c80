"""What ``fedstill sweep`` does and prints: a study's runs, its search, or only what would be run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fedstill.errors import InputError
from fedstill.studies.plan import Study
from fedstill.studies.results import in_words
from fedstill.studies.search import METRICS, RESULT, ready, search, table_of
from fedstill.studies.sweep import Outcome, Standing, check, chosen, results_folder, survey, sweep


def by_command(
    study: Study,
    out: Path | None,
    workers: int | None,
    retry_failed: bool,
    only: Sequence[str],
    dry_run: bool,
    told: Console,
    progress: Console,
) -> bool:
    """Run a study or its search and print what came out; return whether anything failed.

    Parameters
    ----------
    study : Study
    out, workers, retry_failed, only
        As :func:`fedstill.studies.sweep` has them.
    dry_run : bool
        Only say what would be run.
    told, progress : Console
        Where the result is printed, and where progress is shown.
    """
    if study.table.search:
        if only or retry_failed:
            raise InputError("--only and --retry-failed are not for a [search]; a failed trial stays failed")
        return _search(study, out, workers, dry_run, told, progress)
    if dry_run:
        standings = survey(study, results_folder(study, out), looking=True)
        todo, others = chosen(standings, retry_failed, only)
        check([one.cell for one in todo])
        show_plan(todo, others, told)
        return False
    outcome = sweep(study, out=out, workers=workers, retry_failed=retry_failed, only=only, console=progress)
    show_outcome(outcome, told)
    return bool(outcome.failed)


def _search(
    study: Study, out: Path | None, workers: int | None, dry_run: bool, told: Console, progress: Console
) -> bool:
    table = ready(study)
    if dry_run:
        check(study.cells)
        first = in_words("", {key: study.cells[0].point[key] for key in table.space})
        told.print(f"up to {table.trials} trials of {len(study.cells)} run(s) each, by {METRICS[table.metric]}")
        told.print(escape(f"the first or lowest values: {first}; nothing was run"))
        return False
    found = search(study, out=out, workers=workers, console=progress)
    told.print(table_of(found))
    for one in found.trials:
        if one.accuracy is None:
            told.print(escape(f"trial {one.trial} failed: {one.failed}"))
    best = found.best
    told.print(escape(f"best: {in_words('', best.keys)}" if best else "no trial gave an accuracy"))
    told.print(escape(f"{len(found.trials)} trials; they are in {found.out}, the figures in {found.out / RESULT}"))
    return best is None


def show_plan(todo: Sequence[Standing], others: Sequence[Standing], console: Console) -> None:
    """Print what would be run, in the order of work, and what would not."""
    for one in [*todo, *others]:
        under_way = one.state in ("interrupted", "running")
        rounds = f" after round {one.rounds} of {one.cell.config.train.rounds}" if under_way else ""
        reason = f" ({one.reason})" if one.state == "failed" else ""
        console.print(escape(f"{one.state}{rounds}: {one.cell.label}, in {one.cell.directory}{reason}"))
    counts = Counter(one.state for one in [*todo, *others])
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    console.print(f"{len(todo)} to run ({told}); nothing was run")


def show_outcome(outcome: Outcome, console: Console) -> None:
    """Print what a sweep gave: each failed run with its reason, and a line for all."""
    for cell, reason in outcome.failed:
        console.print(escape(f"failed: {cell.label}, in {outcome.out / cell.directory}: {reason}"))
    finished = len(outcome.done) + len(outcome.before)
    runs = "run" if finished == 1 else "runs"
    before = f", {len(outcome.before)} of them before" if outcome.before else ""
    failed = f", {len(outcome.failed)} failed (again with --retry-failed)" if outcome.failed else ""
    console.print(escape(f"{finished} {runs} finished{before}{failed}; they are in {outcome.out}"))
