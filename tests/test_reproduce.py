"""The papers' tables: the numbers, the runs behind them, and how they are shown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from rich.console import Console
from typer.testing import CliRunner

from fedstill.cli import app
from fedstill.config import Config
from fedstill.errors import InputError
from fedstill.experiment import run
from fedstill.reproduce import Plan, Sheet, carry_out, list_tables, load_table
from fedstill.reproduce.choose import chosen
from fedstill.reproduce.command import cost
from fedstill.reproduce.engine import file_of
from fedstill.reproduce.metrics import Metric, Scale
from fedstill.reproduce.runs import configs_of, missing_file, study_of
from fedstill.reproduce.tables import Cell, Part, Printed, Table, Unit
from fedstill.runs import read_metrics
from fedstill.studies.results import RunData, SeedRun
from small import small

PAPERS = ("fedftg", "fedgen", "feddf", "fedmd")

# The papers' numbers, copied by hand once more; in FedFTG's table 2 the deviations are a list of their own.

FEDFTG_1 = """
centralised | 92.55+-.05 | | | 73.98+-.26 | |
FedAvg | 83.78+-.13 | 82.04+-.46 | 79.59+-1.01 | 50.29+-.34 | 50.67+-.34 | 50.17+-.19
FedProx | 84.10+-.39 | 82.36+-.38 | 80.12+-.43 | 51.25+-.62 | 50.94+-.40 | 50.82+-.20
FedDyn | 85.19+-.58 | 82.87+-.62 | 80.15+-1.00 | 53.27+-.01 | 51.68+-.31 | 50.51+-.34
MOON | 84.34+-.09 | 82.67+-.08 | 80.97+-.46 | 52.51+-.70 | 52.55+-.49 | 51.88+-.25
SCAFFOLD | 85.99+-.06 | 84.55+-.30 | 82.14+-1.20 | 53.32+-.32 | 53.91+-.33 | 54.36+-.32
FedGen | 83.91+-.36 | 82.23+-.73 | 79.72+-.85 | 50.38+-.27 | 50.71+-.55 | 50.08+-.24
FedDF | 84.47+-.20 | 82.92+-.64 | 80.97+-.74 | 52.12+-.15 | 51.36+-.02 | 51.26+-.09
FedFTG (on SCAFFOLD) | 87.34+-.16 | 86.06+-.19 | 84.38+-.49 | 56.94+-.19 | 56.49+-.55 | 55.96+-.39
"""
FEDFTG_2 = """
FedAvg 153.67 / 425.33, 86.67 / 713.67; FedProx 143.67 / 391.67, 86.00 / 529.00; FedDyn 90.67 / 183.67, 64.00 / 239.33;
MOON 128.00 / 347.00, 79.67 / 376.00; SCAFFOLD 100.33 / 212.00, 58.33 / 185.67; FedGen 140.00 / 406.67, 95.00 / 684.00;
FedDF 132.67 / 329.00, 94.50 / 452.00; FedFTG 92.67 / 188.67, 57.00 / 166.33
"""
FEDFTG_2_DEVIATIONS = """
FedAvg 20.33/61.67, 6.33/191.33; FedProx 0.33/13.33, 1.00/36.00; FedDyn 2.33/23.33, 8.00/15.67;
MOON 10.00/24.00, 2.33/29.00; SCAFFOLD 14.67/24.00, 3.67/0.33; FedGen 4.00/29.33, 1.00/92.00;
FedDF 11.33/42.00, 1.50/5.00; FedFTG 14.33/31.33, 1.00/10.67
"""
FEDFTG_4 = "83.43 82.49 82.39 82.40 82.18 82.15 82.11 81.98 82.50 82.52 82.12 10.17"
FEDFTG_4_DEVIATIONS = ".10 .42 .22 .21 .16 .14 .28 .14 .55 .35 .16 .26"
FEDGEN_1 = """
MNIST, alpha 0.05 | 87.70+-2.07 | 87.49+-2.05 | 88.85+-0.68 | 70.56+-1.24 |
  86.70+-2.27 | 90.02+-0.96 | 91.30+-0.74
