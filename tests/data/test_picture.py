from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedstill.data import draw_partition
from fedstill.errors import InputError


@pytest.mark.parametrize(
    ("clients", "classes", "file"), [(1, 2, "a.png"), (10, 10, "b.svg"), (100, 10, "c.png"), (100, 100, "d.PNG")]
)
def test_a_picture_is_written(tmp_path: Path, clients: int, classes: int, file: str) -> None:
    counts = np.random.default_rng(0).poisson(2.0, (clients, classes))
    names = [f"kind <{label}>" for label in range(classes)]
    draw_partition(counts, names, tmp_path / file, "a title")
    head = (tmp_path / file).read_bytes()[:200]
    assert b"\x89PNG" in head or b"<?xml" in head


def test_the_picture_leaves_no_pyplot_state(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    draw_partition(np.eye(3, dtype=np.int64), ["a", "b", "c"], tmp_path / "p.png", "t")
    assert plt.get_fignums() == []


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        draw_partition(np.eye(2, dtype=np.int64), ["a", "b"], tmp_path / "p.gif", "t")
