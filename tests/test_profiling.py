"""`fedstill run --profile`: seconds by phase, a trace that holds the clients' threads, results that do not change."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from fedstill import cli
from fedstill.profiling import PHASES
from fedstill.runs import read_metrics
from small import untimed

QUICK = ["data.train_samples=200", "data.test_samples=100", "data.server_validation=0", "data.clients=4"]
QUICK += ["train.rounds=4", "local.epochs=1", "model.width=4", "fedftg.iterations=1", "fedftg.generator_width=4"]
QUICK += ["execution.executor=threads", "execution.workers=2", "execution.device=cpu"]


def test_a_profiled_run_says_where_the_time_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["fedstill", "run", "--quiet", *options, *QUICK])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0
        return capsys.readouterr().out

    shown = run("--profile", "--out", str(tmp_path / "profiled"))
    run("--out", str(tmp_path / "plain"))
    assert untimed(read_metrics(tmp_path / "profiled")) == untimed(read_metrics(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "profile.json").exists()

    profile = json.loads((tmp_path / "profiled" / "profile.json").read_text())
    assert [one["traced"] for one in profile["rounds"]] == [False, True, False, False]
    assert profile["over_rounds"] == [3, 4]  # neither the first nor the traced one
    assert all(f"  {phase} " in shown for phase in profile["typical"])
    for measured, profiled in zip(read_metrics(tmp_path / "profiled"), profile["rounds"], strict=True):
        spent = profiled["seconds"]
        assert set(PHASES.values()) < set(spent)
        # The round's own clocks hold these phases and little else.
        assert spent["train the clients"] <= measured["seconds"]["train"] + 1e-4
        assert spent["stack the teachers"] + spent["refine"] <= measured["seconds"]["refine"] + 1e-4
        assert profiled["seconds_of_clients"] <= 2 * spent["train the clients"] + 1e-4  # two workers

    with gzip.open(tmp_path / "profiled" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    phases = [event["name"] for event in events if str(event.get("name", "")).startswith("fedstill: ")]
    assert {f"fedstill: {phase}" for phase in PHASES.values()} == set(phases)
    assert phases.count("fedstill: broadcast") == 4  # one for each client of one round
    trained = [event for event in events if event.get("name") == "aten::convolution_backward"]
    assert len({event["tid"] for event in trained}) >= 2  # the clients' threads are in it, not only the server's
