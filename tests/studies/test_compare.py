"""Figures over seeds, paired differences, targets and tables, against numbers worked out by hand."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from written import cell, line, write_index, write_run

from fedstill import cli
from fedstill.errors import InputError
from fedstill.studies.compare import Comparison, compare
from fedstill.studies.costs import Target
from fedstill.studies.statistics import Difference, Spread, paired_difference, spread, t_within, worst_decile
from fedstill.studies.tables import WIDTH, as_text, sheets

# Statistics


def test_spread_by_hand() -> None:
    assert spread([1.0, 2.0, 6.0]) == Spread(3.0, pytest.approx(math.sqrt(7)), 3)  # (4 + 1 + 9) / 2
    assert spread([0.5]) == Spread(0.5, None, 1)
    assert spread([]) is None


@pytest.mark.parametrize(
    ("degrees", "tabulated"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_quantile_as_tabulated(degrees: int, tabulated: float) -> None:
    assert round(t_within(0.95, degrees), 3) == tabulated


def test_quantile_as_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy, an independent implementation, is not installed")
    for degrees in [*range(1, 40), 999, 1000]:
        for probability in (0.5, 0.9, 0.95, 0.999):
            expected = stats.t.ppf((1 + probability) / 2, degrees)
            assert t_within(probability, degrees) == pytest.approx(expected, rel=1e-9)


def test_paired_difference_by_hand() -> None:
    ours = {"0": 2.0, "1": 4.0, "2": 6.0, "3": 100.0}
    found = paired_difference(ours, {"2": 3.0, "1": 2.0, "0": 1.0, "9": 7.0})
    # differences 1, 2, 3: mean 2, standard deviation 1; half the interval is 4.302653 / sqrt(3)
    assert found == Difference(2.0, pytest.approx(2 - 2.484138, abs=1e-6), pytest.approx(2 + 2.484138, abs=1e-6), 3)
    assert paired_difference({"0": 0.75}, {"0": 0.5}) == Difference(0.25, None, None, 1)
    assert paired_difference({"0": 0.75}, {"1": 0.5}) is None


def test_paired_difference_as_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy, an independent implementation, is not installed")
    ours, base = [0.61, 0.72, 0.55, 0.68, 0.7], [0.6, 0.65, 0.58, 0.6, 0.66]
    low, high = stats.ttest_rel(ours, base).confidence_interval(0.95)
    found = paired_difference(*(dict(zip("abcde", values)) for values in (ours, base)))
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_worst_decile() -> None:
    assert worst_decile([0.9, None, 0.1, 0.5]) == 0.1
    assert worst_decile([0.05 * k for k in range(11)]) == pytest.approx(0.025)  # two of eleven
    assert worst_decile([None]) is None


# Figures of runs


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Three seeds of a base and a variant, the third seed of the variant missing."""
    folder = tmp_path / "results"
    base = {0: [0.2, 0.4, 0.6, 0.5], 1: [0.3, 0.5, 0.7, 0.8], 2: [0.1, 0.2, 0.3, 0.4]}
    variant = {0: [0.4, 0.6, 0.6, 0.6], 1: [0.3, 0.6, 0.8, 0.7]}
    cells = []
    for name, runs in (("base", base), ("more", variant)):
        for seed in (0, 1, 2):
            cells.append(cell(name, seed, f"{name}/seed-{seed}", base="base" if name == "more" else None))
            if seed in runs:
                write_run(folder / f"{name}/seed-{seed}", runs[seed], seed=seed)
    return write_index(folder, cells)


