"""Studies whose numbers are invented, with everything in their records that a report shows; and a report of one."""

from __future__ import annotations

import atexit
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fedstill.config import Config, load_config, to_toml
from fedstill.presets import preset
from fedstill.report.html import write_report

CLASSES, CLIENTS = 10, 6
VERSIONS = {"versions": {"python": "3.11", "torch": "2.9"}, "commit": "0123abc", "platform": "a machine", "cores": 2}
Variants = Mapping[str, tuple[str, str | None]]
"""Name -> its method and its base."""

METHODS: Variants = {
    "FedAvg": ("fedavg", None),
    "FedAvg+FedFTG": ("fedavg+fedftg", "FedAvg"),
    "SCAFFOLD": ("scaffold", "FedAvg"),
    "SCAFFOLD+FedFTG": ("scaffold+fedftg", "SCAFFOLD"),
    "alone": ("alone", None),
}


@cache
def big_report() -> tuple[Path, Path]:
    """Return a study of sixty runs, of which one stopped early, and the page of its report."""
    place = tempfile.TemporaryDirectory(prefix="fedstill-report-")
    atexit.register(place.cleanup)
    title = "Invented <b>numbers</b> & $methods$"
    study = write_study(
        Path(place.name) / "study", METHODS, seeds=range(12), rounds=30, missing=[("SCAFFOLD", 11)], title=title
    )
    return study, write_report(study)


def scores(accuracy: float) -> dict[str, Any]:
    """Return what is measured of a model: class 0 is the worst, and so is the last client."""
    per_class = [min(max(accuracy + 0.02 * (label - 4.5), 0), 1) for label in range(CLASSES)]
    mix = [accuracy - 0.01 * client for client in range(CLIENTS)]
    return {"test": {"accuracy": accuracy, "loss": 1 - accuracy, "per_class": per_class}, "by_client_label_mix": mix}


def record(config: Config, round: int, level: float) -> dict[str, Any]:
    """Return a round of a run that rises towards ``level``; a refinement adds a tenth in round 1, ever less later."""
    fused = level * (1 - math.exp(-round / 2)) + 0.002 * (config.seed.data % 7) * math.sin(round + level)
    line: dict[str, Any] = {"round": round, "cohort": list(range(CLIENTS)), "fused": scores(fused), "refinement": {}}
    line["bytes"] = {"down": {"weights": 1_000_000}, "up": {"weights": 1_000_000}}
    line["seconds"] = {"train": 2.0, "fuse": 0.1, "evaluate": 0.5}
    if config.method == "alone":
        own = [fused + 0.01 * (client - (CLIENTS - 1) / 2) for client in range(CLIENTS)]
        line["fused"] = {"test": {"accuracy": fused, "loss": 1.0, "per_client": own}}
    if "+" in config.method:
        refined = fused + 0.1 / round
        losses = {"student_loss": 1 / round, "generator_cls": 0.5 / round, "generator_md": 0.0, "label_accuracy": 0.9}
        line |= {"refined": scores(refined), "ensembles": {"uniform": refined + 0.01, "class_weighted": refined + 0.03}}
        line["ensembles"]["fused"] = fused
        line["refinement"] = {config.method.split("+")[1]: losses}
        line["seconds"]["refine"] = 3.0
    return line


def write_run(path: Path, method: str, seed: int, level: float, rounds: int, *keys: str, whole: bool = True) -> Path:
    """Write a run directory without checkpoints; one that is not whole misses its last round."""
    path.mkdir(parents=True)
    seeds = [f"seed.data={seed}", f"seed.train={seed}", f"train.rounds={rounds}", f"data.clients={CLIENTS}"]
    config = load_config(None, [f"method={method}", *seeds, *keys], preset("digits"))
    lines = [record(config, round, level + 0.005 * (seed % 5)) for round in range(1, rounds + 1)]
    counts = [[(client * 7 + label * 3 + seed) % 11 for label in range(CLASSES)] for client in range(CLIENTS)]
    (path / "config.toml").write_text(to_toml(config))
    (path / "environment.json").write_text(json.dumps(VERSIONS))
    samples = {part: f"{part}, {seed}" for part in ("train", "test")}
    held = {"fingerprint": f"{config.data.beta}, {seed}", "data_fingerprint": samples, "class_counts": counts}
    (path / "partition.json").write_text(json.dumps(held))
    kept = lines if whole else lines[:-1]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return path


def write_study(
    folder: Path,
    variants: Variants,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    rounds: int = 4,
    betas: Sequence[float] = (0.1,),
    missing: Sequence[tuple[str, int]] = (),
    title: str = "Invented",
) -> Path:
    """Write a study's results; the runs in ``missing`` (variant, seed) stop a round early."""
    cells = []
    for beta in betas:
        for place, (name, (method, base)) in enumerate(variants.items()):
            for seed in seeds:
                directory = f"beta-{beta}/{place}/seed-{seed}"
                level = 0.7 + 0.02 * place - 0.1 * beta
                whole = (name, seed) not in missing
                write_run(folder / directory, method, seed, level, rounds, f"data.beta={beta}", whole=whole)
                point = {"data.beta": beta} if len(betas) > 1 else {}
                cell = {"setting": "", "point": point, "variant": name, "base": base, "seed": seed}
                cells.append({**cell, "directory": directory})
    (folder / "study.json").write_text(json.dumps({"title": title, "cells": cells}))
    return folder
