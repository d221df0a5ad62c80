"""What the benchmarks share: data, federations on them, alternating rounds, processes, memory, the report.

A round's seconds never hold an evaluation: `NO_EVALUATION` switches it off, and what is checked afterwards is not
timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from fedstill.build import build
from fedstill.config import load_config
from fedstill.data.dataset import RawDataSet, Samples
from fedstill.federation import Federation
from fedstill.markdown import grid
from fedstill.runs.environment import environment
from fedstill.weights import Weights

HERE = Path(__file__).resolve().parent
NO_EVALUATION = ["eval.on=[]"]
PLAIN_SGD = ["local.weight_decay=0", "local.clip_norm=none", "local.lr_decay=1"]
"""No clip and no weight decay, so that the local steps are those of torch.optim.SGD(lr)."""


@dataclass(frozen=True)
class Source:
    """Where samples come from: a data set of FEDSTILL_DATA, or random pictures around a centre for each class."""

    name: str
    shape: tuple[int, int, int]
    classes: int = 10
    train: int = 60000
    test: int = 10000
    synthetic: bool = False

    @staticmethod
    def of(name: str, smoke: bool = False, clients: int = 100) -> Source:
        """Return Fashion-MNIST or CIFAR-10, synthetic where FEDSTILL_DATA is not set, few samples for a smoke test."""
        shape = (1, 28, 28) if name == "fashion_mnist" else (3, 32, 32)
        if smoke:
            return Source(name, shape, train=20 * clients, test=200, synthetic=True)
        train = 60000 if name == "fashion_mnist" else 50000
        return Source(name, shape, train=train, synthetic="FEDSTILL_DATA" not in os.environ)

    def describe(self) -> str:
        """Return the source in a few words."""
        return f"{'synthetic, the shape of ' if self.synthetic else ''}{self.name}, {self.train} samples"

    def raw(self) -> RawDataSet:
        """Return synthetic images."""
        stream = np.random.default_rng(0)
        channels, height, width = self.shape
        stored = (height, width) if channels == 1 else (height, width, channels)
        # Centres so close that no model is ever right on all: an accuracy that cannot differ would check nothing.
        centres = stream.integers(120, 137, (self.classes, *stored), dtype=np.int16)

        def part(size: int) -> tuple[np.ndarray, np.ndarray]:
            labels = stream.permutation(np.arange(size) % self.classes)
            x = stream.integers(-120, 121, (size, *stored), dtype=np.int16)
            x += centres[labels]
            return np.clip(x, 0, 255, out=x).astype(np.uint8), labels

        (x_train, y_train), (x_test, y_test) = part(self.train), part(self.test)
        names = tuple(str(label) for label in range(self.classes))
        return RawDataSet(self.name, x_train, y_train, x_test, y_test, names, (0.5,) * channels, (0.25,) * channels)


def federation(keys: Sequence[str], source: Source) -> Federation:
    """Return a federation on a source, without evaluation; what cannot run as asked is an error, not a note."""
    config = load_config(None, [f"data.name={source.name}", *NO_EVALUATION, *keys], {})
    if source.synthetic:
        with mock.patch("fedstill.build.load_raw", return_value=source.raw()):
            made, notes = build(config)
    else:
        made, notes = build(config)
    wanted, got = config.execution.executor, made.config.execution.executor
    if wanted not in ("auto", got):
        sys.exit(f"the executor {wanted} was asked for, and it runs {got}: {notes}")
    return made


def in_float64(federation: Federation) -> Federation:
    """Return the federation with models, initial weights and training samples in double precision."""
    for one in federation.architectures:
        one.model.module.double()
    architectures = tuple(
        replace(one, initial=one.initial.map(lambda value: value.double() if value.is_floating_point() else value))
        for one in federation.architectures
    )
    trainer, samples = federation.trainer, federation.trainer.samples
    initial = [one.initial for one in architectures]
    trainer = replace(trainer, samples=Samples(samples.x.double(), samples.y), initial=initial)
    return replace(federation, architectures=architectures, trainer=trainer)


def arguments(doc: str | None, rounds: int = 7) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds that are timed")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores that a contestant may use")
    parser.add_argument("--json", type=Path, help="write the result into this file too")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes, to see that it works")
    return parser


def device_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the device."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object], device: str = "cpu") -> float:
    """Return how long a piece of work takes."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def alternate(
    contestants: Mapping[str, Callable[[], float]],
    rounds: int,
    warmup: int,
    after: Callable[[int], None] = lambda turn: None,
) -> dict[str, list[float]]:
    """Let everyone do a round in turn, beginning with another one each time; return seconds without the warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            spent = contestants[name]()
            if turn >= warmup:
                seconds[name].append(spent)
        after(turn)
    return seconds


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def ratio(mine: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Return the median of the ratios round by round, and the smallest and the largest of them."""
    each = [one / other for one, other in zip(mine, reference, strict=True)]
    return {"median": median(each), "min": min(each), "max": max(each)}


