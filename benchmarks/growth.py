"""How a round grows: seconds and peak memory against clients in total, active clients, size of the model, classes.

    python benchmarks/growth.py [--axes clients active model classes] [--method scaffold] [--executor serial]

Every point is a process of its own, so that its memory is its own; all points of an axis do a round in turn. Images are
synthetic and small (8x8) and clients hold few samples, so that what grows is the federation and not the data.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from contestant import Gate
from measure import (
    PLAIN_SGD,
    Source,
    Worker,
    alternate,
    arguments,
    device_option,
    federation,
    machine,
    median,
    peak_memory,
    report,
    scratch,
    seconds_of,
)

from fedstill.execution.allocator import keep_freed_memory

Point = dict[str, Any]
BASE: Point = {"clients": 100, "active": 10, "hidden": [200], "classes": 10, "samples": 20}
AXES: dict[str, list[Point]] = {
    "clients": [{"clients": count} for count in (100, 1000, 10000)],
    "active": [{"clients": 1000, "active": count} for count in (10, 30, 100, 300)],
    "model": [{"hidden": hidden} for hidden in ([64], [1024], [2048, 1024], [4096, 2048])],
    "classes": [{"classes": count} for count in (10, 100, 1000)],
}
SMOKE: dict[str, list[Point]] = {"clients": [{"clients": count, "active": 2} for count in (4, 40)]}


def serve(given: str) -> None:
    """Run one point's rounds as they are asked for, in a process of its own."""
    gate, point = Gate(), json.loads(given)
    torch.set_num_threads(point["threads"])
    keep_freed_memory()  # as `fedstill run` does
    samples = point["clients"] * point["samples"]
    made = federation(
        [
            f"method={point['method']}", "model.name=mlp", f"model.hidden={json.dumps(point['hidden'])}",
            "data.partition=iid", f"data.clients={point['clients']}",
            f"train.participation={point['active'] / point['clients']}", "train.rounds=1000000",
            "local.epochs=1", "local.batch_size=10", "local.lr=0.01", *PLAIN_SGD,
            f"execution.executor={point['executor']}", f"execution.device={point['device']}",
            f"execution.workers={point['threads']}",
            "fedftg.generator_width=16",
        ],
        Source("synthetic", (1, 8, 8), point["classes"], samples, 100, synthetic=True),
    )  # fmt: skip
    state = made.start()
    before = peak_memory(point["device"])
    gate.ready("fedstill")
    kept: dict[str, Any] = {"state": state}

    def one() -> None:
        kept["state"], kept["record"] = made.run_round(kept["state"])

    for _ in range(point["rounds"]):
        gate.begin()
        spent = seconds_of(one, point["device"])
        gate.end(inside=spent, phases=kept["record"]["seconds"])
    size = sum(value.numel() for value in made.initial.params.values())
    gate.say(parameters=size, memory={"before": before, "after": peak_memory(point["device"])})
    made.executor.close()


def measure(axis: str, points: list[Point], keys: argparse.Namespace, folder: Path) -> list[Point]:
    """Return an axis's points with their figures."""
    asked = {
        "method": keys.method, "executor": keys.executor, "device": keys.device, "threads": keys.threads,
        "rounds": keys.rounds + keys.warmup,
    }  # fmt: skip
    full = [{**BASE, **point, **asked} for point in points]
    workers: list[Worker] = []
    try:
        for number, point in enumerate(full):
            command = [sys.executable, __file__, "--serve", json.dumps(point)]
            workers.append(Worker(command, folder / f"{axis}-{number}.log"))
            workers[-1].read()
        turns = {str(number): worker.round for number, worker in enumerate(workers)}
        seconds = alternate(turns, keys.rounds, keys.warmup)
        ends = [worker.read() for worker in workers]
    finally:
        for worker in workers:
            worker.close()
    return [
        {**point, **end, "axis": axis, "seconds": seconds[str(number)]}
        for number, (point, end) in enumerate(zip(full, ends, strict=True))
    ]


def row(point: Point) -> list[object]:
    """Return a point's row."""
    where = "device" if point["device"] == "cuda" else "host"
    memory = [point["memory"][when][where] for when in ("before", "after")]
    spent = median(point["seconds"])
    each = 1000 * spent / point["active"]
    return [
        point["axis"], point["clients"], point["active"], point["parameters"], point["classes"], spent, each, *memory,
    ]  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    parser = arguments(__doc__)
    device_option(parser)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--method", default="fedavg")
    parser.add_argument("--executor", choices=("serial", "threads", "vectorized"), default="threads")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    keys = parser.parse_args()
    if keys.serve:
        serve(keys.serve)
        return
    if keys.smoke:
        keys.rounds, keys.warmup = 1, 1
    axes = SMOKE if keys.smoke else {axis: AXES[axis] for axis in keys.axes}
    before = machine(keys.device, keys.threads)
    with scratch() as folder:
        points = [point for axis, given in axes.items() for point in measure(axis, given, keys, folder)]
    result = {"benchmark": "growth", "machine": before, "points": points}
    columns = [
        "axis", "clients", "active", "parameters", "classes", "s per round", "ms per active client",
        "MiB before", "MiB peak",
    ]  # fmt: skip
    title = f"{keys.method}, {keys.executor}, {keys.device}, {BASE['samples']} samples a client, batch 10; medians"
    report(result, title, (columns, [row(point) for point in points]), keys.json)


if __name__ == "__main__":
    main()
