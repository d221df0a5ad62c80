"""Run directories and studies written by hand, for figures that are worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedstill.config import to_toml
from small import small

Line = dict[str, Any]


def line(round: int, scores: Mapping[str, Any] | float, **more: Any) -> Line:
    """Return a round of 1 MB down and 0.5 MB up, 2 + 0.5 + 1 seconds of work and 9 of evaluation."""
    fused = {"test": {"accuracy": scores}} if isinstance(scores, float) else scores
    return {
        "round": round,
        "fused": fused,
        "bytes": {"down": {"weights": 1_000_000}, "up": {"weights": 400_000, "label-counts": 100_000}},
        "seconds": {"train": 2.0, "fuse": 0.5, "refine": 1.0, "evaluate": 9.0},
        **more,
    }


def write_run(
    path: Path, lines: Sequence[Line | float], *keys: str, seed: int = 0, partition: str = "same", **environment: str
) -> Path:
    """Write a run whose rounds are the lines, or have these accuracies; it is whole unless ``keys`` say otherwise."""
    path.mkdir(parents=True)
    records = [line(at, one) if isinstance(one, float) else one for at, one in enumerate(lines, 1)]
    config = small(f"train.rounds={len(records) or 1}", f"seed.data={seed}", f"seed.train={seed}", *keys)
    (path / "config.toml").write_text(to_toml(config))
    (path / "environment.json").write_text(json.dumps(environment))
    samples = {part: f"{part} of seed {seed}" for part in ("train", "test")}
    fingerprints = {"fingerprint": f"{partition} of seed {seed}", "data_fingerprint": samples}
    (path / "partition.json").write_text(json.dumps(fingerprints))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cell(variant: str, seed: int, directory: str, **more: Any) -> dict[str, Any]:
    return {"setting": "", "point": {}, "variant": variant, "base": None, "seed": seed, "directory": directory, **more}


def write_index(folder: Path, cells: Sequence[Mapping[str, Any]], title: str = "a study") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps({"title": title, "cells": list(cells)}))
    return folder
