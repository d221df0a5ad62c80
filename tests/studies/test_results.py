"""Run directories and studies read back, damaged and unfinished ones too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from written import cell, line, write_index, write_run

import fedstill
from fedstill.config import flat
from fedstill.errors import InputError
from fedstill.studies.compare import compare, figures_of, per_class
from fedstill.studies.results import groups, read, read_run, read_study
from small import small

SHARED = {"final", "best", "last_mean", "mean", "seconds", "megabytes", "seconds_per_round", "megabytes_per_round"}
SHARED |= {"fused_first", "fused_last"}
REFINED = {"refined_first", "refined_last"}
CEILINGS = {
    f"{kind}_{when}"
    for kind in ("uniform", "logits", "class_weighted", "beside_ensembles")
    for when in ("first", "last")
}
MIX, MODELS, HELD = "worst_decile_label_mix", "worst_decile_own_models", "worst_decile_own_samples"
PUBLIC = ["public.name=digits", "public.samples=60"]
SHAPES = {
    "fedavg": ([], SHARED | CEILINGS | {MIX}, 10),
    "fedprox": ([], SHARED | CEILINGS | {MIX}, 10),
    "scaffold": ([], SHARED | CEILINGS | {MIX}, 10),
    "feddyn": (['eval.models=["sel","all"]'], SHARED | CEILINGS | {MIX}, 10),
    "moon": ([], SHARED | CEILINGS | {MIX}, 10),
    "fedgen": ([], SHARED | CEILINGS | {MIX}, 10),
    "feddistill": ([], SHARED | {MODELS}, 0),
    "fedmd": ([*PUBLIC, "fedmd.public_epochs=1", "fedmd.private_epochs=1"], SHARED | {MODELS}, 0),
    "alone": (["data.client_test=0.2", 'eval.on=["test","clients"]'], SHARED | {MODELS, HELD}, 0),
    "fedavg+fedftg": (
        ["data.client_test=0.2", 'eval.on=["test","clients"]'], SHARED | REFINED | CEILINGS | {MIX, HELD}, 10
    ),
    "fedavg+feddf": (
        [*PUBLIC, "feddf.steps=2", "feddf.batch_size=20", "data.server_validation=20"],
        SHARED | REFINED | CEILINGS | {MIX}, 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", SHAPES)
def test_record_of_every_method(tmp_path: Path, method: str) -> None:
    keys, quantities, classes = SHAPES[method]
    result = fedstill.run(small(f"method={method}", *keys), directory=tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.whole
    assert run.records == json.loads(json.dumps(result.records))
    assert run.partition == result.federation.partition.fingerprint
    assert run.data is not None
    assert set(run.data) >= {"train", "test"}
    assert run.data == result.federation.data_fingerprints
    assert flat(run.config) == flat(result.config)
    assert run.remarks == ()
    figures = figures_of(run, "test", 5)
    assert set(figures) == quantities
    assert figures["final"] == result.accuracies()[2]
    assert len(per_class(run, "test")) == classes


def test_record_of_several_architectures(tmp_path: Path) -> None:
    keys = ["method=fedavg+fedftg", "fedftg.inputs=noise", "fedftg.lambda_md=0.0"]
    config = {**small(*keys).model_dump(mode="json"), "model": [{"name": "mlp"}, {"name": "mlp", "hidden": [16]}]}
    fedstill.run(config, directory=tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert set(figures_of(run, "test", 5)) == SHARED | REFINED | CEILINGS | {MIX}
    assert len(per_class(run, "test")) == 10


def test_costs_leave_evaluation_out(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [0.5, 0.6]))
    assert (run.seconds, run.megabytes) == (7.0, 3.0)


# Damage


def test_last_line_that_was_cut_short(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [0.5, 0.6, 0.7])
    file = path / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    run = read_run(path)
    assert [record["round"] for record in run.records] == [1, 2]
    assert not run.whole
    assert run.remarks == (f"{file}: its last line was cut short and is left out",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "metrics.jsonl: no whole round is there yet"),
        ('{"round": 1, "fu', "metrics.jsonl: no whole round is there yet"),
        ("what\n" + json.dumps(line(1, 0.5)) + "\n", "metrics.jsonl:1: damaged line"),
        ("3\n", "metrics.jsonl:1: not a round's metrics"),
        ('{"round": 1}\n', "metrics.jsonl:1: not a round's metrics (bytes:"),
        (json.dumps(line(1, {"test": {}})) + "\n", "metrics.jsonl:1: not a round's metrics (fused.test.accuracy:"),
        (json.dumps(line(2, 0.5)) + "\n", "metrics.jsonl:1: round 2 stands where round 1 belongs"),
    ],
)
def test_metrics_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    path = write_run(tmp_path / "run", [0.5])
    (path / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError) as caught:
        read_run(path)
    assert said in str(caught.value)


def test_files_that_are_missing(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [0.5])
    (path / "environment.json").unlink()
    assert read_run(path).environment == {}
    (path / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="no whole round"):
        read_run(path)
    (path / "partition.json").write_text("[]")
    with pytest.raises(InputError, match=r"partition\.json: damaged"):
        read_run(path)
    (path / "partition.json").write_text('{"fingerprint": "x", "data_fingerprint": "y"}')
    with pytest.raises(InputError, match=r"partition\.json: damaged, its data_fingerprint is no table"):
        read_run(path)
    with pytest.raises(InputError, match="not a run directory"):
        read([tmp_path])
    with pytest.raises(InputError, match="nothing to compare"):
        read([])


# Loose runs


def test_runs_of_another_precision_are_no_seeds_of_one_group(tmp_path: Path) -> None:
    fine = write_run(tmp_path / "fine", [0.5], "execution.precision=float32")
    coarse = write_run(tmp_path / "coarse", [0.5], "execution.precision=bf16", seed=1)
    assert [group.name for group in read([fine, coarse]).groups] == [
        "fedavg, execution.precision=float32",
        "fedavg, execution.precision=bf16",
    ]


def test_runs_that_differ_in_seed_alone_are_a_group(tmp_path: Path) -> None:
    keys = ["method=fedavg+fedftg", "fedftg.mode=tuned"]
    paths = [
        write_run(tmp_path / "a0", [0.5, 0.6], "data.root=/here", "checkpoint.keep=1"),
        write_run(tmp_path / "b0", [0.5, 0.6], *keys),
        write_run(tmp_path / "a1", [0.5, 0.6], "execution.workers=3", seed=1),
        write_run(tmp_path / "b7", [0.5], *keys, "train.rounds=2", seed=7),
    ]
    found = {group.name: [(one.seed, one.state) for one in group.seeds] for group in read(paths).groups}
    assert found == {
        "fedavg": [("0", "whole"), ("1", "whole"), ("7", "missing")],
        "fedavg+fedftg, fedftg.mode=tuned": [("0", "whole"), ("1", "missing"), ("7", "unfinished")],
    }


def test_labels_say_what_differs_and_leave_out_what_a_mode_sets(tmp_path: Path) -> None:
    ftg = "method=fedavg+fedftg"
    paths = [
        write_run(tmp_path / "a", [0.5], "local.lr=0.1"),
        write_run(tmp_path / "b", [0.5], "local.lr=0.2"),
        write_run(tmp_path / "c", [0.5], ftg, "local.lr=0.1"),
        write_run(tmp_path / "d", [0.5], ftg, "fedftg.mode=tuned", "fedftg.iterations=7", "local.lr=0.1"),
    ]
    assert [group.name for group in read(paths).groups] == [
        "fedavg, local.lr=0.1",
        "fedavg, local.lr=0.2",
        "fedavg+fedftg, local.lr=0.1, fedftg.iterations=2, fedftg.mode=paper",
        "fedavg+fedftg, local.lr=0.1, fedftg.iterations=7, fedftg.mode=tuned",
    ]


def test_keys_of_other_methods_tell_where_nothing_else_does(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / mu, [0.5], f"fedprox.mu={mu}") for mu in ("0.1", "0.2")]
    assert [group.name for group in read(paths).groups] == ["fedavg, fedprox.mu=0.1", "fedavg, fedprox.mu=0.2"]


def test_a_seed_twice(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", [0.5], "execution.executor=serial")
    other = write_run(tmp_path / "other", [0.5], "execution.executor=threads")
    assert [group.name for group in read([first, other]).groups] == [
        "fedavg, execution.executor=serial",
        "fedavg, execution.executor=threads",
    ]
    again = write_run(tmp_path / "again", [0.6], "execution.executor=serial")
    with pytest.raises(InputError, match=r"first and .*again are the same experiment with the same seed"):
        read([first, other, again])
    with pytest.raises(InputError, match="same experiment"):
        groups([read_run(first), read_run(first)])


def test_data_and_training_seeds_that_differ(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", [0.5], "seed.train=4", seed=3)
    assert [one.seed for one in read([path]).groups[0].seeds] == ["3/4"]


# Studies


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    write_run(folder / "a/seed-0", [0.5, 0.6])
    write_run(folder / "a/seed-1", [0.5], "train.rounds=2", seed=1)
    write_run(folder / "a/seed-2", [0.5], "train.rounds=2", seed=2)
    (folder / "a/seed-2/failed.txt").write_text("round 2: the fused model\nis not finite\n")
    (folder / "a/seed-3").mkdir()
    write_run(folder / "a/seed-4", [], seed=4)
    return write_index(folder, [cell("A", seed, f"a/seed-{seed}") for seed in range(6)])


def test_what_a_study_has_not_got_is_there_with_its_reason(study: Path) -> None:
    (group,) = read_study(study).groups
    assert [(one.seed, one.state, one.reason) for one in group.seeds] == [
        ("0", "whole", ""),
        ("1", "unfinished", "unfinished, 1 of 2 rounds"),
        ("2", "failed", "failed: round 2: the fused model is not finite"),
        ("3", "unfinished", "unfinished, no round yet"),
        ("4", "unfinished", "unfinished, no round yet"),
        ("5", "missing", "not run"),
    ]
    assert list(group.whole) == ["0"]


def test_of_an_unexpected_error_the_last_line_is_shown(study: Path) -> None:
    file = study / "a/seed-2/failed.txt"
    file.write_text("in a worker process:\nTraceback (most recent call last):\n  File x\nValueError: no [more]\n")
    seed = read_study(study).groups[0].seeds[2]
    assert seed.reason == f"failed: ValueError: no [more]; {file} has the whole traceback"


def test_a_whole_run_is_not_failed(study: Path) -> None:
    (study / "a/seed-0/failed.txt").write_text("an earlier try")
    assert read_study(study).groups[0].seeds[0].state == "whole"


def test_study_by_its_file(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.parent)
    file = Path("mine.toml")
    with pytest.raises(InputError, match=r"mine\.toml: there is no such file"):
        read([file])
    file.write_text("")
    with pytest.raises(InputError, match=r"mine\.toml: no results in runs/mine"):
        read([file])
    (study / "study.toml").write_text("")
    assert read([study / "study.toml"]).title == "a study"
    Path("runs").mkdir()
    study.rename("runs/mine")
    assert read([file]).title == "a study"
    with pytest.raises(InputError, match="a study is compared alone"):
        read([file, file])


def test_damaged_index(study: Path) -> None:
    for text in ("", "[]", '{"title": "x", "cells": []}', '{"title": "x", "cells": [{"variant": "A"}]}'):
        (study / "study.json").write_text(text)
        with pytest.raises(InputError, match=r"study\.json: "):
            read_study(study)


def test_damaged_run_of_a_study(study: Path) -> None:
    (study / "a/seed-1/metrics.jsonl").write_text("no\nno\n")
    with pytest.raises(InputError, match=r"seed-1/metrics\.jsonl:1: damaged line"):
        read_study(study)


def test_a_variants_own_grid_makes_groups_of_its_own(tmp_path: Path) -> None:
    both = {"data.beta": 0.1}
    index = [cell("A", 0, "a", point=both)]
    index += [cell("B", 0, f"b{mu}", point={**both, "fedprox.mu": mu}, base="A") for mu in (0.1, 1.0)]
    found = read_study(write_index(tmp_path / "results", index)).groups
    assert [(group.name, group.variant, group.point, group.own) for group in found] == [
        ("A", "A", both, {}),
        ("B, fedprox.mu=0.1", "B", both, {"fedprox.mu": 0.1}),
        ("B, fedprox.mu=1.0", "B", both, {"fedprox.mu": 1.0}),
    ]


def test_nothing_finished(study: Path) -> None:
    (study / "a/seed-0/metrics.jsonl").unlink()
    with pytest.raises(InputError, match="no run is finished; A, seed 0: unfinished, no round yet"):
        compare(study)
