"""The benchmarks in their short form: they run, they check the work, and what they count is right."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
pytestmark = pytest.mark.slow


def smoke(name: str, *options: str) -> tuple[dict[str, Any], list[list[str]]]:
    """Run a benchmark and return its JSON and the rows of its table."""
    env = {key: value for key, value in os.environ.items() if key != "FEDSTILL_DATA"}
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--smoke", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    return json.loads(lines[0]), rows[2:]


def test_limit() -> None:
    result, rows = smoke("limit", "--models", "mlp", "--threads", "2")
    (model,) = result["models"]
    assert set(model["seconds"]) >= {"plain loop", "serial", "auto", "processes, 2", "vectorized, the cohort at once"}
    assert len(rows) == len(model["seconds"])
    assert model["parameters"] == 784 * 200 + 200 + 200 * 10 + 10
    assert model["distance"]["plain loop"] == 0
    # The same steps on the same batches, and rounding alone between them.
    assert all(apart < 1e-4 for apart in model["distance"].values())
    assert model["distance_in_float64"].keys() == model["distance"].keys()
    assert all(apart < 1e-12 for apart in model["distance_in_float64"].values())
    memory = model["memory"]["plain loop"]
    assert 0 < memory["before"]["host"] <= memory["after"]["host"]


def test_limit_refuses_a_contestant_that_does_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    limit = importlib.import_module("limit")
    monkeypatch.setattr(sys, "argv", ["limit", "--smoke", "--no-memory", "--models", "mlp", "--threads", "1"])
    step_for_step = limit.PlainLoop.train

    def twice(self: Any, client: int) -> None:
        step_for_step(self, client)
        self.current = {name: value.detach().clone() for name, value in self.module.named_parameters()}
        step_for_step(self, client)

    monkeypatch.setattr(limit.PlainLoop, "train", twice)
    with pytest.raises(SystemExit, match="from the plain loop"):
        limit.main()


def test_limit_refuses_a_learning_rate_that_float32_would_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    limit = importlib.import_module("limit")
    monkeypatch.setattr(sys, "argv", ["limit", "--smoke", "--no-memory", "--models", "mlp", "--threads", "1"])
    usual = torch.optim.SGD
    monkeypatch.setattr(limit.torch.optim, "SGD", lambda params, lr: usual(params, lr * (1 + 1e-7)))
    with pytest.raises(SystemExit, match=r"the first round in float64: .* from the plain loop"):
        limit.main()


def test_peers_without_any_peer(tmp_path: Path) -> None:
    result, rows = smoke("peers", "--venvs", str(tmp_path), "--peers", "--threads", "1")
    (found,) = result["comparisons"]
    assert set(found["seconds"]) == {"plain loop", "fedstill", "fedstill, vectorized"}
    assert found["same"] is True
    assert found["failed"] == {}
    assert len(rows) == 3
    outcome = found["outcome"]
    assert outcome["fedstill, vectorized"]["way"] == pytest.approx(outcome["fedstill"]["way"], rel=1e-3)
    assert all(one["way"] > 0 for one in outcome.values())


def test_peers_call_different_work_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    same = importlib.import_module("peers").same
    assert same({"one": {"accuracy": 0.70, "way": 2.0}, "other": {"accuracy": 0.72, "way": 2.1}}, 0.03, 1.1)
    assert not same({"one": {"accuracy": 0.70, "way": 2.0}, "other": {"accuracy": 0.74, "way": 2.0}}, 0.03, 1.1)
    assert not same({"one": {"accuracy": 0.70, "way": 2.0}, "other": {"accuracy": 0.70, "way": 2.3}}, 0.03, 1.1)


def test_distillation_counts_passes() -> None:
    result, _ = smoke("distillation")
    (stem,) = result["stems"]
    passes = stem["passes"]
    # 2 clients of 20 samples; 2 steps each stand for the 50 of the paper's setting. In batches of 50:
    assert passes["local training"]["forward"] == pytest.approx(2 * 50 * 20 / 50)
    assert passes["local training"]["backward to the weights"] == pytest.approx(2 * 50 * 20 / 50)
    # 2 iterations of batch 10 stand for the mode's own 10 or 100. Generator: 2 teachers and the student; then the
    # 2 teachers once and 5 student steps.
    ten_steps = 10 * 10 / 50
    assert passes["paper"]["forward"] == pytest.approx(ten_steps * (3 + 2 + 5))
    assert passes["paper"]["backward to the inputs"] == pytest.approx(ten_steps * 3)
    assert passes["paper"]["backward to the weights"] == pytest.approx(ten_steps * 5)
    # Noise for each step: the teachers answer five times.
    assert passes["paper, noise_per = step"]["forward"] == pytest.approx(ten_steps * (3 + 5 * 2 + 5))
    # The released code: a generator step for each teacher, with the student each time.
    assert passes["code"]["forward"] == pytest.approx(ten_steps * (2 * 2 + 2 + 5))
    # Without mining the student is not asked in the generator's step; 100 iterations.
    assert passes["tuned"]["forward"] == pytest.approx(10 * ten_steps * (2 + 2 + 5))
    assert all(one["units"] > one["forward"] for one in passes.values())  # backward passes and the generator


def test_growth() -> None:
    result, rows = smoke("growth", "--threads", "1")
    assert [point["clients"] for point in result["points"]] == [4, 40]
    assert len(rows) == 2
    for point in result["points"]:
        assert point["parameters"] == 64 * 200 + 200 + 200 * 10 + 10
        assert len(point["seconds"]) == 1
        assert point["memory"]["after"]["host"] >= point["memory"]["before"]["host"] > 0