def test_figures_by_hand(study: Path) -> None:
    ((base, more),) = (table.summaries for table in compare(study, last=2).tables)
    assert base.quantities["final"] == Spread(pytest.approx(17 / 30), pytest.approx(math.sqrt(0.13 / 3)), 3)
    assert base.quantities["best"].mean == pytest.approx((0.6 + 0.8 + 0.4) / 3)
    assert base.quantities["last_mean"].mean == pytest.approx((0.55 + 0.75 + 0.35) / 3)
    assert base.quantities["mean"].mean == pytest.approx((0.425 + 0.575 + 0.25) / 3)
    assert base.quantities["seconds"] == Spread(14.0, 0.0, 3)  # without evaluation
    assert base.quantities["megabytes_per_round"] == Spread(1.5, 0.0, 3)
    assert base.base is None
    assert base.differences == {}
    assert more.base == "base"
    # on seeds 0 and 1: final +0.1 and -0.1, mean +0.125 and +0.025; t of one degree of freedom is 12.7062
    final, mean = more.differences["final"], more.differences["mean"]
    assert (final.mean, final.n) == (pytest.approx(0), 2)
    assert final.high == pytest.approx(12.7062 * 0.1, abs=1e-5)
    assert (mean.mean, mean.low) == (pytest.approx(0.075), pytest.approx(0.075 - 12.7062 * 0.05, abs=1e-5))


def test_targets_are_medians_over_those_that_reach_them(study: Path) -> None:
    base, more = compare(study, targets=[0.5, 0.8, 0.95]).tables[0].summaries
    assert base.targets == (
        Target(0.5, 2, 3, 2.5, 3.75, 8.75),  # rounds 3 and 2
        Target(0.8, 1, 3, 4.0, 6.0, 14.0),
        Target(0.95, 0, 3, None, None, None),
    )
    assert more.targets[0] == Target(0.5, 2, 2, 2.0, 3.0, 7.0)


def test_at_equal_cost_of_the_same_costs_is_the_mean_difference(study: Path) -> None:
    more = compare(study).tables[0].summaries[1]
    assert more.differences["equal_seconds"] == more.differences["equal_megabytes"]
    assert more.differences["equal_seconds"].mean == pytest.approx(more.differences["mean"].mean)
    assert more.differences["equal_seconds"].n == 2


def test_at_equal_cost_by_hand(tmp_path: Path) -> None:
    """A round of ``slow`` takes 7 seconds, two of the base's 3.5; it is measured in the rounds 1, 2, 3 and 5."""
    slow = [
        line(at, value, seconds={"train": 4.0, "refine": 3.0}) for at, value in enumerate([0.5, 0.7, 0.6, 0, 0.9], 1)
    ]
    slow[3]["fused"] = None
    base = [line(at, value) for at, value in enumerate([0.1, 0.3, 0.5, 0.6, 0.8], 1)]
    base[3]["fused"] = None  # at 14 s halfway between 0.5 and 0.8
    for name, lines in (("slow", slow), ("base", base)):
        write_run(tmp_path / name / "seed-0", lines)
    cells = [cell(name, 0, f"{name}/seed-0", base=None if name == "base" else "base") for name in ("base", "slow")]
    found = compare(write_index(tmp_path, cells)).tables[0].summaries[1].differences
    # 7 s: 0.5 - 0.3; 14 s: 0.7 - 0.65; 21 s and 35 s are after the base's end
    assert found["equal_seconds"] == Difference(pytest.approx(0.125), None, None, 1)
    # as many bytes a round: rounds 1, 2, 3 and 5
    assert found["equal_megabytes"].mean == pytest.approx((0.4 + 0.4 + 0.1 + 0.1) / 4)


def test_at_equal_cost_needs_a_base_that_was_measured_by_then(tmp_path: Path) -> None:
    base, dear = [line(1, 0.5)], [line(1, 0.9, seconds={"train": 50.0})]
    write_run(tmp_path / "base", base)
    write_run(tmp_path / "dear", dear)
    cells = [cell("base", 0, "base"), cell("dear", 0, "dear", base="base")]
    found = compare(write_index(tmp_path, cells)).tables[0].summaries[1].differences
    assert "equal_seconds" not in found
    assert found["equal_megabytes"].mean == pytest.approx(0.4)


def test_at_equal_cost_of_nothing_there_is_no_difference(tmp_path: Path) -> None:
    for name in ("base", "more"):
        write_run(tmp_path / name, [line(at, 0.1 * at, bytes={"down": {}, "up": {}}) for at in (1, 2)])
    cells = [cell("base", 0, "base"), cell("more", 0, "more", base="base")]
    found = compare(write_index(tmp_path, cells)).tables[0].summaries[1].differences
    assert "equal_megabytes" not in found
    assert found["equal_seconds"].mean == 0