MNIST, alpha 0.1 | 90.16+-0.59 | 90.10+-0.39 | 90.78+-0.39 | 64.11+-1.36 |
  90.28+-0.89 | 91.11+-0.43 | 93.03+-0.32
MNIST, alpha 1 | 93.84+-0.25 | 93.83+-0.29 | 93.91+-0.28 | 79.88+-0.66 |
  94.73+-0.15 | 93.37+-0.40 | 95.52+-0.07
EMNIST, alpha 0.05 | 62.25+-2.82 | 61.93+-2.31 | 64.99+-0.35 | 60.49+-1.27 |
  61.56+-2.15 | 70.40+-0.79 | 68.53+-1.17
EMNIST, alpha 0.1 | 66.21+-2.43 | 65.29+-2.94 | 67.53+-1.19 | 50.32+-1.39 |
  66.06+-3.18 | 70.94+-0.76 | 72.15+-0.21
EMNIST, alpha 1 | 74.83+-0.99 | 74.12+-0.88 | 75.12+-1.07 | 46.19+-0.70 |
  75.41+-1.05 | 75.43+-0.37 | 78.48+-1.04
EMNIST, alpha 10 | 74.83+-0.69 | 74.24+-0.81 | 74.90+-0.80 | 54.77+-0.33 |
  75.55+-0.94 | 74.36+-0.40 | 78.43+-0.74
EMNIST, alpha 1, 40 local steps | 77.02+-1.09 | 75.93+-0.95 | 77.68+-0.98 | 46.72+-0.73 |
  78.12+-0.90 | 77.58+-0.37 | 78.92+-0.73
CelebA, 5 of 10 clients | 87.48+-0.39 | 87.67+-0.39 | 88.48+-0.23 | 76.68+-1.23 |
  86.37+-0.41 | 87.01+-1.00 | 89.70+-0.32
CelebA, 5 of 25 clients | 89.13+-0.25 | 88.84+-0.19 | 90.22+-0.31 | 74.99+-1.57 |
  88.05+-0.43 | 88.93+-0.79 | 89.62+-0.34
CelebA, 10 of 25 clients | 89.12+-0.20 | 89.01+-0.33 | 90.08+-0.24 | 75.88+-1.17 |
  88.14+-0.37 | 89.25+-0.56 | 90.29+-0.47
