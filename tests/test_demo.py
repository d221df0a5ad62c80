"""The demonstration in its short form."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedstill.cli import app
from fedstill.demo import ALONE, FEDAVG, POOLED, RUNS, SCAFFOLD, Comparison, configuration, demo, show
from fedstill.errors import InputError
from fedstill.runs import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, demo(out, short=True, workers=2)


def test_every_run_and_every_bound_is_there(made: tuple[Path, Comparison]) -> None:
    _, comparison = made
    assert [curve.name for curve in comparison.curves] == list(RUNS)
    assert all(list(curve.accuracies) == [1, 2] for curve in comparison.curves)
    assert all(curve.seconds > 0 and curve.megabytes > 0 for curve in comparison.curves)
    assert [(bound.kind, list(bound.accuracies)) for bound in comparison.bounds] == [
        ("floor", [1, 2]),
        ("ceiling", [1]),
        ("ceiling", [1]),
        ("ceiling", [1, 2]),
    ]


def test_the_runs_share_what_they_should(made: tuple[Path, Comparison]) -> None:
    out, comparison = made
    partitions = {json.loads(file.read_text())["fingerprint"] for file in out.glob("*/partition.json")}
    assert len(partitions) == 1
    curves = {curve.name: curve for curve in comparison.curves}
    # Before SCAFFOLD has control variates its clients are FedAvg's.
    assert curves[SCAFFOLD].first == curves[FEDAVG].first
    assert curves[SCAFFOLD].megabytes == pytest.approx(2 * curves[FEDAVG].megabytes, rel=0.01)


def test_pooled_data_beats_a_client_alone(made: tuple[Path, Comparison]) -> None:
    bounds = {bound.name: bound.last for bound in made[1].bounds}
    assert bounds[POOLED] > bounds[ALONE] + 0.2


def test_the_bounds_are_those_of_fedavg(made: tuple[Path, Comparison]) -> None:
    out, comparison = made
    first = read_metrics(out / "fedavg")[0]["ensembles"]
    assert [bound.last for bound in comparison.bounds[1:3]] == [first["uniform"], first["class_weighted"]]  # type: ignore[attr-defined]


def test_files(made: tuple[Path, Comparison]) -> None:
    out, comparison = made
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    results = json.loads((out / "results.json").read_text())
    assert [entry["name"] for entry in results["curves"]] == list(RUNS)
    table = (out / "table.md").read_text()
    assert all(f"| {name} |" in table for name in RUNS)
    assert all(f": {bound.name} |" in table for bound in comparison.bounds)
    assert comparison.reading in table


def test_the_table_fits_a_terminal(made: tuple[Path, Comparison]) -> None:
    shown = StringIO()
    show(made[1], Console(width=80, file=shown))
    text = shown.getvalue()
    assert "…" not in text
    assert all(curve.name in text for curve in made[1].curves)
    assert all(f"{curve.megabytes:.1f}" in text for curve in made[1].curves)


def test_refuses_a_directory_that_exists(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.txt"]
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert isinstance(result.exception, InputError)


def test_full_form_is_the_setting_that_distillation_is_for() -> None:
    for _, changes in RUNS.values():
        config = configuration(changes, short=False)
        assert (config.data.clients, config.data.beta, config.train.rounds) == (10, 0.1, 5)
        assert config.local.epochs >= 10
        assert config.fedftg.generator_width == 16