def test_curve(study: Path) -> None:
    base, more = compare(study).tables[0].summaries
    assert [band.round for band in base.curve] == [1, 2, 3, 4]
    assert base.curve[0].accuracy == Spread(pytest.approx(0.2), pytest.approx(0.1), 3)
    assert (base.curve[1].megabytes, base.curve[1].seconds) == (3.0, 7.0)
    assert more.curve[3].accuracy.n == 2


def test_refined_fused_and_ensembles(tmp_path: Path) -> None:
    ensembles = [{"uniform": 0.7, "logits": 0.6, "class_weighted": 0.9}, None, {"uniform": 0.8, "class_weighted": 0.8}]
    lines = [
        line(at, 0.1 * at, refined={"test": {"accuracy": 0.2 * at}}, **({"ensembles": one} if one else {}))
        for at, one in enumerate(ensembles, 1)
    ]
    path = write_run(tmp_path / "run", lines, "method=fedavg+fedftg")
    found = {name: one.mean for name, one in compare(path).tables[0].summaries[0].quantities.items()}
    assert found["final"] == pytest.approx(0.6)
    ends = ("fused_first", "fused_last", "refined_first", "refined_last")
    assert [found[name] for name in ends] == pytest.approx([0.1, 0.3, 0.2, 0.6])
    kinds = ("uniform", "logits", "class_weighted")
    assert [found[f"{kind}_first"] for kind in kinds] == [0.7, 0.6, 0.9]
    assert [found[f"{kind}_last"] for kind in kinds] == [0.8, 0.6, 0.8]


def test_validation_has_no_ensembles_of_the_test_set(tmp_path: Path) -> None:
    both = {"test": {"accuracy": 0.5}, "validation": {"accuracy": 0.25}, "by_client_label_mix": [0.1]}
    keys = ['eval.on=["test","validation"]', "data.server_validation=20"]
    path = write_run(tmp_path / "run", [line(1, both, ensembles={"uniform": 0.9})], *keys)
    test, validation = (compare(path, on=on).tables[0].summaries[0].quantities for on in ("test", "validation"))
    assert (test["final"].mean, validation["final"].mean) == (0.5, 0.25)
    assert {"uniform_first", "worst_decile_label_mix"} <= test.keys()
    assert not {"uniform_first", "worst_decile_label_mix"} & validation.keys()


def test_not_measured_on_these_samples(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [0.5])
    with pytest.raises(InputError, match=r"run: no accuracy on validation samples, it was measured on test"):
        compare(path, on="validation")


def test_classes_and_clients_by_hand(tmp_path: Path) -> None:
    runs = []
    for seed, (zero, two) in enumerate([(0.5, 0.3), (0.7, 0.6)]):
        scores = {
            "test": {"accuracy": 0.5, "per_class": [zero, None, two]},
            "by_client_label_mix": {"mean": 0.5, "worst_decile": zero / 2},
            "clients": {"accuracy": 0.5, "per_client": [0.9, None, zero]},
        }
        runs.append(write_run(tmp_path / str(seed), [line(1, 0.1), line(2, scores)], seed=seed))
    (found,) = compare(runs).tables[0].summaries
    assert [one and one.mean for one in found.per_class] == [pytest.approx(0.6), None, pytest.approx(0.45)]
    assert found.worst_class == 2
    assert found.quantities["worst_decile_own_samples"].mean == pytest.approx(0.6)
    assert found.quantities["worst_decile_label_mix"].mean == pytest.approx(0.3)


def test_several_architectures_by_hand(tmp_path: Path) -> None:
    """Clients 0, 1, 3 use the first model, client 2 the second."""
    parts = [([0.8, 0.4], [0.8, 0.7, 0.0, 0.6]), ([0.4, 0.0], [0.0, 0.0, 0.3, 0.0])]
    by_model = {
        str(place): {"test": {"accuracy": 0.5, "per_class": classes}, "by_client_label_mix": mix}
        for place, (classes, mix) in enumerate(parts)
    }
    path = write_run(tmp_path / "run", [line(1, {"test": {"accuracy": 0.55}, "by_model": by_model})])
    file = path / "config.toml"
    file.write_text(
        re.sub(r"\[model\][^\[]*", '[[model]]\nname="mlp"\n[[model]]\nname="cnn"\nclients=[2]\n', file.read_text())
    )
    (found,) = compare(path).tables[0].summaries
    assert [one and one.mean for one in found.per_class] == pytest.approx([0.7, 0.3])
    assert found.quantities["worst_decile_label_mix"].mean == 0.3