"""
FEDDF_2 = """
CIFAR-10, alpha 1 | 76.01+-1.53 | 78.57+-0.22 | 76.32+-1.98 | 77.79+-1.22 | 80.69+-0.43
CIFAR-10, alpha 0.1 | 62.22+-3.88 | 68.37+-0.50 | 68.65+-0.77 | 68.63+-0.79 | 71.36+-1.07
CIFAR-100, alpha 1 | 35.56+-1.99 | 42.54+-0.51 | 42.94+-1.23 | 42.83+-0.36 | 47.43+-0.45
CIFAR-100, alpha 0.1 | 29.14+-1.91 | 36.72+-1.50 | 35.74+-1.00 | 36.29+-1.98 | 39.33+-0.03
"""

Place = tuple[str, str]
Number = tuple[float, float | None]


def grid(id: str, text: str) -> dict[Place, Number]:
    """Return the numbers of a transcription by row and column of the table."""
    columns = load_table(id).columns
    found: dict[Place, Number] = {}
    for line in text.strip().replace("|\n  ", "| ").splitlines():
        row, *values = (part.strip() for part in line.split("|"))
        for column, value in zip(columns, values, strict=True):
            if value:
                mean, deviation = value.split("+-")
                found[row, column] = float(mean), float(deviation)
    return found


def in_the_data(id: str) -> dict[Place, Number | None]:
    return {
        (cell.row, cell.column): (cell.paper.mean, cell.paper.deviation) if cell.paper else None
        for cell in load_table(id).cells
    }


# Numbers


@pytest.mark.parametrize(
    ("id", "text"), [("fedftg/table1", FEDFTG_1), ("fedgen/table1", FEDGEN_1), ("feddf/table2", FEDDF_2)]
)
def test_a_table_has_the_papers_numbers(id: str, text: str) -> None:
    assert in_the_data(id) == grid(id, text)


def test_the_later_run_of_fedgen_is_with_the_released_code() -> None:
    table = load_table("fedgen/rerun")
    assert in_the_data("fedgen/rerun") == {
        ("MNIST, alpha 0.1", "FedAvg"): (90.71, 1.17),
        ("MNIST, alpha 0.1", "FedGen, released code"): (95.68, 0.20),
    }
    configs = configs_of(study_of(table.paper, [table], "paper", 1))
    assert [one.fedgen.mode for one in configs.values() if one.method == "fedgen"] == ["code"]


def test_a_deviation_says_what_it_is_over() -> None:
    for id, over in (("fedgen/table4", "these rounds of all seeds"), ("fedftg/table1", "seeds")):
        (line,) = (one for one in Sheet.of(load_table(id), {}, "paper", 3, lambda _: None).head if "±" in one)
        assert f"± is the standard deviation over {over}, " in line


def test_rounds_to_target_are_the_papers() -> None:
    def numbers(text: str) -> dict[str, list[float]]:
        rows = (row.strip().partition(" ") for row in text.replace("\n", " ").split(";"))
        return {name: [float(value) for value in re.findall(r"[\d.]+", values)] for name, _, values in rows}

    means, deviations = numbers(FEDFTG_2), numbers(FEDFTG_2_DEVIATIONS)
    table = load_table("fedftg/table2")
    expected = {
        (row.replace("FedFTG", "FedFTG (on SCAFFOLD)"), column): (mean, deviations[row][place])
        for row, values in means.items()
        for place, (column, mean) in enumerate(zip(table.columns, values, strict=True))
    }
    assert len(expected) == 32
    assert in_the_data("fedftg/table2") == expected


def test_the_ablations_are_the_papers_and_set_what_they_say() -> None:
    cells = load_table("fedftg/table4").cells
    assert [cell.paper and cell.paper.mean for cell in cells] == [float(value) for value in FEDFTG_4.split()]
    assert [cell.paper and cell.paper.deviation for cell in cells] == [
        float(value) for value in FEDFTG_4_DEVIATIONS.split()
    ]
    configs = configs_of(study_of(load_table("fedftg/table4").paper, [load_table("fedftg/table4")], "paper", 1))
    switched = {cell.row: (*(switch for switch, off in switches(configs[cell.run]).items() if off),) for cell in cells}
    assert switched == {
        "FedFTG": (),
        "-hsm": ("hsm",),
        "-cls": ("cls",),
        "-abe": ("abe",),
        "-hsm-cls": ("hsm", "cls"),
        "-hsm-abe": ("hsm", "abe"),
        "-cls-abe": ("cls", "abe"),
        "-hsm-cls-abe": ("hsm", "cls", "abe"),
        "no L_cls": ("L_cls",),
        "no L_dis": ("L_dis",),
        "no L_cls, no L_dis": ("L_cls", "L_dis"),
        "KL -> MSE": ("KL",),
    }
    assert {config.train.rounds for config in configs.values()} == {500}


def switches(config: Config) -> dict[str, bool]:
    keys = config.fedftg
    return {
        "hsm": keys.lambda_md == 0,
        "cls": keys.labels == "uniform",
        "abe": keys.teacher == "uniform",
        "L_cls": keys.lambda_cls == 0,
        "L_dis": keys.lambda_dis == 0,
        "KL": (keys.md_gen, keys.md_student) == ("mse", "mse"),
    }


def test_what_a_paper_only_draws_has_no_number() -> None:
    for id in ("fedftg/figure4", "fedftg/figure5", "fedftg/figure6"):
        assert {cell.paper for cell in load_table(id).cells} == {None}
    gains = {cell.row: cell.paper for cell in load_table("fedmd/figures").cells}
    assert [paper.text for paper in gains.values() if paper] == ["20"]


def test_a_number_is_read_with_its_deviation_and_nothing_else_is() -> None:
    assert Printed.of("79.59 ± 1.01") == Printed("79.59 ± 1.01", 79.59, 1.01)
    assert Printed.of("350") == Printed("350", 350.0, None)
    for text in ("about 20", "79.59+-1.01", "-3", "79.59 ±"):
        with pytest.raises(ValueError, match="is not a number"):
            Printed.of(text)


# Runs


@pytest.mark.parametrize("scale", ["paper", "small"])
@pytest.mark.parametrize("paper", PAPERS)
def test_every_cell_has_a_valid_configuration(paper: str, scale: Scale) -> None:
    tables = [load_table(id) for id in list_tables(paper=paper)]
    study = study_of(tables[0].paper, tables, scale, 1)  # reads, checks and composes every configuration
    configs = configs_of(study)
    assert {cell.run for table in tables for cell in table.cells} == set(configs)
    if scale == "small":
        assert max(config.train.rounds for config in configs.values()) <= 25
        assert all((config.data.train_samples or 0) <= 6000 for config in configs.values())
    assert set(PAPERS) == {id.partition("/")[0] for id in list_tables()}


def test_fedftgs_runs_have_the_papers_setting() -> None:
    table = load_table("fedftg/table1")
    configs = configs_of(study_of(table.paper, [table], "paper", 1))
    for (setting, method), config in configs.items():
        if method != "centralised":
            assert (config.data.clients, config.train.participation, config.train.rounds) == (100, 0.1, 1000)
            assert (config.local.epochs, config.local.batch_size, config.local.lr) == (5, 50, 0.1)
        assert config.model[0].name == "resnet18"
        assert config.data.name == ("cifar100" if "100" in setting else "cifar10")
        assert config.data.partition == ("iid" if "iid" in setting else "dirichlet-per-client")
    assert configs["CIFAR-100, beta 0.3", "MOON"].moon.mu == 1
    assert configs["CIFAR-10, beta 0.6", "MOON"].moon.mu == 5
    assert configs["CIFAR-10, beta 0.6", "FedFTG"].data.beta == 0.6
    assert configs["CIFAR-10, beta 0.6", "FedFTG"].method == "scaffold+fedftg"
    assert configs["CIFAR-100, iid", "FedFTG"].fedftg.noise_dim == 256


def test_tables_of_a_paper_share_their_runs() -> None:
    one, two = (load_table(f"fedftg/{name}") for name in ("table1", "table2"))
    assert {cell.run for cell in two.cells} < {cell.run for cell in one.cells}


# Choosing cells


@pytest.mark.parametrize(
    ("id", "only", "number"),
    [
        ("fedftg/table1", "cifar10", 25),  # 8 methods in 3 settings, and one centralised
        ("fedftg/table1", "beta=0.3", 16),
        ("fedftg/table1", "cifar10,beta=0.3,fedftg", 1),
        ("fedftg/table1", "fedavg, FedProx", 12),
        ("fedftg/table1", "iid,centralised", 2),
        ("fedftg/table2", "cifar100,target=50", 8),
        ("fedftg/table4", "without=hsm,without=cls", 2),
        ("fedgen/table1", "mnist,fedensemble", 3),
        ("fedgen/table1", "alpha=1,emnist", 14),  # 20 and 40 local steps
        ("feddf/table1", "C=0.2,feddf", 4),
        ("fedmd/table4", "model=3", 4),
    ],
)
def test_words_choose_cells(id: str, only: str, number: int) -> None:
    assert len(chosen(load_table(id), only)) == number


def test_words_that_choose_nothing_are_refused_with_those_there_are() -> None:
    table = load_table("fedftg/table1")
    with pytest.raises(InputError, match=r"no 'cifar11'; there are data: cifar10, cifar100; beta: iid, beta=0\.6"):
        chosen(table, "cifar11")
    with pytest.raises(InputError, match=r"no cell of fedftg/table1 is all of beta=0\.3, centralised; there are"):
        chosen(table, "beta=0.3,centralised")
    with pytest.raises(InputError, match="is all of nothing"):
        chosen(table, " , ")


def test_superclasses_are_in_the_file_of_their_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSTILL_DATA", str(tmp_path))
    assert missing_file("cifar100_superclasses") == str(tmp_path / "cifar100.npz")
    (tmp_path / "cifar100.npz").write_text("")
    assert missing_file("cifar100_superclasses") is None


def test_pooled_participants_hold_what_the_others_of_their_task_hold() -> None:
    tables = [load_table(id) for id in list_tables(paper="fedmd")]
    configs = configs_of(study_of(tables[0].paper, tables, "paper", 1))
    for task in ("CIFAR, iid", "CIFAR, non-iid"):
        apart, pooled = configs[task, "FedMD"], configs[task, "pooled"]
        assert pooled.data == apart.data.model_copy(update={"pooled": True})
        assert pooled.fedmd.public_epochs == apart.fedmd.public_epochs
    assert configs["CIFAR, non-iid", "FedMD"].data.partition == "per-subclass"


# What our side shows

CELLS: dict[str, tuple[dict[str, object], Unit]] = {
    "final": ({}, "%"),
    "round": ({"round": 2, "small_round": 1}, "%"),
    "rounds": ({"target": 75, "small_target": 30}, "rounds"),
    "top5": ({}, "%"),
    "participant": ({"participant": 1}, "fraction"),
    "gain": ({}, "points"),
    "validated": ({}, "%"),
}
METRIC: TypeAdapter[Metric] = TypeAdapter(Metric)


def sheet(
    metric: Metric, unit: Unit, seeds: Sequence[SeedRun], scale: Scale = "paper", why_not: str | None = None
) -> Sheet:
    """A table of one cell, in which the paper has 79.59 ± 1.01 and three seeds."""
    part = Part(name="a", words={}, keys={})
    cell = Cell("FedAvg", "beta 0.3", part, part, metric, unit, {}, Printed("79.59 ± 1.01", 79.59, 1.01))
    paper = load_table("fedftg/table1").paper
    table = Table("micro/table", paper, "a title", ("FedAvg",), ("beta 0.3",), (cell,), (), ())
    return Sheet.of(table, {cell.run: seeds}, scale, 3, lambda _: why_not)


def shown(kind: str, *seeds: SeedRun, scale: Scale = "paper", why_not: str | None = None) -> str:
    """What stands beside the paper's number."""
    keys, unit = CELLS[kind]
    made = sheet(METRIC.validate_python({"kind": kind, **keys}), unit, seeds, scale, why_not)
    paper, ours = made.lines(made.table.cells, made.table.columns)
    assert paper == ["FedAvg", "paper", "79.59 ± 1.01"]
    assert ours[:2] == ["", {"paper": "ours", "small": "small form"}[scale]]
    return ours[2]


