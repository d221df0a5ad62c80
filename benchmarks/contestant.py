"""What a contestant in a process of its own needs.

Nothing of fedstill is imported here, since peers run this in virtual environments of their own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Job = dict[str, Any]


class Gate:
    """A contestant's talk with the benchmark: a line asks for a round, a line of JSON answers with its seconds.

    Whatever else is printed goes to standard error, so that a library's own messages do no harm.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def ready(self, *packages: str) -> None:
        """Say that everything is loaded, and which versions."""
        self.say(ready={name: importlib.metadata.version(name) for name in ("torch", *packages)})

    def begin(self) -> None:
        """Wait until a round is asked for, and start the clock."""
        if not sys.stdin.readline():
            sys.exit("the benchmark has gone")
        self._began = time.perf_counter()

    def end(self, **more: object) -> None:
        """Stop the clock and answer."""
        self.say(seconds=time.perf_counter() - self._began, **more)

    def say(self, **answer: object) -> None:
        """Send a line."""
        self._answers.write(json.dumps(answer) + "\n")


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stand-ins for modules that a library imports and does not need here; all their names are empty classes."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Answer for the named packages and everything in them."""
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return a module that has every public name."""
        made = ModuleType(spec.name)

        def anything(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        made.__getattr__ = anything  # type: ignore[method-assign]
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""


STAND_INS = "FEDSTILL_BENCHMARK_STAND_INS"
"""Environment variable: packages, joined by commas, for which importing this module puts stand-ins in place."""
if os.environ.get(STAND_INS):
    sys.meta_path.append(Absent(*os.environ[STAND_INS].split(",")))


@cache
def job_at(path: str) -> Job:
    """Return the work that a benchmark has written: tensors, shares, settings; once per process."""
    job: Job = torch.load(path, weights_only=True)
    return job


def job_of_command_line() -> Job:
    """Return the work named by the first argument."""
    path = str(Path(sys.argv[1]).resolve())
    job = job_at(path)
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    return {**job, "path": path}


def network(job: Job) -> nn.Sequential:
    """Return the model of a job in plain PyTorch, at its initial weights."""
    channels, height, width = job["x"].shape[1:]
    if job["model"] == "mlp":
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(channels * height * width, 200), nn.ReLU()]
        layers.append(nn.Linear(200, job["classes"]))
    else:
        layers = [nn.Conv2d(channels, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        layers += [nn.Linear(64 * (height // 4) * (width // 4), 512), nn.ReLU(), nn.Linear(512, job["classes"])]
    made = nn.Sequential(*layers)
    load(made, job["initial"])
    return made


def load(model: nn.Module, values: Sequence[Tensor]) -> None:
    """Copy tensors into a model's parameters, in their order."""
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)


def own_data(job: Job, client: int) -> tuple[Tensor, Tensor]:
    """Return a client's samples and labels."""
    return job["x"][job["shares"][client]], job["y"][job["shares"][client]]


def train(model: nn.Module, x: Tensor, y: Tensor, job: Job) -> None:
    """Train a model on a client's samples: the plain loop, a shuffle and index batches per epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=job["lr"])
    model.train()
    for _ in range(job["epochs"]):
        for batch in torch.randperm(len(y)).split(job["batch_size"]):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


@torch.no_grad()
def outcome(job: Job, values: Sequence[Tensor]) -> dict[str, float]:
    """Return how good a model is on the test samples, and how far it has come from the initial weights.

    The way hardly depends on the order of batches, and very much on the learning rate and the number of steps.
    """
    model = network(job).eval()
    way = sum(float((a - b).square().sum()) for a, b in zip(values, job["initial"], strict=True)) ** 0.5
    load(model, values)
    pairs = zip(job["x_test"].split(1000), job["y_test"].split(1000), strict=True)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    return {"accuracy": right / len(job["y_test"]), "way": way}
