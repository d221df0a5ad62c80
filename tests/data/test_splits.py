from __future__ import annotations

import numpy as np
import pytest
import torch

from fedstill.data import RawDataSet, Splits, load_raw, split
from fedstill.errors import InputError

DIGITS = load_raw("digits")


def numbered(train: int = 100, test: int = 40) -> RawDataSet:
    """Images whose first two pixels say which sample they are: (part, number)."""
    images = np.zeros((train + test, 2, 2), np.uint8)
    images[train:, 0, 0] = 1
    images[:, 0, 1] = [*range(train), *range(test)]
    labels = np.zeros(train + test, np.int64)
    return RawDataSet(
        "numbered", images[:train], labels[:train], images[train:], labels[train:], ("a",), (0.0,), (1.0,), 1.0
    )


def numbers(x: torch.Tensor) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in x[:, 0, 0].tolist()]


def take(raw: RawDataSet, train: int | None = None, test: int | None = None, val: int = 0, seed: int = 0) -> Splits:
    return split(raw, train_samples=train, test_samples=test, server_validation=val, seed=seed)


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [((1200, None, 200), (1200, 200, 397)), ((None, None, 0), (1400, 0, 397)), ((300, 97, 0), (300, 0, 97))],
)
def test_digits_are_cut_as_asked(asked: tuple[int | None, int | None, int], sizes: tuple[int, int, int]) -> None:
    parts = take(DIGITS, *asked)
    assert (len(parts.train), len(parts.server_validation), len(parts.test)) == sizes
    assert parts.server_validation.x.shape[1:] == (1, 8, 8)


def test_digits_are_all_used_once() -> None:
    parts = take(DIGITS, None, None, 200)
    together = torch.cat([parts.train.x, parts.server_validation.x, parts.test.x]).flatten(1)
    everything = DIGITS.train().x.flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, everything.tolist()))


def test_parts_are_disjoint_and_from_their_official_parts() -> None:
    parts = take(numbered(), 50, 10, 20)
    train, validation = set(numbers(parts.train.x)), set(numbers(parts.server_validation.x))
    assert len(train) == 50
    assert len(validation) == 20
    assert not train & validation
    assert {part for part, _ in train | validation} == {0}
    assert {part for part, _ in numbers(parts.test.x)} == {1}


def test_a_whole_part_is_the_published_one() -> None:
    raw = numbered()
    parts = take(raw)
    assert torch.equal(parts.train.x, raw.train().x)
    assert torch.equal(parts.test.x, raw.test().x)


def test_same_seed_same_samples_other_seed_others() -> None:
    first, again, other = (numbers(take(numbered(), 30, seed=seed).train.x) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_fewer_samples_lie_within_more_and_validation_does_not_move_them() -> None:
    small, large = numbers(take(numbered(), 20).train.x), numbers(take(numbered(), 60).train.x)
    assert set(small) < set(large)
    assert numbers(take(numbered(), 60, val=40).train.x) == large


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((101, None, 0), r"data\.train_samples: 101 .* has 100 training"),
        ((90, None, 20), r"data\.train_samples: 90 .* has 80 training samples besides 20"),
        ((0, None, 0), r"data\.train_samples must be 1 or more"),
        ((None, 41, 0), r"data\.test_samples: 41 .* has 40 test"),
        ((None, 0, 0), r"data\.test_samples must be 1"),
        ((None, None, 100), r"data\.server_validation: 100 .* has 100 training"),
        ((None, None, -1), r"data\.server_validation must be 0"),
    ],
)
def test_more_than_there_is(asked: tuple[int | None, int | None, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        take(numbered(), *asked)


def test_digits_have_397_test_samples() -> None:
    with pytest.raises(InputError, match=r"data\.test_samples: 398 samples asked for, and digits has 397"):
        take(DIGITS, test=398)
