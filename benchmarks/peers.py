"""Beside the peers: the same rounds by plain PyTorch, fedstill, Flower, pfl, fluke and FedLab.

    FEDSTILL_DATA=... python benchmarks/peers.py --venvs DIR [--models mlp cnn] [--methods fedavg scaffold]

Each peer is installed from PyPI into a virtual environment under DIR, with the PyTorch that runs here; what is there
already is used. Every contestant is a process that does one round when it is asked to, so that rounds alternate; all
have the same samples, shares and initial weights, two cores, and no evaluation. Cohorts and batches differ, and so the
check is the accuracy on the test samples and the way that the model has come after the last round.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from contestant import STAND_INS
from measure import (
    HERE,
    PLAIN_SGD,
    Source,
    Worker,
    alternate,
    arguments,
    federation,
    machine,
    median,
    ratio,
    report,
    scratch,
    spread,
)

FARTHER = {"fedavg": 1.1, "scaffold": 1.25}
"""Largest ratio of the ways that the models have come; SCAFFOLD's depends on who was in the cohorts."""
REFERENCE, OURS = "plain loop", "fedstill"
MODELS = {"mlp": "mlp", "cnn": "mcmahan-cnn"}


@dataclass(frozen=True)
class Peer:
    """A library: what to install, and what need not be there.

    ``bare`` is installed without its dependencies, ``stand_ins`` are imported by it and replaced by empty modules:
    torchvision has no build for this PyTorch here, and loggers are not wanted. ``halts``: it may be stopped between its
    rounds, which Ray takes for the death of a node.
    """

    requires: list[str]
    bare: str | None = None
    stand_ins: str = ""
    methods: tuple[str, ...] = ("fedavg", "scaffold")
    env: dict[str, str] = field(default_factory=dict)
    halts: bool = True


COMMON = ["numpy", "pandas", "scikit-learn", "pillow"]
PEERS = {
    "flwr": Peer(
        ["flwr[simulation]==1.41.0"],
        methods=("fedavg",),
        env={"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"},
        halts=False,
    ),
    "pfl": Peer(["pfl==0.6.0"]),
    "fluke": Peer(
        [
            *COMMON, "torchmetrics", "rich", "typer", "psutil", "matplotlib", "seaborn", "diskcache", "cerberus",
            "omegaconf", "requests", "pyyaml",
        ],
        bare="fluke-fl==0.8.1",
        stand_ins="torchvision,wandb,clearml,datasets,opacus",
    ),
    "fedlab": Peer([*COMMON, "tqdm", "munch", "setuptools<81", "wheel"], "fedlab==1.3.0", "torchvision,pynvml"),
}  # fmt: skip