def test_personal_models_say_so(tmp_path: Path) -> None:
    scores = {"test": {"accuracy": 0.6, "per_client": [0.5, 0.7]}}
    path = write_run(tmp_path / "run", [line(1, scores)], "method=alone")
    (found,) = compare(path).tables[0].summaries
    assert found.quantities["worst_decile_own_models"].mean == 0.5
    assert "refined_last" not in found.quantities
    assert found.per_class == ()
    assert found.remarks == ("every client has a model of its own; accuracies are means over clients",)


def test_evaluated_now_and_then(tmp_path: Path) -> None:
    def rounds(measured: set[int]) -> list[dict[str, object]]:
        lines = [line(at, 0.1 * at) for at in (1, 2, 3, 4)]
        return [{key: one[key] for key in one if key != "fused" or one["round"] in measured} for one in lines]

    thin = write_run(tmp_path / "thin", rounds({1, 3, 4}), "eval.every=3")
    full = write_run(tmp_path / "full", rounds({1, 2, 3, 4}))
    table = compare([thin, full], last=2, targets=[0.2]).tables[0]
    found = table.summaries[0]
    assert found.quantities["mean"].mean == pytest.approx(0.8 / 3)
    assert found.quantities["last_mean"].mean == pytest.approx(0.35)
    assert found.targets[0].rounds == 3
    assert table.remarks == ("they were not all evaluated in the same rounds",)


# What can be compared


def test_other_clients_samples_are_refused_with_the_runs_and_the_key(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [0.5], "data.beta=0.1", partition="one")
    other = write_run(tmp_path / "other", [0.5], "data.beta=0.3", partition="other")
    with pytest.raises(InputError) as caught:
        compare([one, other])
    said = str(caught.value)
    assert str(one) in said
    assert str(other) in said
    assert "with data seed 0 their clients hold different samples (data.beta is 0.1 and 0.3)" in said
    assert "--anyway" in said
    table = compare([one, other], anyway=True).tables[0]
    assert len(table.summaries) == 2
    assert "compared although it should not be" in table.remarks[0]
    for form in ("terminal", "markdown", "latex", "csv"):
        assert "compared although" in as_text(compare([one, other], anyway=True), form)


def test_partitions_of_other_seeds_may_differ(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / str(seed), [0.5], seed=seed, partition=f"p{seed}") for seed in (0, 1)]
    assert compare(paths).tables[0].summaries[0].quantities["final"].n == 2


@pytest.mark.parametrize("key", ["data.name=mnist", "data.classes=[1,2]", "data.test_samples=50"])
def test_other_test_samples_are_refused(tmp_path: Path, key: str) -> None:
    paths = [write_run(tmp_path / "one", [0.5]), write_run(tmp_path / "other", [0.5], key)]
    with pytest.raises(InputError, match=f"one and .*other cannot be compared: {key.partition('=')[0]} is "):
        compare(paths)


def two(folder: Path, one: Mapping[str, object], other: Mapping[str, object], *keys: str) -> list[Path]:
    """Write two runs of one seed that differ in a learning rate, with these lines in partition.json."""
    paths = []
    for name, held in (("one", one), ("other", other)):
        paths.append(write_run(folder / name, [0.5], f"local.lr={len(name)}", *(keys if name == "other" else ())))
        (paths[-1] / "partition.json").write_text(json.dumps({"fingerprint": "same", **held}))
    return paths


def held(**samples: str) -> dict[str, object]:
    return {"data_fingerprint": {"train": "a", "test": "b", **samples}}


