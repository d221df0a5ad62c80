"""What the server's distillation costs: its seconds over those of the round's local training, and its passes.

    FEDSTILL_DATA=... python benchmarks/distillation.py [--stems imagenet cifar] [--device cuda [--cuda-graphs]]
                                                        [--local-steps 5] [--iterations 2]

The paper's setting: 10 clients with 500 samples each train for 5 epochs of batch 50 (500 steps in all); then FedFTG
takes 10 outer iterations of batch 50 with those 10 as teachers. Every mode refines the same fused model with the same
teachers, in turn, each round after a training of its own. With --local-steps the training is that short, and scaled to
50 steps; with --iterations a refinement is that short, and scaled to its mode's own number.

Passes are counted by hooks on a run that is not timed, floating-point operations by torch.utils.flop_counter in the
same run. The unit is one forward pass of the client's model on a batch of 50: by operations for everything, the
generator included (its forward alone is given too).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from measure import (
    Source,
    alternate,
    arguments,
    device_option,
    federation,
    machine,
    median,
    ratio,
    report,
    seconds_of,
    spread,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedstill.distill.inputs import initial_generator
from fedstill.distill.teachers import StackedTeachers
from fedstill.execution import intra_op_threads
from fedstill.execution.allocator import keep_freed_memory
from fedstill.federation import Federation, FederationState
from fedstill.methods.base import Upload
from fedstill.methods.fedftg import FedFTG, FedFTGSettings
from fedstill.weights import Weights

MODES: dict[str, dict[str, Any]] = {
    "paper": {"mode": "paper"},
    "paper, noise_per = step": {"mode": "paper", "noise_per": "step"},
    "code": {"mode": "code"},
    "tuned": {"mode": "tuned"},
}
FULL_STEPS = 50
"""Local steps of a client in the paper's setting: 5 epochs of 500 samples in batches of 50."""
TRAINING = "local training"
KINDS = ("forward", "backward to the weights", "backward to the inputs")
SMALLER = {"generator_width": 4, "noise_dim": 8, "batch_size": 10}


class Passes:
    """Counts a model's forward and backward passes in batches of 50, and everything's floating-point operations."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.counts, self.operations = model, Counter[str](), 0

    def noted(self, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        """Count a forward pass, and its backward pass when that comes."""
        part = len(output) / 50
        self.counts["forward"] += part  # type: ignore[assignment]
        if output.requires_grad:
            to_weights = any(value.requires_grad for value in module.parameters())
            kind = "backward to the weights" if to_weights else "backward to the inputs"

            def came(gradient: Tensor) -> None:
                self.counts[kind] += part  # type: ignore[assignment]

            output.register_hook(came)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count within a block."""
        handle = self.model.register_forward_hook(self.noted)
        try:
            with FlopCounterMode(display=False) as operations:
                yield
            self.operations += operations.get_total_flops()
        finally:
            handle.remove()


