"""Beside the limit: a round of fedstill over the plain PyTorch loop that takes the same SGD steps on the same batches.

    FEDSTILL_DATA=... python benchmarks/limit.py [--models mlp mcmahan-cnn] [--steps N] [--device cuda]

Every contestant does one round in turn; `auto` is what a user gets who chooses nothing. Before, each does a short round
in double precision, after which its model must be the plain loop's up to rounding; and after the first of the other
rounds the models are compared once more. One that is elsewhere ends the benchmark. Memory is the peak of a process that
runs one contestant alone, with the processes that it has started.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    PLAIN_SGD,
    Source,
    alternate,
    arguments,
    device_option,
    distance,
    federation,
    in_float64,
    machine,
    median,
    peak_memory,
    ratio,
    report,
    seconds_of,
    spread,
)
from torch import Tensor

from fedstill.execution import intra_op_threads
from fedstill.execution.allocator import keep_freed_memory
from fedstill.execution.choices import executor_of
from fedstill.execution.vectorized import why_not
from fedstill.federation import Federation
from fedstill.rng import torch_stream
from fedstill.training import batches
from fedstill.weights import Weights

FASHION, CIFAR = "fashion_mnist", "cifar10"
MODELS: dict[str, tuple[str, list[str]]] = {
    "mlp": (FASHION, ["model.name=mlp"]),
    "mcmahan-cnn": (FASHION, ["model.name=mcmahan-cnn"]),
    "feddyn-cnn": (CIFAR, ["model.name=feddyn-cnn"]),
    "resnet18-imagenet": (CIFAR, ["model.name=resnet18", "model.norm=gn", "model.stem=imagenet"]),
    "resnet18-cifar": (CIFAR, ["model.name=resnet18", "model.norm=gn", "model.stem=cifar"]),
}
REFERENCE = "plain loop"
FARTHEST_IN_FLOAT64, STEPS_IN_FLOAT64 = 1e-9, 3
"""How far from the plain loop a model may be after a round of so many steps, in units of the way it has come."""
FARTHEST = {"cpu": 1e-2, "cuda": 0.1}
"""The same in float32 after the first round; on a GPU convolutions round to TF32."""


class PlainLoop:
    """FedAvg by hand: one module, torch.optim.SGD, index batches of data in memory, a running mean of the models."""

    def __init__(self, federation: Federation, threads: int, channels_last: bool = False, bf16: bool = False) -> None:
        self.federation, self.threads, self.number = federation, threads, 0
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.bf16 = bf16
        self.module = federation.model.clone().module.to(memory_format=self.layout)
        self.current = {name: value.clone() for name, value in federation.initial.params.items()}
        if federation.initial.buffers:
            sys.exit("the plain loop averages parameters only; take a model without BatchNorm")

    def round(self) -> None:
        """Run a round."""
        cohort = self.federation.sample_cohort(self.number)
        total = {name: torch.zeros_like(value) for name, value in self.current.items()}
        seen = sum(self.federation.info.samples[client] for client in cohort)
        with intra_op_threads(self.threads):
            for client in cohort:
                self.train(client)
                part = self.federation.info.samples[client] / seen
                for name, value in self.module.named_parameters():
                    total[name].add_(value.detach(), alpha=part)
        self.current = total
        self.number += 1

    def train(self, client: int) -> None:
        """Train the module on one client's data, from the current model."""
        with torch.no_grad():
            for name, value in self.module.named_parameters():
                value.copy_(self.current[name])
        optimizer = torch.optim.SGD(self.module.parameters(), lr=self.federation.config.local.lr)
        samples, share = self.federation.trainer.samples, self.federation.trainer.shares[client]
        self.module.train()
        for batch in self.order(client, len(share)):
            at = share[batch].to(samples.y.device)
            x = samples.x[at].contiguous(memory_format=self.layout)
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16) if self.bf16 else nullcontext():
                loss = F.cross_entropy(self.module(x), samples.y[at])
            loss.backward()
            optimizer.step()

    def order(self, client: int, samples: int) -> Iterator[Tensor]:
        """Yield the batches that fedstill's client takes."""
        local, seed = self.federation.config.local, self.federation.config.seed.train
        steps = local.steps or local.epochs * -(-samples // local.batch_size)
        return batches(samples, local.batch_size, steps, torch_stream(seed, "batches", self.number, client))

    def close(self) -> None:
        """Do nothing."""

    @property
    def weights(self) -> Weights:
        """The global model."""
        return Weights(self.current, {})


class Engine:
    """A federation of fedstill with one executor."""

    def __init__(self, federation: Federation, **execution: object) -> None:
        chosen = federation.config.execution.model_copy(update=execution)
        config = federation.config.model_copy(update={"execution": chosen})
        models = [one.model for one in federation.architectures]
        executor = executor_of(config, models, len(federation.info.samples))
        trainer = replace(federation.trainer, channels_last=config.execution.memory_format == "channels_last")
        self.federation = replace(federation, config=config, executor=executor, trainer=trainer)
        self.state = self.federation.start()

    def round(self) -> None:
        """Run a round: sample, broadcast, train, check, fuse; there is no evaluation."""
        self.state, _ = self.federation.run_round(self.state)

    def close(self) -> None:
        """End the executor's threads or processes."""
        self.federation.executor.close()

    @property
    def weights(self) -> Weights:
        """The global model."""
        return self.state.server.weights


@dataclass(frozen=True)
class Setting:
    """One model's comparison."""

    model: str
    options: argparse.Namespace

    @property
    def source(self) -> Source:
        """The data."""
        return Source.of(MODELS[self.model][0], self.options.smoke, self.options.clients)

    def federation(self, steps: int | None = None) -> Federation:
        """Return the federation that all contestants share; they take turns, and nothing in it moves."""
        keys = self.options
        local = [f"local.batch_size={keys.batch_size}", "local.epochs=1", f"local.lr={keys.lr}"]
        if steps or keys.steps:
            local.append(f"local.steps={steps or keys.steps}")
        return federation(
            [
                "method=fedavg", "data.partition=iid", f"data.clients={keys.clients}",
                f"train.participation={keys.active / keys.clients}", "train.rounds=1000000",
                f"execution.device={keys.device}", "execution.executor=auto", *PLAIN_SGD, *local,
                *MODELS[self.model][1],
            ],
            self.source,
        )  # fmt: skip

    def contestants(self) -> dict[str, Callable[[Federation], PlainLoop | Engine]]:
        """Return how each contestant is made from the federation."""
        keys, count = self.options, self.options.threads

        def engine(**execution: object) -> Callable[[Federation], Engine]:
            return lambda base: Engine(base, **execution)

        found: dict[str, Callable[[Federation], PlainLoop | Engine]] = {
            REFERENCE: lambda base: PlainLoop(base, count),
            "auto": engine(),
            "serial": engine(executor="serial", intra_op_threads=count),
            "vectorized, the cohort at once": engine(executor="vectorized", workers=1, intra_op_threads=count),
        }
        if keys.device == "cpu":
            found[f"threads, {count}"] = engine(executor="threads", workers=count)
            found[f"processes, {count}"] = engine(executor="processes", workers=count)
            found[f"vectorized, a part on each of {count} threads"] = engine(executor="vectorized", workers=count)
        if keys.variants:
            half = max(1, keys.active // 2)
            found[f"vectorized, {half} at once"] = engine(
                executor="vectorized", workers=1, intra_op_threads=count, clients_at_once=half
            )
            found["vectorized, compiled"] = engine(
                executor="vectorized", workers=1, intra_op_threads=count, compile=True
            )
            for layout in ("contiguous", "channels_last"):
                found[f"auto, {layout}"] = engine(memory_format=layout)
            found["plain loop, channels last"] = lambda base: PlainLoop(base, count, channels_last=True)
            found["plain loop, channels last, bf16"] = lambda base: PlainLoop(base, count, True, bf16=True)
        return found

    def run(self) -> dict[str, Any]:
        """Measure this model and return its figures."""
        base, keys = self.federation(), self.options
        why = why_not(base.method.objective, base.model, base.info.input_shape)
        if why:
            sys.exit(f"{self.model}: {why}")
        exact = self.in_float64()
        playing = {name: make(base) for name, make in self.contestants().items()}
        apart: dict[str, float] = {}

        def check(turn: int) -> None:
            if not turn:  # later, rounding takes models farther and farther apart
                apart.update(self.apart(playing, base.initial, FARTHEST[keys.device], "in float32"))

        turns = {name: (lambda one=one: seconds_of(one.round, keys.device)) for name, one in playing.items()}
        seconds = alternate(turns, keys.rounds, keys.warmup, check)
        for one in playing.values():
            one.close()
        steps = sum(1 for _ in PlainLoop(base, 1).order(0, base.info.samples[0]))
        size = sum(value.numel() for value in base.initial.params.values())
        return {
            "model": self.model, "parameters": size, "data": self.source.describe(), "active": keys.active,
            "auto": base.config.execution.model_dump(mode="json"), "steps": steps, "batch_size": keys.batch_size,
            "seconds": seconds, "distance": apart, "distance_in_float64": exact,
            "memory": {name: self.memory(name) for name in list(playing)[: 1 if keys.smoke else None] if keys.memory},
        }  # fmt: skip

    def in_float64(self) -> dict[str, float]:
        """Let every contestant do a short round in double precision and return how far it is from the plain loop."""
        base = in_float64(self.federation(STEPS_IN_FLOAT64))
        playing = {name: make(base) for name, make in self.contestants().items() if "bf16" not in name}
        for one in playing.values():
            one.round()
            one.close()
        return self.apart(playing, base.initial, FARTHEST_IN_FLOAT64, "in float64")

    def apart(
        self, playing: Mapping[str, PlainLoop | Engine], start: Weights, farthest: float, how: str
    ) -> dict[str, float]:
        """Return how far everyone is from the plain loop after a round; who is elsewhere ends the benchmark."""
        reference = playing[REFERENCE].weights
        found = {name: distance(one.weights, reference, start) for name, one in playing.items()}
        for name, far in found.items():
            if not far <= farthest and "bf16" not in name:
                sys.exit(f"{self.model}, the first round {how}: {name} is {far:.2g} from the plain loop")
        return found

    def memory(self, name: str) -> dict[str, Any]:
        """Return the peak memory of a process that runs one contestant alone."""
        own = ["--models", self.model, "--memory-of", name]
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], *own], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the process that measures the memory of {name} failed:\n{done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def memory_of(self, name: str) -> None:
        """Print the peak memory of this process before and after two rounds of one contestant."""
        base = self.federation()
        before = peak_memory(self.options.device)
        one = self.contestants()[name](base)
        for _ in range(2):
            one.round()
        print(json.dumps({"before": before, "after": peak_memory(self.options.device)}))


def table(found: dict[str, Any], device: str) -> list[list[object]]:
    """Return a model's rows."""
    rows: list[list[object]] = []
    where = "device" if device == "cuda" else "host"
    for name, seconds in found["seconds"].items():
        memory = found["memory"].get(name)
        more = [memory["before"][where], memory["after"][where]] if memory else [None, None]
        over = spread(ratio(seconds, found["seconds"][REFERENCE]))
        apart = [found["distance"][name], found["distance_in_float64"].get(name)]
        rows.append([f"{found['model']}: {name}", median(seconds), over, *more, *apart])
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    device_option(parser)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["mlp", "mcmahan-cnn"])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--active", type=int, default=10, help="clients in a round")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--steps", type=int, help="local steps, instead of an epoch")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--variants", action="store_true", help="also the plain loop with channels last and bf16")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave the memory out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    keys = parser.parse_args()
    if keys.smoke:
        keys.rounds, keys.warmup, keys.clients, keys.active, keys.steps, keys.models = 1, 1, 6, 3, 2, keys.models[:1]
    keep_freed_memory()  # as `fedstill run` does; the plain loop gains as much
    if keys.memory_of:
        Setting(keys.models[-1], keys).memory_of(keys.memory_of)
        return
    before, began = machine(keys.device, keys.threads), time.perf_counter()
    found = [Setting(model, keys).run() for model in keys.models]
    result = {"benchmark": "limit", "machine": before, "took": time.perf_counter() - began, "models": found}
    where = "device" if keys.device == "cuda" else "host"
    columns = [
        "contestant", "s per round", "over the plain loop (range)", f"{where} MiB before", f"{where} MiB peak",
        "distance of the models", "in float64",
    ]  # fmt: skip
    title = f"{keys.active} clients a round, batch {keys.batch_size}, {keys.device}, {keys.threads} threads; medians"
    report(result, title, (columns, [row for one in found for row in table(one, keys.device)]), keys.json)


if __name__ == "__main__":
    main()
