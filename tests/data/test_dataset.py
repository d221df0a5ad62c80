from __future__ import annotations

import numpy as np
import pytest

from fedstill.build import build
from fedstill.data import RawDataSet, load_dataset, load_raw
from fedstill.errors import InputError
from small import small


def five() -> RawDataSet:
    """Ten training and five test images of one pixel, whose value is 10 times the label plus the position."""
    train, test = np.array([0, 1, 2, 3, 4, 4, 3, 2, 1, 0]), np.array([4, 3, 2, 1, 0])
    images = [(10 * y + np.arange(len(y))).astype(np.uint8).reshape(-1, 1, 1) for y in (train, test)]
    return RawDataSet("five", images[0], train, images[1], test, tuple("abcde"), (0.0,), (1.0,), 1.0)


def test_only_some_classes_renumbered_in_the_order_given() -> None:
    chosen = five().only([3, 0])
    assert chosen.class_names == ("d", "a")
    assert chosen.num_classes == 2
    assert chosen.train().x.flatten().tolist() == [0, 33, 36, 9]
    assert chosen.train().y.tolist() == [1, 0, 0, 1]
    assert chosen.test().x.flatten().tolist() == [31, 4]
    assert chosen.test().y.tolist() == [0, 1]
    assert chosen.y_train.dtype == np.int64


def test_all_classes_in_their_order_change_nothing() -> None:
    raw, same = five(), five().only(range(5))
    assert np.array_equal(raw.x_train, same.x_train)
    assert np.array_equal(raw.y_test, same.y_test)


def test_what_is_held_out_shrinks_with_the_set() -> None:
    raw, pair = load_raw("digits"), load_raw("digits", classes=[7, 2])
    samples = int((raw.y_train == 7).sum() + (raw.y_train == 2).sum())
    assert len(pair.y_train) == samples == 356
    assert pair.held_out == 79  # 397 of 1797 are 22.1 %
    assert (pair.mean, pair.std, pair.class_names) == (raw.mean, raw.std, ("7", "2"))
    assert load_dataset("digits", classes=[7, 2]).num_classes == 2


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (
            [0, 5, 7],
            r"classes \[0, 5, 7\] of five: name 2 or more of 0 to 4, each once, which 5 is not; correct data\.cl",
        ),
        ([-1, 0], "which -1 is not"),
        ([1, 2, 1], "each once, which 1 is not"),
        ([3], "of five: name 2 or more of 0 to 4, each once; correct"),
        ([], "of five: name 2 or more of 0 to 4, each once; correct"),
    ],
)
def test_classes_that_cannot_be(classes: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        five().only(classes)


def test_an_experiment_on_some_classes_knows_no_others() -> None:
    federation, _ = build(small("data.classes=[8, 3, 5]", "data.partition=per-class", "data.samples_per_class=4"))
    assert federation.partition.counts.tolist() == [[4, 4, 4]] * 4
    assert federation.info.num_classes == 3
    with pytest.raises(InputError, match=r"of digits.* which 10 is not; correct data\.classes"):
        build(small("data.classes=[8, 10]"))
