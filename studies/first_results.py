"""The runs behind ``docs/results.md``: three settings, eight methods, three seeds.

    FEDSTILL_DATA=... python studies/first_results.py run OUT [--workers 2]   # skips what is done, resumes the rest
    python studies/first_results.py collect OUT                               # adds finished runs to first_results.json
    python studies/first_results.py table                                     # Markdown; cells that did not run say so

Seeds come first in the order of work, so that a study that is stopped has whole seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fedstill import load_config, presets, resume, run
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
FIGURES = Path(__file__).with_suffix(".json")


def place(out: Path, setting: str, variant: str, seed: int) -> Path:
    slug = "".join(letter if letter.isalnum() else "-" for letter in f"{setting}--{variant}").replace("--", "-")
    return out / f"{slug}-seed{seed}"


def one(out: Path, setting: str, variant: str, seed: int) -> str:
    path = place(out, setting, variant, seed)
    preset, keys = SETTINGS[setting]
    seeds = [f"seed.data={seed}", f"seed.train={seed}", "checkpoint.keep=1"]
    config = load_config(None, [*keys, *VARIANTS[variant], *seeds, *ONE_THREAD], presets.preset(preset))
    if path.name in figures():
        return f"{path.name}: among the kept figures"
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


def collect(out: Path) -> None:
    """Add the finished runs of OUT to the figures that the project keeps."""
    kept = figures()
    for setting in SETTINGS:
        for variant in VARIANTS:
            for seed in SEEDS:
                path = place(out, setting, variant, seed)
                records: list[Any] = read_metrics(path)
                if len(records) >= rounds_of(setting):
                    kept[path.name] = {
                        "commit": json.loads((path / "environment.json").read_text())["commit"],
                        "partition": json.loads((path / "partition.json").read_text())["fingerprint"],
                        "fused": [record["fused"]["test"]["accuracy"] for record in records],
                        "refined": [record["refined"]["test"]["accuracy"] for record in records if "refined" in record],
                        "ensembles": {
                            record["round"]: record["ensembles"] for record in records if "ensembles" in record
                        },
                        "fedftg": [record["refinement"].get("fedftg", {}) for record in records],
                        "seconds": sum(sum(record["seconds"].values()) for record in records),
                    }
    lines = [f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept)]
    FIGURES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def figures() -> dict[str, Any]:
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


def rounds_of(setting: str) -> int:
    preset, keys = SETTINGS[setting]
    return load_config(None, keys, presets.preset(preset)).train.rounds


def cell(values: list[float]) -> str:
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values) * 100:.1f}" if len(values) > 1 else ""
    short = "" if len(values) == len(SEEDS) else f" ({len(values)} seed{'s' if len(values) > 1 else ''})"
    return f"{statistics.mean(values) * 100:.1f}{spread}{short}"


def table() -> None:
    kept = figures()
    for setting in SETTINGS:
        print(f"\n### {setting}\n")
        print("| method | round 1 | last round | mean over rounds | before refinement, mean | seconds |")
        print("| --- | --- | --- | --- | --- | --- |")
        for variant in VARIANTS:
            runs = [kept[name] for seed in SEEDS if (name := place(Path(), setting, variant, seed).name) in kept]
            curves = [run["refined"] or run["fused"] for run in runs]
            before = [statistics.mean(run["fused"]) for run in runs if run["refined"]]
            shown = [
                cell([curve[0] for curve in curves]),
                cell([curve[-1] for curve in curves]),
                cell([statistics.mean(curve) for curve in curves]),
                cell(before) if before or not runs else "",
                f"{statistics.mean(run['seconds'] for run in runs):.0f}" if runs else "",
            ]
            print(f"| {variant} | {' | '.join(shown)} |")
        base = [kept[name] for seed in SEEDS if (name := place(Path(), setting, "FedAvg", seed).name) in kept]
        bounds = [
            f"{kind.replace('_', '-')}, round {round}: {cell([run['ensembles'][round][kind] for run in base])}"
            for round in (base[0]["ensembles"] if base else {})
            for kind in ("uniform", "class_weighted")
        ]
        print(f"\nEnsembles of FedAvg's clients: {'; '.join(bounds)}.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "collect", "table"])
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/first-results"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="only settings whose name holds this word")
    parser.add_argument("--skip", nargs="*", default=[], help="leave out methods whose name holds one of these words")
    given = parser.parse_args()
    if given.action == "run":
        run_all(given.out, given.workers, given.only, given.skip)
    elif given.action == "collect":
        collect(given.out)
    else:
        table()
