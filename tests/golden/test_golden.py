"""Every reference case against fedstill: each has a check, or stands in the table of what is not built."""

from __future__ import annotations

from collections.abc import Collection

import check_feddf
import check_feddyn
import check_fedftg
import check_fedgen
import check_fedmd
import check_local
import check_moon
import check_partitions
import check_server
import pytest
import registry

CHECK_MODULES = (
    check_feddf,
    check_feddyn,
    check_fedftg,
    check_fedgen,
    check_fedmd,
    check_local,
    check_moon,
    check_partitions,
    check_server,
)
"""Importing them fills ``registry.CHECKS``."""

NOT_BUILT: dict[str, str] = {}
"""Case -> the method or partition it waits for. Such a case is not run and not shown as a test."""


def found() -> list[str]:
    """Return the names of the cases in the folder."""
    return sorted(path.stem for path in registry.folder().glob("*.json"))


def faults(cases: Collection[str], checked: Collection[str], not_built: Collection[str]) -> list[str]:
    """Say where the folder, the checks and the table disagree."""
    if not cases:
        return [f"no reference case in {registry.folder()}"]
    known = {*checked, *not_built}
    return [
        *(f"{name}: neither a check nor an entry in NOT_BUILT" for name in sorted({*cases} - known)),
        *(f"{name}: known here, but its file is missing" for name in sorted(known - {*cases})),
        *(f"{name}: it has a check and stands in NOT_BUILT" for name in sorted({*checked} & {*not_built})),
    ]


def summary(ran: int) -> str:
    """Return the line for the end of the test run."""
    waiting = ", ".join(sorted(set(NOT_BUILT.values()), key=str.lower))
    wait = f", {len(NOT_BUILT)} wait for what is not built yet: {waiting}" if NOT_BUILT else ""
    return f"golden: {ran} of {len(found())} cases run{wait}"


@pytest.mark.parametrize("name", [name for name in found() if name not in NOT_BUILT])
def test_case(name: str) -> None:
    assert name in registry.CHECKS, f"{name}: no check, and not in NOT_BUILT"
    registry.CHECKS[name](registry.load(name))


def test_every_case_has_a_check_or_waits() -> None:
    assert not faults(found(), registry.CHECKS, NOT_BUILT)


def test_every_case_has_its_arrays() -> None:
    assert [name for name in found() if not (registry.folder() / f"{name}.npz").is_file()] == []


@pytest.mark.parametrize(
    ("cases", "checked", "not_built", "says"),
    [
        ([], ["a"], [], "no reference case"),
        (["a", "b"], ["a"], [], "b: neither"),
        (["a"], ["a", "b"], [], "b: known here"),
        (["a"], ["a"], ["b"], "b: known here"),
        (["a"], ["a"], ["a"], "a: it has a check and"),
    ],
)
def test_the_bookkeeping_sees(cases: list[str], checked: list[str], not_built: list[str], says: str) -> None:
    assert [fault for fault in faults(cases, checked, not_built) if fault.startswith(says)]


def test_a_missing_folder_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSTILL_GOLDEN", "/nowhere/at/all")
    assert faults(found(), registry.CHECKS, NOT_BUILT)