class Round:
    """One round's parts, each to be timed alone."""

    def __init__(self, made: Federation, iterations: int | None, smoke: bool) -> None:
        self.made, self.iterations, self.smoke = made, iterations, smoke
        self.state: FederationState = made.start()
        self.uploads: list[Upload] = []
        self.train()
        self.fuse()

    def train(self) -> None:
        """Train the cohort."""
        works = [self.made.work(self.state, client) for client in self.made.sample_cohort(self.state.round)]
        self.results = self.made.train(self.state.round, works)

    def fuse(self) -> None:
        """Fuse what the cohort has sent; the next refinements start there."""
        self.uploads, _ = self.made.receive(self.state, self.results)
        self.fused = self.made.fuse(self.state, self.uploads)[0].server.weights

    def refine(self, mode: str, teachers: StackedTeachers | None = None) -> Weights:
        """Refine the fused model in a mode: stack the teachers, make the generator, run the iterations."""
        info = self.made.architectures[0].info
        context = self.made.context(self.state.round, info, self.uploads)
        if teachers is not None:  # a replay passes no hook
            context = replace(context, cuda_graphs=False)
        with intra_op_threads(self.made.config.execution.server_threads):
            ensemble = teachers or self.made.teachers(self.uploads)
            assert ensemble is not None
            return FedFTG(self.settings(mode)).refine(self.made.model, self.fused, ensemble, {}, context).weights

    def settings(self, mode: str) -> FedFTGSettings:
        """Return a mode's settings, with the iterations that are timed."""
        given = MODES[mode] | (SMALLER if self.smoke else {})
        own = FedFTGSettings(**given).iterations
        return FedFTGSettings(**given | {"iterations": min(self.iterations or own, own)})

    def scale(self, mode: str) -> float:
        """Return how many times a mode's own iterations are those that are timed."""
        return FedFTGSettings(**MODES[mode]).iterations / self.settings(mode).iterations

    def training_passes(self) -> Passes:
        """Return the passes of one client's training."""
        passes = Passes(self.made.model.module)
        work = self.made.work(self.state, self.made.sample_cohort(self.state.round)[0])
        self.made.trainer.stop.clear()  # which the round before has left set
        with passes.counting():
            self.made.trainer([self.made.model], work)
        return passes

    def refinement_passes(self, mode: str) -> Passes:
        """Return a refinement's passes; teachers are called one by one, as hooks need it."""
        ensemble = self.made.teachers(self.uploads)
        assert isinstance(ensemble, StackedTeachers)
        one_by_one = StackedTeachers(ensemble.model, ensemble.params, ensemble.buffers, ensemble.counts)
        passes = Passes(self.made.model.module)
        with passes.counting():
            self.refine(mode, one_by_one)
        return passes

    def unit(self) -> int:
        """Return the operations of a forward pass of the client's model on a batch of 50."""
        model, x = self.made.model, torch.zeros(50, *self.made.info.input_shape, device=self.made.device)
        with torch.no_grad(), FlopCounterMode(display=False) as operations:
            model(self.fused.params, self.fused.buffers, x, train=True)
        return operations.get_total_flops()

    def generator_operations(self, keys: FedFTGSettings) -> int:
        """Return the operations of a forward pass of the generator on a batch of 50."""
        info, device = self.made.info, self.made.device
        generator = initial_generator(
            0, keys.noise_dim, keys.generator_width, info.num_classes, info.input_shape, device
        )
        z, y = torch.zeros(50, keys.noise_dim, device=device), torch.zeros(50, dtype=torch.int64, device=device)
        with torch.no_grad(), FlopCounterMode(display=False) as operations:
            generator(z, y)
        return operations.get_total_flops()


def federation_of(stem: str, keys: argparse.Namespace) -> Federation:
    """Return the paper's cohort for a stem, 500 samples each; a narrow CNN and few samples for a smoke test."""
    model = ["model.name=resnet18", f"model.stem={stem}", "model.norm=gn"]
    if keys.smoke:
        model = ["model.name=cnn", "model.width=4"]
    source = Source.of("cifar10", keys.smoke, keys.clients)
    return federation(
        [
            f"method={keys.base}", "data.partition=iid", f"data.clients={keys.clients}",
            f"data.train_samples={min(source.train, 500 * keys.clients)}", "data.augment=flip-crop-half",
            "train.rounds=1000000", f"local.steps={keys.local_steps}", "local.batch_size=50", "local.lr=0.01",
            f"execution.device={keys.device}", f"execution.executor={keys.executor}",
            f"execution.workers={keys.threads}", f"execution.server_threads={keys.threads}",
            f"execution.cuda_graphs={str(keys.cuda_graphs).lower()}", *model,
        ],
        source,
    )  # fmt: skip