def whole(seed: int, *accuracies: float, **more: list[Any]) -> SeedRun:
    """A seed that measured these test accuracies, one a round; ``more`` has more of each round."""
    records = []
    for place, accuracy in enumerate(accuracies):
        own = {name: values[place] for name, values in more.items()}
        scores = {"accuracy": accuracy, "per_client": own.get("per_client")}
        held = {"validation": {"accuracy": own["validation"]}} if "validation" in own else {}
        ensembles = {"ensembles": {"logits": own["logits"]}} if "logits" in own else {}
        records.append({"round": place + 1, "fused": {"test": scores, **held}, **ensembles})
    data = RunData(Path(), small(f"train.rounds={len(records)}"), records, "", None, {})
    return SeedRun(str(seed), "whole", data)


def test_a_mean_over_seeds_stands_with_its_deviation_and_says_what_is_missing() -> None:
    three = [whole(0, 0.5, 0.80), whole(1, 0.5, 0.82), whole(2, 0.5, 0.84)]
    assert shown("final", *three) == "82.00 ± 2.00"
    assert shown("final", *three[:2]) == "81.00 ± 1.41 (2 seeds)"
    assert shown("final", three[0], SeedRun("1", "failed", None, "failed: nan")) == "80.00 (1 seed)"


def test_without_a_whole_run_there_is_no_number() -> None:
    half = SeedRun("0", "unfinished", whole(0, 0.9).run, "unfinished, 1 of 5 rounds")
    assert shown("final") == "not run"
    assert shown("final", why_not="fedstill reads no data set 'emnist'") == "cannot run"
    assert shown("final", half) == "unfinished"
    assert shown("final", half, SeedRun("1", "failed", None, "failed: nan")) == "failed"