def distance(one: Weights, other: Weights, start: Weights) -> float:
    """Return how far two models are from each other, in units of how far the second has come from its start."""

    def norm(left: Weights, right: Weights) -> float:
        return float(sum((left.params[n].double() - right.params[n].double()).square().sum() for n in right.params))

    return (norm(one, other) / max(norm(other, start), 1e-300)) ** 0.5


def peak_memory(device: str = "cpu") -> dict[str, float]:
    """Return the most memory that this process and those it has started have had so far, in MiB.

    VmHWM belongs to this program alone; getrusage, the fallback, also counts what the process was before it was
    replaced by this program, so that a child of a large parent begins with the parent's. Of the other processes what
    they share is left out: it is in this one's figure.
    """
    own = memory_of("self")
    if own:
        others = [memory_of(str(child.pid)) for child in multiprocessing.active_children()]
        host = own["VmHWM"] + sum(one["VmHWM"] - one["RssShmem"] - one["RssFile"] for one in others)
    else:
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"host": host} | ({"device": torch.cuda.max_memory_allocated() / 2**20} if device == "cuda" else {})


def memory_of(process: str) -> dict[str, float]:
    """Return what Linux tells of a process's memory, in MiB; elsewhere nothing."""
    status = Path("/proc") / process / "status"
    if not status.exists():
        return {}
    lines = [line.split() for line in status.read_text().splitlines()]
    return {name.rstrip(":"): int(size) / 1024 for name, size, *unit in (line for line in lines if line[-1:] == ["kB"])}


class Worker:
    """A contestant in a process of its own: a line asks, a line of JSON answers (see :class:`contestant.Gate`).

    Parameters
    ----------
    command : sequence of str
    log : Path
        Where its own messages go.
    timeout : float
        Seconds after which it is ended, with all the processes that it has started.
    env : mapping, optional
        What it finds in its environment beside the usual.
    halts : bool
        Whether it is stopped between its rounds, so that nothing of it runs beside the others.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        timeout: float = 900,
        env: Mapping[str, str] | None = None,
        halts: bool = False,
    ) -> None:
        self.log, self.timeout, self.command, self.halts = log, timeout, list(command), halts
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._log = log.open("w")
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            start_new_session=True, env={**os.environ, **(env or {}), "PYTHONPATH": path},
        )  # fmt: skip

    def read(self) -> dict[str, Any]:
        """Return its next answer.

        Raises
        ------
        RuntimeError
            If it ends instead, or takes too long; with the last lines of its log.
        """
        assert self.process.stdout is not None
        ended = threading.Timer(self.timeout, self.close)
        ended.start()
        line = self.process.stdout.readline()
        ended.cancel()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").strip().splitlines()[-8:])
            raise RuntimeError(f"{' '.join(self.command[:3])} gave no answer; the end of {self.log}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def round(self) -> float:
        """Ask for a round and return its seconds."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        self.process.stdin.write("round\n")
        self.process.stdin.flush()
        seconds = float(self.read()["seconds"])
        self._signal(signal.SIGSTOP)
        return seconds

    def last_word(self) -> dict[str, Any]:
        """Return what it says after its last round."""
        self._signal(signal.SIGCONT)
        return self.read()

    def _signal(self, number: signal.Signals) -> None:
        """Stop or continue it and its processes, where it is one that halts."""
        if self.halts:
            os.killpg(self.process.pid, number)

    def close(self, grace: float = 0) -> None:
        """End it, and what it has started; it may end by itself first where it is given time."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="fedstill-benchmark-") as folder:
        yield Path(folder)


def machine(device: str, threads: int) -> dict[str, object]:
    """Return where this is measured, and how busy it is with other things."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        **environment(device),
        "cpu": cpu,
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }


Table = tuple[Sequence[str], Sequence[Sequence[object]]]


def report(result: dict[str, Any], title: str, table: Table, file: Path | None) -> None:
    """Print the result as a line of JSON, then as a Markdown table; and write the JSON into a file."""
    line = json.dumps(result, default=lambda value: asdict(value))
    if file:
        file.write_text(line + "\n")
    print(line)
    print(f"\n{title}\n\n{markdown(*table)}")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table; numbers to three places that count."""
    return grid(columns, [[cell(value) for value in row] for row in rows])


def cell(value: object) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return "not run"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def spread(of: Mapping[str, float]) -> str:
    """Return a ratio with its range."""
    return f"{of['median']:.2f} ({of['min']:.2f} to {of['max']:.2f})"