def run(stem: str, keys: argparse.Namespace) -> dict[str, Any]:
    """Measure a stem and return its figures."""
    parts = Round(federation_of(stem, keys), keys.iterations, keys.smoke)
    scale, unit = FULL_STEPS / keys.local_steps, parts.unit()
    turns: dict[str, Callable[[], float]] = {TRAINING: lambda: scale * seconds_of(parts.train, keys.device)}
    for mode in keys.modes:
        turns[mode] = lambda mode=mode: parts.scale(mode) * seconds_of(lambda: parts.refine(mode), keys.device)
    before = parts.refine(keys.modes[0])
    seconds = alternate(turns, keys.rounds, keys.warmup, lambda turn: parts.fuse())
    again = parts.refine(keys.modes[0])
    if not all(torch.allclose(before.params[name], again.params[name], atol=1e-3) for name in again.params):
        sys.exit(f"{stem}: a round that starts from the same state did not end with the same model")
    passes = {TRAINING: counted(parts.training_passes(), unit, scale * keys.clients)}
    for mode in keys.modes:
        forward = parts.generator_operations(parts.settings(mode)) / unit
        found = counted(parts.refinement_passes(mode), unit, parts.scale(mode))
        passes[mode] = found | {"generator forward": forward}
    parts.made.executor.close()
    return {"stem": stem, "steps": keys.local_steps, "unit": unit, "seconds": seconds, "passes": passes}


def counted(passes: Passes, unit: int, times: float = 1) -> dict[str, float]:
    """Return passes by kind and all work in units, so many times over."""
    found = {kind: times * passes.counts[kind] for kind in KINDS}
    return found | {"units": times * passes.operations / unit}


def rows(found: dict[str, Any]) -> list[list[object]]:
    """Return a stem's rows."""
    training = found["passes"][TRAINING]
    lines: list[list[object]] = []
    for name, seconds in found["seconds"].items():
        passes = found["passes"][name]
        over = spread(ratio(seconds, found["seconds"][TRAINING]))
        counts = [*(passes[kind] for kind in KINDS), passes["units"], passes["units"] / training["units"]]
        lines.append([f"{found['stem']}: {name}", median(seconds), over, *counts, passes.get("generator forward", "")])
    return lines


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__, rounds=3)
    device_option(parser)
    parser.set_defaults(warmup=1)
    parser.add_argument("--stems", nargs="+", choices=("imagenet", "cifar"), default=["imagenet", "cifar"])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--base", default="fedavg", help="base method")
    parser.add_argument("--clients", type=int, default=10, help="clients of the round, all active")
    parser.add_argument("--local-steps", type=int, default=FULL_STEPS, help="fewer are scaled to 50")
    parser.add_argument("--iterations", type=int, help="fewer of a refinement are scaled to its mode's own number")
    parser.add_argument("--cuda-graphs", action="store_true", help="record and replay the server's step")
    parser.add_argument("--executor", choices=("serial", "threads", "vectorized"), default="threads")
    keys = parser.parse_args()
    if keys.iterations is not None and (keys.iterations < 1 or keys.cuda_graphs):
        parser.error("--iterations is at least 1, and not with --cuda-graphs, whose recording is done once")
    if keys.smoke:
        keys.rounds, keys.warmup, keys.clients, keys.local_steps, keys.stems = 1, 0, 2, 2, keys.stems[:1]
        keys.threads, keys.iterations = 1, 2
    keep_freed_memory()  # as `fedstill run` does
    before = machine(keys.device, keys.threads)
    found = [run(stem, keys) for stem in keys.stems]
    result = {"benchmark": "distillation", "machine": before, "stems": found}
    columns = ["work", "seconds", "over the training (range)", *KINDS, "units", "units over the training's"]
    timed = f"at most {keys.iterations}" if keys.iterations else "all"
    title = (
        f"{keys.clients} clients, {FULL_STEPS} steps each (timed: {keys.local_steps}); a refinement's own iterations "
        f"(timed: {timed}); {keys.device}, {keys.executor}; medians; passes in batches of 50"
    )
    report(
        result,
        title,
        ([*columns, "generator's forward, units"], [row for one in found for row in rows(one)]),
        keys.json,
    )


if __name__ == "__main__":
    main()
