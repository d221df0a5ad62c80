"""Every reference case against fedstill: each has a replay, or stands in the table of what is not built."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch

from fedstill.conformance.replays import REPLAYS, Case, Disagrees, folder
from fedstill.conformance.runner import named
from fedstill.conformance.subject import Subject
from fedstill.methods.registry import BASES, REFINEMENTS

NOT_BUILT: dict[str, str] = {}
"""Case -> the method or partition it waits for. Such a case is not run and not shown as a test."""
NOT_COMPARED: dict[str, set[str]] = {
    "partition_feddyn": {"out/priors"},
    "partition_feddyn_unbalanced": {"out/priors"},
    "partition_multinomial": {"out/priors"},
    "partition_per_class_0": {"out/attempts", "out/first_attempt_proportions"},
    "partition_per_class_1": {"out/attempts", "out/first_attempt_proportions"},
    "partition_feddf": {"out/raw_sizes"},
    "fedftg_labels": {f"out/labels_{vector}" for vector in range(9)},
    "fedftg_loss_terms": {"out/diversity_l2", "out/diversity_cosine"},
}
"""Recorded numbers that no replay looks at: what partitions go through on their way, the order of a shuffle, and two
forms of a loss that the authors' code has and does not use."""


def found() -> list[str]:
    """Return the names of the cases in the folder."""
    return sorted(path.stem for path in folder().glob("*.json"))


def faults(cases: Collection[str], replayed: Collection[str], not_built: Collection[str]) -> list[str]:
    """Say where the folder, the replays and the table disagree."""
    if not cases:
        return [f"no reference case in {folder()}"]
    known = {*replayed, *not_built}
    return [
        *(f"{name}: neither a replay nor an entry in NOT_BUILT" for name in sorted({*cases} - known)),
        *(f"{name}: known here, but its file is missing" for name in sorted(known - {*cases})),
        *(f"{name}: it has a replay and stands in NOT_BUILT" for name in sorted({*replayed} & {*not_built})),
    ]


def summary(ran: int) -> str:
    """Return the line for the end of the test run."""
    waiting = ", ".join(sorted(set(NOT_BUILT.values()), key=str.lower))
    wait = f", {len(NOT_BUILT)} wait for what is not built yet: {waiting}" if NOT_BUILT else ""
    return f"golden: {ran} of {len(found())} cases run{wait}"


def built_in(family: str | None) -> Subject:
    """Return the built-in method of a family; a partition looks at none."""
    name = family or "fedavg"
    return named(f"+{name}" if name in REFINEMENTS else name, None, {})[0]


@pytest.mark.parametrize("name", [name for name in found() if name not in NOT_BUILT])
def test_case(name: str) -> None:
    assert name in REPLAYS, f"{name}: no replay, and not in NOT_BUILT"
    case = Case.load(name, folder())
    REPLAYS[name].run(case, built_in(REPLAYS[name].family))
    recorded = {key for key in case.arrays if key.startswith("out/")}
    assert recorded - case.compared == NOT_COMPARED.get(name, set())


def test_every_case_has_a_replay_or_waits() -> None:
    assert not faults(found(), REPLAYS, NOT_BUILT)
    assert {replay.family for replay in REPLAYS.values()} <= {None, *BASES, *REFINEMENTS}
    assert {name for name, replay in REPLAYS.items() if replay.family is None} == {
        name for name in REPLAYS if name.startswith("partition_")
    }


def test_every_case_has_its_arrays() -> None:
    assert [name for name in found() if not (folder() / f"{name}.npz").is_file()] == []


@pytest.mark.parametrize(
    ("cases", "replayed", "not_built", "says"),
    [
        ([], ["a"], [], "no reference case"),
        (["a", "b"], ["a"], [], "b: neither"),
        (["a"], ["a", "b"], [], "b: known here"),
        (["a"], ["a"], ["b"], "b: known here"),
        (["a"], ["a"], ["a"], "a: it has a replay and"),
    ],
)
def test_the_bookkeeping_sees(cases: list[str], replayed: list[str], not_built: list[str], says: str) -> None:
    assert [fault for fault in faults(cases, replayed, not_built) if fault.startswith(says)]


def test_a_missing_folder_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSTILL_GOLDEN", "/nowhere/at/all")
    assert folder() == Path("/nowhere/at/all")
    assert faults(found(), REPLAYS, NOT_BUILT)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("local_fedavg", "out/w_after_step"),
        ("local_scaffold", "in/c_k"),
        ("local_feddyn", "in/h_k"),
        ("local_moon_official_buffer2", "in/w_prev"),
        ("server_scaffold", "out/c_k"),
        ("server_feddyn_bn", "out/h"),
        ("server_fedprox", "out/w_all"),
        ("fedgen_user", "out/label_counts"),
        ("fedgen_generator", "in/eps"),
        ("fedmd_rounds", "out/consensus"),
        ("fedftg_labels", "out/label_counts_3"),
        ("feddf_distill_weighted", "in/weights"),
        ("partition_feddf", "out/sizes"),
    ],
)
def test_a_number_that_is_another_one_is_seen(name: str, key: str) -> None:
    case = Case.load(name, folder())
    first = case.arrays[key].flat[0]
    case.arrays[key].flat[0] = first + 1 if first.dtype.kind == "i" else 1.01 * first + 0.01
    with pytest.raises(Disagrees):
        REPLAYS[name].run(case, built_in(REPLAYS[name].family))


@pytest.mark.parametrize(
    ("value", "says"), [([1.0, 2.1], "is 0.1 from"), ([1.0, math.nan], "is nan from"), ([1.0], "has the shape")]
)
def test_a_comparison_by_hand(value: list[float], says: str) -> None:
    tolerance = {"default": {"rtol": 0.01, "atol": 0.03}}
    case = Case("mine", {"tolerance_float64": tolerance}, {"out/w": np.array([1.0, 2.0])})
    case.agrees("out/w", torch.tensor([1.0, 2.025]).double())
    assert case.apart == pytest.approx(0.5, rel=1e-5)  # 0.025 of 0.03 + 0.01 * 2
    with pytest.raises(Disagrees, match=says):
        case.agrees("out/w", np.array(value))