def test_each_metric_is_what_its_name_says() -> None:
    assert shown("round", *(whole(seed, 0.1, 0.7, 0.9) for seed in range(3))) == "70.00 ± 0.00"
    assert shown("round", whole(0, 0.7)) == "not measured (1 seed)"
    seven = whole(0, 0.6, 0.2, 0.3, 0.7, 0.5, 0.1, 0.4)
    assert shown("top5", seven) == "50.00 ± 15.81 (1 seed)"  # 30 to 70 in tens: the root of 1000 / 4
    assert shown("gain", whole(0, 0.3, 0.9, 0.55)) == "25.0 (1 seed)"
    by_client = whole(0, 0.2, 0.3, per_client=[[0.3, 0.1], [0.4, 0.25]])
    assert shown("participant", by_client) == "0.250 (1 seed)"
    assert shown("validated", whole(0, 0.1, 0.6, 0.8, validation=[0.2, 0.7, 0.7])) == "60.00 (1 seed)"


def test_rounds_to_an_accuracy_count_only_where_every_seed_gets_there() -> None:
    two, three, one = whole(0, 0.7, 0.76, 0.8), whole(1, 0.1, 0.2, 0.75), whole(2, 0.9, 0.1, 0.1)
    never = whole(2, 0.7, 0.74, 0.7)
    assert shown("rounds", two, three, one) == "2.0 ± 1.0"
    assert shown("rounds", two, three, never) == "not reached (2 of 3 seeds did)"
    assert shown("rounds", never) == "not reached (1 seed)"


