"""What the studies share: settings x variants x seeds as run directories, their figures kept as JSON, their table.

    FEDSTILL_DATA=... python studies/NAME.py run OUT [--workers 2]   # skips what is done, resumes the rest
    python studies/NAME.py collect OUT                               # adds finished runs to NAME.json
    python studies/NAME.py table                                     # Markdown; cells that did not run say so

Seeds come first in the order of work, so that a study that is stopped has whole seeds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedstill import Config, load_config, presets, resume, run
from fedstill.runs import read_metrics

ONE_THREAD = ["execution.executor=serial", "execution.intra_op_threads=1", "execution.server_threads=1"]


@dataclass(frozen=True)
class Setting:
    """A preset with overrides, and the methods that run in it, each with overrides of its own."""

    preset: str
    keys: list[str]
    variants: dict[str, list[str]]


@dataclass(frozen=True)
class Study:
    """Named settings and seeds; ``figures_in`` is the JSON file that the project keeps."""

    settings: dict[str, Setting]
    seeds: tuple[int, ...]
    figures_in: Path

    def place(self, out: Path, setting: str, variant: str, seed: int) -> Path:
        slug = "".join(letter if letter.isalnum() else "-" for letter in f"{setting}--{variant}").replace("--", "-")
        return out / f"{slug}-seed{seed}"

    def config(self, setting: str, variant: str, seed: int) -> Config:
        chosen = self.settings[setting]
        seeds = [f"seed.data={seed}", f"seed.train={seed}", "checkpoint.keep=1"]
        base = presets.preset(chosen.preset)
        return load_config(None, [*chosen.keys, *chosen.variants[variant], *seeds, *ONE_THREAD], base)

    def one(self, out: Path, setting: str, variant: str, seed: int) -> str:
        path = self.place(out, setting, variant, seed)
        if path.name in self.figures():
            return f"{path.name}: among the kept figures"
        config = self.config(setting, variant, seed)
        if (path / "config.toml").exists():
            if len(read_metrics(path)) >= config.train.rounds:
                return f"{path.name}: done before"
            result = resume(path)
        else:
            result = run(config, directory=path)
        seconds = sum(sum(record["seconds"].values()) for record in result.records)
        return f"{path.name}: {max(result.accuracies().items())[1]:.4f} in {seconds:.0f} s"

    def jobs(self, only: str, skip: list[str]) -> list[tuple[str, str, int]]:
        return [
            (setting, variant, seed)
            for seed in self.seeds
            for setting, chosen in self.settings.items()
            if only in setting
            for variant in chosen.variants
            if not any(word in variant for word in skip)
        ]

    def run_all(self, out: Path, workers: int, only: str, skip: list[str]) -> None:
        jobs = self.jobs(only, skip)
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(self.one, out, *job) for job in jobs]
            for done, future in enumerate(as_completed(futures), 1):
                error = future.exception()
                print(f"{done}/{len(jobs)} {f'FAILED: {error}' if error else future.result()}", flush=True)

    def collect(self, out: Path) -> None:
        """Add the finished runs of OUT to the figures that the project keeps."""
        kept = self.figures()
        for setting, variant, seed in self.jobs("", []):
            path = self.place(out, setting, variant, seed)
            records: list[Any] = read_metrics(path)
            if len(records) >= self.config(setting, variant, seed).train.rounds:
                kept[path.name] = figures_of(path, records)
        lines = [f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept)]
        self.figures_in.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def figures(self) -> dict[str, Any]:
        return json.loads(self.figures_in.read_text()) if self.figures_in.exists() else {}

    def runs_of(self, setting: str, variant: str) -> list[Any]:
        kept = self.figures()
        return [kept[name] for seed in self.seeds if (name := self.place(Path(), setting, variant, seed).name) in kept]

    def cell(self, values: list[float]) -> str:
        if not values:
            return "not run"
        spread = f" ± {statistics.stdev(values) * 100:.1f}" if len(values) > 1 else ""
        short = "" if len(values) == len(self.seeds) else f" ({len(values)} seed{'s' if len(values) > 1 else ''})"
        return f"{statistics.mean(values) * 100:.1f}{spread}{short}"

    def table(self) -> None:
        for setting, chosen in self.settings.items():
            print(f"\n### {setting}\n")
            print("| method | round 1 | last round | mean over rounds | before refinement, mean | seconds |")
            print("| --- | --- | --- | --- | --- | --- |")
            for variant in chosen.variants:
                runs = self.runs_of(setting, variant)
                curves = [run["refined"] or run["fused"] for run in runs]
                before = [statistics.mean(run["fused"]) for run in runs if run["refined"]]
                shown = [
                    self.cell([curve[0] for curve in curves]),
                    self.cell([curve[-1] for curve in curves]),
                    self.cell([statistics.mean(curve) for curve in curves]),
                    self.cell(before) if before or not runs else "",
                    f"{statistics.mean(run['seconds'] for run in runs):.0f}" if runs else "",
                ]
                print(f"| {variant} | {' | '.join(shown)} |")
            base = next((runs for variant in chosen.variants if (runs := self.runs_of(setting, variant))), [])
            bounds = [
                f"{kind.replace('_', '-')}, round {round}: {self.cell([run['ensembles'][round][kind] for run in base])}"
                for round in (base[0]["ensembles"] if base else {})
                for kind in ("uniform", "class_weighted")
            ]
            if bounds:
                print(f"\nEnsembles of FedAvg's clients: {'; '.join(bounds)}.")


def figures_of(path: Path, records: list[Any]) -> dict[str, Any]:
    """Return what the project keeps of a run."""
    found = {
        "commit": json.loads((path / "environment.json").read_text())["commit"],
        "partition": json.loads((path / "partition.json").read_text())["fingerprint"],
        "fused": [record["fused"]["test"]["accuracy"] for record in records if "fused" in record],
        "refined": [record["refined"]["test"]["accuracy"] for record in records if "refined" in record],
        "ensembles": {record["round"]: record["ensembles"] for record in records if "ensembles" in record},
        "refinement": [record["refinement"] for record in records if record["refinement"]],
        "seconds": sum(sum(record["seconds"].values()) for record in records),
        "megabytes": sum(sum(kinds.values()) for record in records for kinds in record["bytes"].values()) / 1e6,
    }
    last = records[-1].get("refined", records[-1].get("fused", {}))
    if "by_model" in last:
        found["by_model"] = {name: scores["test"]["accuracy"] for name, scores in last["by_model"].items()}
    for key in ("all", "sel"):
        if key in records[-1]:
            found[key] = [record[key]["test"]["accuracy"] for record in records if key in record]
    if "per_client" in last.get("test", {}):
        found["per_client"] = [record["fused"]["test"]["per_client"] for record in records if "fused" in record]
    return found


def main(study: Study, description: str) -> None:
    """Run the command line of a study."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "collect", "table"])
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs") / study.figures_in.stem)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="only settings whose name holds this word")
    parser.add_argument("--skip", nargs="*", default=[], help="leave out methods whose name holds one of these words")
    given = parser.parse_args()
    if given.action == "run":
        study.run_all(given.out, given.workers, given.only, given.skip)
    elif given.action == "collect":
        study.collect(given.out)
    else:
        study.table()
