"""The demonstration: seven methods on handwritten digits, in the setting that distillation is for.

Ten clients with skewed labels train for long in each of few rounds. The seven runs share partition, initial
weights and batches, and their bounds are computed beside them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedstill.build import build
from fedstill.client import ClientWork
from fedstill.config import Config, load_config
from fedstill.errors import InputError
from fedstill.evaluation import Record, evaluate
from fedstill.execution import intra_op_threads
from fedstill.execution.allocator import keep_freed_memory
from fedstill.experiment import run
from fedstill.methods.base import LocalObjective
from fedstill.payload import model_payload
from fedstill.pool import run_jobs
from fedstill.presets import preset
from fedstill.progress import News, Reporter, Tell
from fedstill.report import Bound, Curve, draw_curves, markdown, reading, rich_table
from fedstill.runs.files import write_atomically

Rounds = dict[int, float]

FEDAVG, SCAFFOLD = "fedavg", "scaffold"
ALONE, POOLED = "a client alone, mean", "one model on pooled data"

RUNS: dict[str, tuple[str | None, tuple[str, ...]]] = {
    FEDAVG: (None, ("method=fedavg",)),
    "fedavg, class-weighted head": (FEDAVG, ("method=fedavg", "fusion.head=class-weighted")),
    "fedavg+fedftg, paper": (FEDAVG, ("method=fedavg+fedftg", "fedftg.mode=paper")),
    "fedavg+fedftg, tuned": (FEDAVG, ("method=fedavg+fedftg", "fedftg.mode=tuned")),
    SCAFFOLD: (None, ("method=scaffold",)),
    "scaffold+fedftg, paper": (SCAFFOLD, ("method=scaffold+fedftg", "fedftg.mode=paper")),
    "scaffold+fedftg, tuned": (SCAFFOLD, ("method=scaffold+fedftg", "fedftg.mode=tuned")),
}
"""Name -> the name of its base, and what it sets in the preset."""

SHORT = ("train.rounds=2", "local.epochs=2", "fedftg.iterations=5")
"""What the short form sets, too."""

IN_ONE_PROCESS = (
    "execution.device=cpu",
    "execution.executor=serial",
    "execution.intra_op_threads=1",
    "execution.server_threads=1",
)


@dataclass(frozen=True)
class RunJob:
    """One of the runs, with a run directory of its own; returns its records."""

    name: str
    config: Config
    directory: Path

    def __call__(self, tell: Tell) -> list[Record]:
        """Run the experiment."""
        return run(self.config, directory=self.directory, callbacks=[Reporter(tell)]).records


@dataclass(frozen=True)
class BoundJob:
    """Training without a federation: each client by itself, or one model on all their data.

    It takes the federation's initial weights, its epochs and its learning rate in every round, and returns
    round -> test accuracy; the mean over the clients where each trains by itself.
    """

    name: str
    config: Config
    pooled: bool

    def __call__(self, tell: Tell) -> Rounds:
        """Train and measure."""
        tell(News(0))
        keep_freed_memory()
        with intra_op_threads(self.config.execution.intra_op_threads):
            return self._train(tell)

    def _train(self, tell: Tell) -> Rounds:
        federation, _ = build(self.config)
        shares = [torch.cat(federation.trainer.shares)] if self.pooled else federation.trainer.shares
        trainer = replace(federation.trainer, objective=LocalObjective(), shares=shares)
        test, classes = federation.evaluation.sets["test"], federation.info.num_classes
        models = [federation.initial] * len(shares)
        found: Rounds = {}
        for round in range(self.config.train.rounds):
            right = []
            for client, weights in enumerate(models):
                result = trainer([federation.model], ClientWork(round, client, model_payload(weights), {}))
                models[client] = result.payload.weights()
                score = evaluate(federation.model, models[client], test, classes, self.config.eval.batch_size)
                right.append(score.accuracy)
                tell(News(round + (client + 1) / len(models)))
            found[round + 1] = sum(right) / len(right)
            tell(News(round + 1, found[round + 1]))
        return found


@dataclass(frozen=True)
class Comparison:
    """What the demonstration gave."""

    title: str
    curves: list[Curve]
    bounds: list[Bound]

    @property
    def reading(self) -> str:
        """What the numbers say."""
        return reading(self.curves, self.bounds)


def demo(out: Path, short: bool = False, console: Console | None = None, workers: int | None = None) -> Comparison:
    """Run the demonstration.

    Parameters
    ----------
    out : Path
        A new directory: ``table.md``, ``curves.png``, ``results.json``, and a run directory for each run.
    short : bool
        Two rounds of two epochs, to see that everything works.
    console : Console, optional
        Where progress is shown; by default nowhere.
    workers : int, optional
        Processes at a time; by default one per core.

    Raises
    ------
    InputError
        If ``out`` exists; nothing has been written.
    """
    if out.exists():
        raise InputError(f"{out}: exists already; name another directory")
    configs = {name: configuration(changes, short) for name, (_, changes) in RUNS.items()}
    jobs: list[RunJob | BoundJob] = [
        RunJob(name, config, out / "".join(letter if letter.isalnum() else "-" for letter in name))
        for name, config in configs.items()
    ]
    jobs += [BoundJob(name, configs[FEDAVG], pooled) for name, pooled in ((ALONE, False), (POOLED, True))]
    found = run_and_show(jobs, workers or os.cpu_count() or 1, console or Console(quiet=True))
    records = {name: found[name] for name in RUNS}
    curves = [Curve.of(name, records[name], base) for name, (base, _) in RUNS.items()]
    ensembles = records[FEDAVG][0]["ensembles"]
    bounds = [
        Bound(ALONE, found[ALONE], "floor"),
        Bound("uniform ensemble", {1: ensembles["uniform"]}, "ceiling"),
        Bound("class-weighted ensemble", {1: ensembles["class_weighted"]}, "ceiling"),
        Bound(POOLED, found[POOLED], "ceiling"),
    ]
    comparison = Comparison(title(configs[FEDAVG]), curves, bounds)
    write(comparison, out)
    return comparison


def configuration(changes: Sequence[str], short: bool) -> Config:
    """Return the configuration of a run."""
    return load_config(None, (*changes, *IN_ONE_PROCESS, *(SHORT if short else ())), preset("digits"))


def title(config: Config) -> str:
    """Return the setting in a line."""
    return (
        f"Test accuracy on {config.data.name}: {config.data.clients} clients, beta {config.data.beta}, "
        f"{config.local.epochs} local epochs, {config.train.rounds} rounds"
    )


def run_and_show(jobs: Sequence[RunJob | BoundJob], workers: int, console: Console) -> dict[str, Any]:
    """Run the jobs in processes, the longest first, with a bar for each; return name -> result."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[accuracy]}", justify="right"),
        TimeElapsedColumn(),
        console=console,
    )
    tasks = {
        job.name: bars.add_task(job.name, total=job.config.train.rounds, accuracy="waits", start=False) for job in jobs
    }
    order = sorted(jobs, key=server_steps, reverse=True)

    def hear(position: int, news: News) -> None:
        task = tasks[order[position].name]
        bars.start_task(task)
        bars.update(task, completed=news.rounds)
        if news.accuracy is not None:
            bars.update(task, accuracy=f"{news.accuracy:6.1%}")

    with bars:
        results = run_jobs(order, workers, hear)
    return {job.name: result for job, result in zip(order, results, strict=True)}


def server_steps(job: RunJob | BoundJob) -> int:
    """Return how many distillation steps a job takes in a round; local training is the same for all."""
    keys = job.config.fedftg
    return keys.iterations * (keys.generator_steps + keys.student_steps) if "fedftg" in job.config.method else 0


def write(comparison: Comparison, out: Path) -> None:
    """Write the table, the picture and the numbers."""
    text = markdown(comparison.curves, comparison.bounds, comparison.title)
    write_atomically(out / "table.md", text.encode())
    write_atomically(out / "results.json", (json.dumps(asdict(comparison), indent=1) + "\n").encode())
    draw_curves(comparison.curves, comparison.bounds, out / "curves.png", comparison.title)


def show(comparison: Comparison, console: Console) -> None:
    """Print the table and what it says."""
    console.print(rich_table(comparison.curves, comparison.bounds, comparison.title))
    console.print(comparison.reading)