def test_the_small_form_says_what_it_is_and_what_it_measures_instead() -> None:
    assert shown("rounds", whole(0, 0.2, 0.31), scale="small") == "2.0 (to 30 %, 1 seed)"
    assert shown("round", whole(0, 0.2, 0.31), scale="small") == "20.00 (round 1, 1 seed)"
    for id in list_tables():
        table = load_table(id)
        markdown = Sheet.of(table, {}, "small", 1, lambda _: None).markdown()
        assert "**Small form, not the paper's setting: " in markdown
        assert "small form | not run" in markdown
        paper = Sheet.of(table, {}, "paper", 3, lambda _: None).markdown()
        assert "Small form" not in paper
        assert "| ours | " in paper


def test_the_ensembles_five_best_rounds_are_fedensembles() -> None:
    column = [cell for cell in load_table("fedgen/table1").cells if cell.column == "FedEnsemble"]
    metric = column[0].metric
    found = whole(0, *[0.1] * 6, logits=[0.2, 0.3, 0.4, 0.5, 0.6, 0.7]).run
    assert found is not None
    assert metric.of(found, "paper") == [0.7, 0.6, 0.5, 0.4, 0.3]
    assert {cell.method.name for cell in column} == {"FedAvg"}


def test_markdown_has_both_numbers_the_reasons_and_every_deviation() -> None:
    metric = METRIC.validate_python({"kind": "final"})
    made = sheet(metric, "%", [whole(0, 0.8), SeedRun("1", "failed", None, "failed: the loss is nan")])
    lines = made.markdown().splitlines()
    assert "| FedAvg | paper | 79.59 ± 1.01 |" in lines
    assert "|  | ours | 80.00 (1 seed) |" in lines
    assert "- a, a, seed 1: failed: the loss is nan" in lines
    assert [line for line in lines if line.startswith("- Deviation: ")] == [
        f"- Deviation: {text}" for text in made.table.paper.deviations
    ]
    assert "- Cannot run: no data." in sheet(metric, "%", [], why_not="no data").markdown().splitlines()