@pytest.mark.parametrize(
    ("other", "keys", "says"),
    [
        (held(test="c"), [], "their test samples differ (the same keys, other fingerprints)"),
        (held(train="c"), ["data.root='x'"], "their training samples differ (data.root is None and x)"),
        (held(train="c", test="c"), [], "their training samples and test samples differ (the same keys"),
        (
            {**held(train="c"), "fingerprint": "else"},
            [],
            "their training samples differ and their clients hold different samples (the same keys",
        ),
    ],
)
def test_other_samples_are_refused(tmp_path: Path, other: dict[str, object], keys: list[str], says: str) -> None:
    one, second = paths = two(tmp_path, held(), other, *keys)
    with pytest.raises(InputError) as caught:
        compare(paths)
    assert f"{one} and {second} cannot be compared: with data seed 0 {says}" in str(caught.value)
    assert len(compare(paths, anyway=True).tables[0].summaries) == 2


def test_samples_that_nothing_was_measured_on_may_differ(tmp_path: Path) -> None:
    """The public set and the server's validation part belong to a method; the test set alone is measured here."""
    paths = two(tmp_path, held(), held(public="x", validation="y"))
    assert compare(paths).tables[0].remarks == ()


def test_older_runs_without_fingerprints_are_compared_and_named(tmp_path: Path) -> None:
    paths = two(tmp_path, held(), {})
    (remark,) = compare(paths).tables[0].remarks
    assert remark == (
        f"1 of 2 runs have no fingerprint of their samples, so that only the shares were compared ({paths[1]} is one)"
    )


def planned(folder: Path, key: str, partitions: tuple[str, str]) -> Path:
    """Write a study of two variants on a grid of two points."""
    cells = []
    for value, partition in zip((1, 2), partitions):
        for variant in ("A", "B"):
            place = f"{value}/{variant}"
            cells.append(cell(variant, 0, place, point={key: value}, base="A" if variant == "B" else None))
            method = "fedavg" if variant == "A" else "scaffold"
            write_run(
                folder / place,
                [value / 10 + (variant == "B") / 4],
                f"method={method}",
                f"{key}={value}",
                partition=partition,
            )
    return write_index(folder, cells)


def test_points_with_other_data_are_tables_of_their_own(tmp_path: Path) -> None:
    found = compare(planned(tmp_path, "data.beta", ("one", "two"))).tables
    assert [(table.title, [one.label for one in table.summaries]) for table in found] == [
        ("data.beta=1", ["A", "B"]),
        ("data.beta=2", ["A", "B"]),
    ]
    assert all(table.summaries[1].differences["final"].mean == pytest.approx(0.25) for table in found)


def test_points_with_the_same_data_are_one_table_paired_point_by_point(tmp_path: Path) -> None:
    (table,) = compare(planned(tmp_path, "local.epochs", ("one", "one"))).tables
    assert table.title == ""
    rows = {one.label: (one.base, one.differences) for one in table.summaries}
    assert list(rows) == [f"local.epochs={point} / {variant}" for point in (1, 2) for variant in "AB"]
    base, differences = rows["local.epochs=2 / B"]
    assert base == "local.epochs=2 / A"
    assert differences["final"].mean == pytest.approx(0.25)
    (table,) = compare(tmp_path, baseline="local.epochs=1 / A").tables
    assert [one.differences["final"].mean for one in table.summaries[1:]] == pytest.approx([0.25, 0.1, 0.35])


def test_variants_of_one_point_with_other_data_are_refused(tmp_path: Path) -> None:
    folder = planned(tmp_path, "local.epochs", ("one", "one"))
    (folder / "2/B/partition.json").write_text('{"fingerprint": "else"}')
    with pytest.raises(InputError, match=r"2/A and .*2/B cannot be compared"):
        compare(folder)


def test_baseline(study: Path) -> None:
    base, more = compare(study, baseline="more").tables[0].summaries
    assert (base.base, more.base) == ("more", None)
    assert base.differences["mean"].mean == pytest.approx(-0.075)
    with pytest.raises(InputError, match="unknown baseline 'mor', did you mean 'more'"):
        compare(study, baseline="mor")


def test_loose_runs_differ_from_the_first(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, [0.5], f"method={name}") for name in ("scaffold", "fedavg")]
    first, other = compare(paths).tables[0].summaries
    assert (first.base, other.base) == (None, "scaffold")
    assert other.differences["final"] == Difference(0.0, None, None, 1)
    assert other.remarks == ("the difference is of one seed: no interval",)


