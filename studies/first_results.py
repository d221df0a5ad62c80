"""The runs behind ``docs/results.md``: three settings, eight methods, three seeds.

    FEDSTILL_DATA=... python studies/first_results.py run OUT [--workers 2]   # skips what is done, resumes the rest
    python studies/first_results.py table OUT                                 # Markdown; cells that did not run say so

Seeds come first in the order of work, so that a study that is stopped has whole seeds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fedstill import accuracies, load_config, presets, resume, run
from fedstill.runs import read_metrics

ONE_THREAD = ["execution.executor=serial", "execution.intra_op_threads=1", "execution.server_threads=1"]
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "fashion, few rounds": ("fashion-few-rounds", ["model.width=8"]),
    "fashion, many rounds": ("fashion-many-rounds", ["model.width=8"]),
    "cifar10, few rounds": ("cifar10-few-rounds", ["model.width=8"]),
}
VARIANTS: dict[str, list[str]] = {
    "FedAvg": ["method=fedavg"],
    "FedAvg, class-weighted head": ["method=fedavg", "fusion.head=class-weighted"],
    "SCAFFOLD": ["method=scaffold"],
    "FedAvg+FedFTG, paper": ["method=fedavg+fedftg", "fedftg.mode=paper"],
    "FedAvg+FedFTG, code": ["method=fedavg+fedftg", "fedftg.mode=code"],
    "FedAvg+FedFTG, tuned": ["method=fedavg+fedftg", "fedftg.mode=tuned"],
    "SCAFFOLD+FedFTG, tuned": ["method=scaffold+fedftg", "fedftg.mode=tuned"],
    "FedAvg, noise inputs, class-weighted teacher": [
        "method=fedavg+fedftg", "fedftg.mode=tuned", "fedftg.inputs=noise", "fedftg.teacher=class",
    ],
}  # fmt: skip
SEEDS = (0, 1, 2)


def place(out: Path, setting: str, variant: str, seed: int) -> Path:
    slug = "".join(letter if letter.isalnum() else "-" for letter in f"{setting}--{variant}").replace("--", "-")
    return out / f"{slug}-seed{seed}"


def one(out: Path, setting: str, variant: str, seed: int) -> str:
    path = place(out, setting, variant, seed)
    preset, keys = SETTINGS[setting]
    seeds = [f"seed.data={seed}", f"seed.train={seed}", "checkpoint.keep=1"]
    config = load_config(None, [*keys, *VARIANTS[variant], *seeds, *ONE_THREAD], presets.preset(preset))
    if (path / "config.toml").exists():
        if len(read_metrics(path)) >= config.train.rounds:
            return f"{path.name}: done before"
        result = resume(path)
    else:
        result = run(config, directory=path)
    seconds = sum(sum(record["seconds"].values()) for record in result.records)
    return f"{path.name}: {max(result.accuracies().items())[1]:.4f} in {seconds:.0f} s"


def run_all(out: Path, workers: int, only: str, skip: list[str]) -> None:
    variants = [variant for variant in VARIANTS if not any(word in variant for word in skip)]
    jobs = [
        (setting, variant, seed) for seed in SEEDS for setting in SETTINGS if only in setting for variant in variants
    ]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(one, out, *job) for job in jobs]
        for done, future in enumerate(as_completed(futures), 1):
            error = future.exception()
            print(f"{done}/{len(jobs)} {f'FAILED: {error}' if error else future.result()}", flush=True)


def cell(values: list[float]) -> str:
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values) * 100:.1f}" if len(values) > 1 else ""
    short = "" if len(values) == len(SEEDS) else f" ({len(values)} seed{'s' if len(values) > 1 else ''})"
    return f"{statistics.mean(values) * 100:.1f}{spread}{short}"


def table(out: Path) -> None:
    for setting, (preset, keys) in SETTINGS.items():
        rounds = load_config(None, keys, presets.preset(preset)).train.rounds
        print(f"\n### {setting}\n")
        print("| method | round 1 | last round | mean over rounds | fused before refinement, mean | seconds |")
        print("| --- | --- | --- | --- | --- | --- |")
        bounds: dict[str, list[float]] = {}
        for variant in VARIANTS:
            columns: list[list[float]] = [[], [], [], [], []]
            for seed in SEEDS:
                records: list[Any] = read_metrics(place(out, setting, variant, seed))
                if len(records) < rounds:
                    continue
                found, fused = accuracies(records), accuracies(records, model="fused")
                refined = any("refined" in record for record in records)
                seconds = sum(sum(record["seconds"].values()) for record in records)
                values = [found[1], found[rounds], statistics.mean(found.values())]
                for column, value in zip(
                    columns, [*values, statistics.mean(fused.values()) if refined else None, seconds]
                ):
                    if value is not None:
                        column.append(value)
                if variant == "FedAvg":
                    for when, record in (("first", records[0]), ("last", records[-1])):
                        for kind, value in record["ensembles"].items():
                            bounds.setdefault(f"{kind.replace('_', '-')} ensemble, {when} round", []).append(value)
            shown = [cell(column) if column or index != 3 else "" for index, column in enumerate(columns[:4])]
            spent = f"{statistics.mean(columns[4]):.0f}" if columns[4] else ""
            print(f"| {variant} | {' | '.join(shown)} | {spent} |")
        for name, values in bounds.items():
            print(f"\nFedAvg's {name}: {cell(values)}.", end="")
        print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="only settings whose name holds this word")
    parser.add_argument("--skip", nargs="*", default=[], help="leave out methods whose name holds one of these words")
    given = parser.parse_args()
    if given.action == "run":
        run_all(given.out, given.workers, given.only, given.skip)
    else:
        table(given.out)