def test_places_where_the_paper_has_nothing_stay_empty() -> None:
    table = load_table("fedftg/table1")
    lines = Sheet.of(table, {}, "paper", 3, lambda _: None).lines(table.cells, table.columns)
    assert lines[0] == ["centralised", "paper", "92.55 ± 0.05", "", "", "73.98 ± 0.26", "", ""]
    assert lines[1] == ["", "ours", "not run", "", "", "not run", "", ""]
    figure = load_table("fedftg/figure5")
    lines = Sheet.of(figure, {}, "paper", 3, lambda _: None).lines(figure.cells, figure.columns)
    assert lines[0] == ["FedAvg", "paper", "not available", "not available", "not available"]


# From end to end

MICRO = """
name = "Micro"
reference = "nobody, nowhere"
preset = "digits"
seeds = 2
deviations = ["It is no paper."]
[keys]
"model.name" = "mlp"
"data.train_samples" = 200
"data.test_samples" = 100
"data.clients" = 4
"data.server_validation" = 0
"local.epochs" = 1
"train.rounds" = 3
[small]
form = "two rounds"
keys = { "train.rounds" = 2 }
[[setting]]
name = "digits, iid"
words = { data = "digits" }
keys = { "data.partition" = "iid" }
[[method]]
name = "FedAvg"
words = { method = "fedavg" }
keys = { "method" = "fedavg" }
[[method]]
name = "FedProx"
words = { method = "fedprox" }
keys = { "method" = "fedprox" }
"""
MICRO_TABLE = """
title = "Table 1: two cells"
metric = { kind = "final" }
[[column]]
setting = "digits, iid"
[[row]]
method = "FedAvg"
values = ["12.30 ± 0.40"]
[[row]]
method = "FedProx"
values = ["not available"]
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder of a paper with one table."""
    folder = tmp_path / "papers" / "micro"
    folder.mkdir(parents=True)
    (folder / "paper.toml").write_text(MICRO, encoding="utf-8")
    (folder / "table1.toml").write_text(MICRO_TABLE, encoding="utf-8")
    return folder.parent


def test_a_table_is_run_gone_on_with_and_shown(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def plan(only: str | None = None) -> Plan:
        return Plan.of("micro/table1", only, scale="small", out=out, home=home)

    quiet = Console(quiet=True)
    assert [one.text for one in plan().sheet().cells] == ["not run", "not run"]
    assert not out.exists()
    first = carry_out(plan("fedavg"), 1, False, quiet)
    directory = out / "digits-iid" / "fedavg" / "seed-0"
    accuracy = read_metrics(directory)[-1]["fused"]["test"]["accuracy"]
    assert [one.text for one in first.cells] == [f"{100 * accuracy:.2f}", "not run"]
    made = (directory / "metrics.jsonl").stat().st_mtime_ns
    other = next(cell for cell in plan().study.cells if cell.variant == "FedProx")
    run(other.config, directory=out / other.directory)
    both = carry_out(plan(), 1, False, quiet)  # finds both runs and makes none
    assert (directory / "metrics.jsonl").stat().st_mtime_ns == made
    assert both.cells[0].text == first.cells[0].text
    assert both.cells[1].spread is not None
    written = json.loads(file_of(both.table, out, "json").read_text(encoding="utf-8"))
    assert written["form"] == "two rounds"
    assert [(cell["row"], cell["paper"]) for cell in written["cells"]] == [
        ("FedAvg", {"mean": 12.3, "deviation": 0.4}),
        ("FedProx", "not available"),
    ]
    assert written["cells"][0]["ours"]["mean"] == pytest.approx(100 * accuracy)
    assert file_of(both.table, out, "md").read_text(encoding="utf-8") == both.markdown()
    assert plan().sheet().markdown() == both.markdown()
    with pytest.raises(InputError, match=r"seed-0: this run has train\.rounds = 2, and the study says 3"):
        Plan.of("micro/table1", scale="paper", out=out, home=home).sheet()


def test_a_setting_that_is_not_there_is_refused(home: Path) -> None:
    file = home / "micro" / "table1.toml"
    file.write_text(MICRO_TABLE.replace("digits, iid", "digits, shards"), encoding="utf-8")
    with pytest.raises(InputError, match="micro/table1: there is no setting 'digits, shards'"):
        load_table("micro/table1", home)
    file.write_text(MICRO_TABLE.replace('["12.30 ± 0.40"]', "[]"), encoding="utf-8")
    with pytest.raises(InputError, match="row 'FedAvg' has 0 values for 1 columns"):
        load_table("micro/table1", home)


# The command


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["reproduce", *arguments])