def test_remarks_on_rounds_machines_and_versions(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", [0.5], device="x", commit="a")
    other = write_run(tmp_path / "other", [0.5, 0.6], device="y", commit="b")
    assert compare([one, other]).tables[0].remarks == (
        "the numbers of rounds differ: 1, 2",
        "seconds come from different machines",
        "made by different versions (environment.json of each run)",
    )


def test_seconds_without_a_pre_training_that_was_there_are_remarked(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / str(place), [0.5], f"method={method}", "fedmd.pretraining_cache=a")
        for place, method in enumerate(["fedmd", "fedavg"])
    ]
    said = ("seconds are without the pre-training that a run found in fedmd.pretraining_cache (its log.txt says)",)
    assert [compare(run).tables[0].remarks for run in runs] == [said, ()]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"last": 0}, "last: 0"),
        ({"last": 2.5}, "last: 2.5 rounds; name a whole number"),
        ({"targets": [70.0]}, "70 is no accuracy"),
        ({"targets": ["x"]}, "'x' is no accuracy"),
        ({"targets": 0.7}, "0.7 is no list of accuracies"),
        ({"on": "tset"}, "did you mean 'test'"),
    ],
)
def test_options_that_make_no_sense(study: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        compare(study, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("paths", [None, 5, [None]])
def test_what_is_no_path_is_refused(paths: Any) -> None:
    with pytest.raises(InputError, match=r"paths: (None|5) is no path; name run directories"):
        compare(paths)


# Tables


NASTY = r"a_b & 100% #1 {x} ~^\ $5 <y> | [z] * `w`"


@pytest.fixture
def nasty(tmp_path: Path) -> Comparison:
    names = {
        "a": "base of a rather long name",
        "b": NASTY,
        "c": "[*] third, which is quite long as names of variants go",
    }
    folder, cells = tmp_path / "results", []
    scores = {"accuracy": 0.987654321, "per_class": [0.1, None, 0.5]}
    for key, name in names.items():
        for seed in range(4):
            cells.append(cell(name, seed, f"{key}/{seed}", base=names["a"] if key != "a" else None))
            if (key, seed) != ("b", 3):
                accuracy = 0.9 if key == "a" else 0.1 + seed / 5
                lines = [line(1, accuracy), line(2, {"test": scores | {"accuracy": accuracy}})]
                write_run(folder / f"{key}/{seed}", lines, seed=seed)
    return compare(write_index(folder, cells, NASTY), targets=[0.25, 0.5])


def test_terminal_fits_120_columns_and_cuts_no_figure(nasty: Comparison) -> None:
    for everything in (False, True):
        text = as_text(nasty, "terminal", everything)
        assert max(map(len, text.splitlines())) <= WIDTH
        assert "…" not in text
    words = re.sub(r"\s+", " ", as_text(nasty, "terminal"))
    for row in sheets(nasty)[0].rows:
        assert all(figure in words for figure in row[1:])


def test_missing_seeds_are_in_every_table(nasty: Comparison) -> None:
    for sheet in sheets(nasty, everything=True):
        assert sheet.header[-1] == "seeds"
        assert [row[-1] for row in sheet.rows] == ["4", "3 of 4", "4"]
    for form in ("terminal", "markdown", "latex"):
        assert "3 of 4 seeds (seed 3 not run)" in as_text(nasty, form).replace("{[}", "[")
    assert "3 of 4 seeds (seed 3 not run)" in as_text(nasty, "csv")


def test_best_is_among_those_with_all_seeds(study: Path) -> None:
    (sheet,) = sheets(compare(study))
    assert [row[:2] for row in sheet.rows] == [["base", "56.7 ± 20.8"], ["more", "65.0 ± 7.1"]]
    assert sheet.best == set()


def test_cells_by_hand(nasty: Comparison) -> None:
    rows = sheets(nasty)[0].rows
    assert rows[0][1:] == ["90.0 ± 0.0", "90.0 ± 0.0", "90.0 ± 0.0", "", "7.0", "3.00", "4"]
    # 0.1, 0.3, 0.5, 0.7: mean 0.4, deviation 0.2582; minus 0.9, t of three degrees of freedom 3.18245
    assert rows[2][1] == "40.0 ± 25.8"
    assert rows[2][4] == "-50.0 [-91.1, -8.9]"
    first = sheets(nasty)[1]
    assert first.title.startswith("to 25 %")
    assert [row[1:5] for row in first.rows] == [
        ["1", "1.50", "3.5", "4 of 4"],
        ["1", "1.50", "3.5", "2 of 3"],
        ["1", "1.50", "3.5", "3 of 4"],
    ]


def test_csv_comes_back_unrounded(nasty: Comparison) -> None:
    rows = list(csv.DictReader(StringIO(as_text(nasty, "csv"))))
    assert len(rows) == 3
    for row, summary in zip(rows, nasty.tables[0].summaries):
        assert row["group"] == summary.label
        assert float(row["final_mean"]) == summary.quantities["final"].mean
        assert float(row["final_std"]) == summary.quantities["final"].std
        assert (row["seeds"], row["seeds_planned"]) == (str(len(summary.group.whole)), "4")
        assert float(row["class_2_mean"]) == 0.5
        assert (row["class_1_mean"], row["worst_class"]) == ("", "0")
        assert row["refined_last_mean"] == ""
    assert rows[2]["base"] == "base of a rather long name"
    assert float(rows[2]["final_difference_low"]) == nasty.tables[0].summaries[2].differences["final"].low
    assert (rows[2]["reached_0.5"], rows[2]["rounds_to_0.25"]) == ("2", "1.0")


def test_csv_has_a_column_for_each_key(tmp_path: Path) -> None:
    rows = list(csv.DictReader(StringIO(as_text(compare(planned(tmp_path, "data.beta", ("1", "2"))), "csv"))))
    assert [(row["data.beta"], row["variant"]) for row in rows] == [("1", "A"), ("1", "B"), ("2", "A"), ("2", "B")]


def test_markdown_rows_have_one_width(nasty: Comparison) -> None:
    lines = [text for text in as_text(nasty, "markdown").splitlines() if text.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", text) for text in lines]
    assert {len(row) for row in cells[:5]} == {10}
    assert r"a_b & 100% #1 {x} ~^\\ $5 \<y\> \| [z] \* \`w\`" in lines[3]


def test_latex_names_are_escaped(nasty: Comparison) -> None:
    text = as_text(nasty, "latex", everything=True)
    assert (
        r"a\_b \& 100\% \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{} \$5 \textless{}y\textgreater{} "
        r"\textbar{} {[}z{]} {*} `w` &"
    ) in text
    assert r"$-$50.0 {[}$-$91.1, $-$8.9{]}" in text
    assert r"40.0 $\pm$ 25.8" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here: pdflatex is not on the path")
def test_latex_compiles(nasty: Comparison, tmp_path: Path) -> None:
    body = as_text(nasty, "latex", everything=True)
    document = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{body}\\end{{document}}\n"
    (tmp_path / "table.tex").write_text(document)
    told = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout[-2000:]


# The command


def told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", ["fedstill", "compare", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    shown = capsys.readouterr()
    return caught.value.code, shown.out, shown.err


def test_command(study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(monkeypatch, capsys, str(study), "--last", "2")
    assert code == 0
    assert "56.7 ± 20.8" in out
    assert 80 < max(map(len, out.splitlines())) <= WIDTH  # whatever the width of what is no terminal
    code, out, _ = told(monkeypatch, capsys, str(study), "--format", "csv", "--targets", "0.5", "0.8")
    assert [row["reached_0.8"] for row in csv.DictReader(StringIO(out))] == ["1", "1"]
    file = study / "table.tex"
    code, out, _ = told(monkeypatch, capsys, str(study), "--out", str(file))
    assert (code, out) == (0, f"the comparison is in {file}\n")
    assert r"\toprule" in file.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "cvs"], "did you mean 'csv'"),
        (["--targets", "70"], "70 is no accuracy"),
        (["--targets", "high"], "could not convert"),
        (["--baseline", "nobody"], "unknown baseline 'nobody'"),
        (["--out", "study.json/x.csv"], "cannot be written"),
    ],
)
def test_command_refuses_in_one_line(
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(study)
    code, out, err = told(monkeypatch, capsys, ".", *options)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