def python_of(name: str, peer: Peer, venvs: Path) -> Path:
    """Return the Python of a peer's virtual environment, which is made where it is not there."""
    folder = (venvs / name).resolve()
    python, ready = folder / "bin" / "python", folder / "ready-for-fedstill-benchmark"
    wanted = "\n".join([f"torch=={torch.__version__.partition('+')[0]}", *peer.requires, peer.bare or ""])
    if ready.exists() and ready.read_text() == wanted:
        return python
    print(f"installing {name} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *wanted.splitlines()[: 1 + len(peer.requires)]], check=True, stdout=sys.stderr)
    if peer.bare:
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", peer.bare], check=True, stdout=sys.stderr)
    ready.write_text(wanted)
    return python


@dataclass
class Comparison:
    """One model and one method."""

    model: str
    method: str
    keys: Any
    pythons: dict[str, Path]
    folder: Path

    def job(self) -> Path:
        """Write the work: the federation's own samples, shares and initial weights, and the settings."""
        keys = self.keys
        source = Source.of("fashion_mnist", keys.smoke, keys.clients)
        settings = [
            f"method={self.method}", f"model.name={MODELS[self.model]}", "data.partition=iid",
            f"data.clients={keys.clients}", f"train.participation={keys.active / keys.clients}",
            "train.rounds=1000000", "local.epochs=1", f"local.batch_size={keys.batch_size}", f"local.lr={keys.lr}",
            *PLAIN_SGD,
        ]  # fmt: skip
        made = federation([*settings, 'eval.on=["test"]', "execution.executor=serial"], source)
        test = made.evaluation.sets["test"]
        job = {
            "x": made.trainer.samples.x, "y": made.trainer.samples.y, "shares": made.trainer.shares,
            "x_test": test.x, "y_test": test.y, "classes": source.classes,
            "initial": list(made.initial.params.values()), "model": self.model, "method": self.method,
            "lr": keys.lr, "batch_size": keys.batch_size, "epochs": 1, "active": keys.active, "seed": 0,
            "rounds": keys.rounds + keys.warmup, "threads": keys.threads, "keys": settings, "source": asdict(source),
        }  # fmt: skip
        torch.save(job, self.folder / "job.pt")
        return self.folder / "job.pt"

    def start(self, job: Path) -> tuple[dict[str, Worker], dict[str, str]]:
        """Start everyone, one after another; return who is ready, and why the others are not."""
        count = self.keys.threads
        own = [sys.executable, str(HERE / "peers" / "run_fedstill.py"), str(job)]
        threads = f"execution.workers={count}"
        commands = {
            OURS: ([*own, threads], None),
            "fedstill, vectorized": ([*own, "execution.executor=vectorized", threads], None),
        }
        if self.method == "fedavg":
            commands[REFERENCE] = ([sys.executable, str(HERE / "peers" / "run_plain.py"), str(job)], None)
        for name, python in self.pythons.items():
            peer = PEERS[name]
            if self.method in peer.methods:
                script = [str(python), str(HERE / "peers" / f"run_{name}.py"), str(job)]
                commands[name] = (script, {STAND_INS: peer.stand_ins, **peer.env})
        ready, failed = {}, {}
        for name, (command, env) in commands.items():
            halts = name not in PEERS or PEERS[name].halts
            log = self.folder / f"{name.replace(', ', '-').replace(' ', '-')}.log"
            worker = Worker(command, log, env=env, halts=halts)
            try:
                versions = worker.read()["ready"]
                print(f"{self.model}, {self.method}: {name} is ready, {versions}", file=sys.stderr)
                ready[name] = worker
            except (RuntimeError, ValueError, KeyError) as error:
                failed[name] = str(error)
                worker.close()
        return ready, failed

    def run(self) -> dict[str, Any]:
        """Measure and return the figures; whoever fails is left out and named."""
        ready, failed = self.start(self.job())
        try:
            for name, worker in list(ready.items()):  # a first round apart, since a peer that breaks there is dropped
                try:
                    worker.round()
                except (RuntimeError, ValueError, KeyError) as error:
                    failed[name] = str(error)
                    ready.pop(name).close()
            turns = {name: worker.round for name, worker in ready.items()}
            seconds = alternate(turns, self.keys.rounds, self.keys.warmup - 1)
            outcomes = {name: worker.last_word() for name, worker in ready.items()}
            for worker in ready.values():
                worker.close(grace=30)
        finally:
            for worker in ready.values():
                worker.close()
        return {
            "model": self.model, "method": self.method, "seconds": seconds, "outcome": outcomes, "failed": failed,
            "same": same(outcomes, self.keys.tolerance, FARTHER[self.method]),
        }  # fmt: skip


def same(outcomes: dict[str, dict[str, float]], tolerance: float, farther: float) -> bool:
    """Say whether all models are equally good within a span, and have come equally far within a ratio."""
    accuracies, ways = ([one[what] for one in outcomes.values()] for what in ("accuracy", "way"))
    return max(accuracies) - min(accuracies) <= tolerance and max(ways) <= farther * min(ways)


def rows(found: dict[str, Any]) -> list[list[object]]:
    """Return a comparison's rows."""
    seconds, what = found["seconds"], f"{found['model']}, {found['method']}"
    plain = seconds.get(REFERENCE)
    lines: list[list[object]] = []
    for name, own in seconds.items():
        over = [spread(ratio(own, plain)) if plain else "", spread(ratio(own, seconds[OURS]))]
        lines.append([f"{what}: {name}", median(own), *over, *found["outcome"][name].values()])
    return lines + [[f"{what}: {name}", *[None] * 5] for name in found["failed"]]


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    parser.add_argument("--venvs", type=Path, required=True, help="folder of the peers' virtual environments")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=("fedavg", "scaffold"), default=["fedavg", "scaffold"])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--active", type=int, default=10, help="clients in a round")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--tolerance", type=float, default=0.03, help="largest span of the accuracies at the end")
    parser.add_argument("--logs", type=Path, help="keep the contestants' own messages here")
    keys = parser.parse_args()
    if keys.smoke:
        keys.rounds, keys.warmup, keys.clients, keys.active, keys.batch_size, keys.tolerance = 1, 1, 4, 4, 10, 0.2
        keys.models, keys.methods = keys.models[:1], keys.methods[:1]
    pythons = {name: python_of(name, PEERS[name], keys.venvs) for name in keys.peers}
    before, found = machine("cpu", keys.threads), []
    with scratch() as folder:
        for model in keys.models:
            for method in keys.methods:
                place = (keys.logs or folder) / f"{model}-{method}"
                place.mkdir(parents=True, exist_ok=True)
                found.append(Comparison(model, method, keys, pythons, place).run())
                for name, why in found[-1]["failed"].items():
                    print(f"{model}, {method}: {name} did not run: {why}", file=sys.stderr)
                (place / "job.pt").unlink()
    versions = {name: [*peer.requires[:1], peer.bare or ""] for name, peer in PEERS.items() if name in pythons}
    result = {"benchmark": "peers", "machine": before, "peers": versions, "comparisons": found}
    columns = [
        "contestant",
        "s per round",
        "over the plain loop (range)",
        f"over {OURS} (range)",
        "test accuracy",
        "way of the model",
    ]
    title = f"{keys.active} of {keys.clients} clients a round, batch {keys.batch_size}, {keys.threads} cores; medians"
    report(result, title, (columns, [row for one in found for row in rows(one)]), keys.json)
    wrong = [f"{one['model']}, {one['method']}" for one in found if not one["same"]]
    if wrong:
        sys.exit(f"not the same work: accuracies or ways differ in {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
