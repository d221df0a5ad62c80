"""What the table and the picture make of numbers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from fedstill.report import Bound, Curve, draw_curves, markdown, reading
from fedstill.report.curves import spread, styles

CURVES = [
    Curve("plain", {1: 0.5, 2: 0.9}, 10.0, 1.0, 2.0),
    Curve("plain, better", {1: 0.75, 2: 0.85}, 12.0, 3.0, 2.0, base="plain"),
    Curve("other", {1: 0.75, 2: 0.8}, 9.0, 0.0, 4.0),
    Curve("other, better", {1: 0.7, 2: 0.89}, 9.0, 0.0, 4.0, base="other"),
]
BOUNDS = [Bound("alone", {1: 0.2, 2: 0.3}, "floor"), Bound("together", {1: 0.95}, "ceiling")]


def test_figures_of_a_curve() -> None:
    plain = CURVES[0]
    assert (plain.first, plain.last, plain.mean) == (0.5, 0.9, pytest.approx(0.7))
    assert [plain.rounds_to(goal) for goal in (0.4, 0.9, 0.91)] == [1, 2, None]


def test_curve_of_records() -> None:
    def record(round: int, fused: float, refined: float) -> dict[str, object]:
        return {
            "round": round,
            "fused": {"test": {"accuracy": fused}},
            "refined": {"test": {"accuracy": refined}},
            "seconds": {"train": 2.0, "fuse": 0.5, "refine": 1.0, "evaluate": 9.0},
            "bytes": {"down": {"weights": 1_000_000}, "up": {"weights": 500_000}},
        }

    curve = Curve.of("name", [record(1, 0.1, 0.2), record(2, 0.3, 0.4)])
    assert curve == Curve("name", {1: 0.2, 2: 0.4}, 7.0, 3.0, 3.0)


def test_reading_says_who_leads_and_what_is_gained() -> None:
    said = reading(CURVES, BOUNDS)
    assert "After round 1 plain, better and other lead with 75.0%" in said
    assert "after round 2 plain leads with 90.0%" in said
    assert "plain, better +25.0, -5.0; other, better -5.0, +9.0" in said
    assert "5.0 points below the highest ceiling (together)" in said
    assert "\n" not in said


def test_markdown_rows_have_one_width() -> None:
    rows = [line for line in markdown(CURVES, BOUNDS, "title").splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(CURVES) + len(BOUNDS)
    assert {row.count("|") for row in rows} == {9}
    assert "| plain, better | 75.0% | 85.0% | 80.0% | never | 12.0 | 3.0 | 2.0 |" in rows


def test_labels_are_kept_apart_in_order_and_inside() -> None:
    wanted = [0.1, 0.11, 0.5, 0.97, 0.98, 1.0]
    placed = spread(wanted, 0.05)
    assert all(upper - lower > 0.05 - 1e-9 for lower, upper in pairwise(placed))
    assert placed[0] == pytest.approx(0.08)
    assert placed[2] == 0.5
    assert placed[-1] <= 1


def test_a_change_looks_alike_on_every_base() -> None:
    plain, better, other, other_better = styles(CURVES)
    assert (better.dashes, better.marker) == (other_better.dashes, other_better.marker)
    assert plain.marker == other.marker != better.marker
    assert len({style.colour for style in (plain, better, other, other_better)}) == 4


def test_picture_of_one_round(tmp_path: Path) -> None:
    draw_curves([Curve("only", {3: 1.0}, 1.0, 0.0, 1.0)], [], tmp_path / "one.png", "one round")
    assert (tmp_path / "one.png").stat().st_size > 1000