def test_the_command_refuses_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSTILL_DATA", raising=False)
    for arguments, said in {
        (): "name a table or a figure: feddf/table1",
        ("fedftg/table9",): "unknown table 'fedftg/table9', did you mean 'fedftg/table",
        ("fedftg/table1", "--only", "resnet"): "there are data: cifar10, cifar100; beta: iid",
        ("fedftg/table1", "--scale", "tiny"): "unknown scale 'tiny'",
        ("fedftg/table6",): "fedstill reads no data set 'mio_tcd'",
        ("fedftg/table5",): "data are missing: $FEDSTILL_DATA/cifar10.npz; set FEDSTILL_DATA to the folder",
    }.items():
        result = command(*arguments)
        assert isinstance(result.exception, InputError)
        assert said in str(result.exception)
    monkeypatch.setenv("FEDSTILL_DATA", str(tmp_path))
    assert f"data are missing: {tmp_path / 'cifar10.npz'};" in str(command("fedftg/table5").exception)
    assert not list(tmp_path.iterdir())


def test_the_list_has_every_table_with_its_cost_and_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSTILL_DATA", raising=False)
    entries = command("--list").stdout.split("\n")
    table4 = entries.index(next(line for line in entries if line.startswith("fedftg/table4")))
    # 12 rows of 3 seeds, 500 rounds each, 10 clients in a round
    assert entries[table4 + 1].strip() == (
        "12 cells; 36 runs of 500 rounds; 18,000 rounds and 180,000 times a client's training in all"
    )
    assert entries[table4 + 2].strip() == "data: cifar10 (missing: $FEDSTILL_DATA/cifar10.npz)"
    assert [line.split()[0] for line in entries if line and not line.startswith(" ")] == list_tables()
    assert "    can be run: none; fedstill has no model 'vgg9'" in entries


def test_a_dry_run_says_what_would_be_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command("fedftg/table1", "--only", "cifar10,beta=0.3,fedftg", "--dry-run", "--out", str(out))
    lines = result.stdout.splitlines()
    assert [line.partition("  (")[0] for line in lines[:3]] == [
        f"to run: CIFAR-10, beta 0.3, FedFTG, seed {seed}" for seed in range(3)
    ]
    assert lines[3].startswith("1 cells; 3 runs to do")
    assert not out.exists()


def test_show_prints_the_chosen_cells_and_runs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = command("fedftg/table1", "--only", "cifar10,beta=0.3,fedftg", "--show", "--out", str(out))
    grid = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert grid == [
        "|  |  | CIFAR-10, beta 0.3 |",
        "| --- | --- | ---: |",
        "| FedFTG (on SCAFFOLD) | paper | 84.38 ± 0.49 |",
        "|  | ours | not run |",
    ]
    assert not out.exists()


def test_the_cost_counts_the_clients_that_a_round_has() -> None:
    config = small("data.clients=10", "train.participation=0.25", "train.rounds=7")
    assert "2 runs of 7 rounds; 14 rounds and 42 times a client's training" in cost([config], seeds=2)
