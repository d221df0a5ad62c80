from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedstill.data import augment, list_augmentations
from fedstill.data.augment import Moves, draw_moves, moved
from fedstill.errors import InputError
from fedstill.rng import torch_stream

IMAGES = torch.randn(6, 3, 9, 7, generator=torch_stream(0, "images"))


def cut(image: torch.Tensor, row: int, column: int) -> torch.Tensor:
    return F.pad(image, (4, 4, 4, 4))[:, row : row + image.shape[1], column : column + image.shape[2]]


def test_crop_and_flip_equal_the_hand_made_ones() -> None:
    offsets = torch.tensor([[4, 4], [0, 8], [8, 0], [3, 6], [4, 4], [1, 2]])
    flips = torch.tensor([False, False, False, False, True, True])
    got = moved(IMAGES, Moves(flips, offsets))
    for image, (row, column), flip, result in zip(IMAGES, offsets.tolist(), flips.tolist(), got):
        assert torch.equal(result, cut(image.flip(-1) if flip else image, row, column))


def test_no_move_is_the_image_and_a_flip_twice_too() -> None:
    still = torch.full((6, 2), 4)
    never, always = torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    assert torch.equal(moved(IMAGES, Moves(never, still)), IMAGES)
    assert torch.equal(moved(moved(IMAGES, Moves(always, still)), Moves(always, still)), IMAGES)


@pytest.mark.parametrize("kind", ["flip-crop", "flip-crop-half"])
def test_moves_of_a_round_are_those_of_its_batches_one_after_another(kind: str) -> None:
    one_by_one, stream = torch_stream(3, "augment"), torch_stream(3, "augment")
    at_once = draw_moves(kind, [4, 2], stream, IMAGES.device)
    for batch, moves in zip(torch.split(IMAGES, [4, 2]), at_once, strict=True):
        assert torch.equal(moved(batch, moves), augment(batch, kind, one_by_one))


@pytest.mark.parametrize("kind", [name for name, _ in list_augmentations()])
def test_same_generator_same_batch_and_the_input_is_left_alone(kind: str) -> None:
    before = IMAGES.clone()
    first = augment(IMAGES, kind, torch_stream(1, "augment"))
    again = augment(IMAGES, kind, torch_stream(1, "augment"))
    assert torch.equal(first, again)
    assert torch.equal(IMAGES, before)
    assert first.shape == IMAGES.shape


def test_none_is_the_batch() -> None:
    assert augment(IMAGES, "none", torch_stream(0)) is IMAGES


@pytest.mark.parametrize(("kind", "still"), [("flip-crop-half", 0.5 + 0.5 / 81), ("flip-crop", 1 / 81)])
def test_how_often_an_image_flips_and_stays(kind: str, still: float) -> None:
    image = torch.arange(1.0, 626).reshape(1, 1, 25, 25)
    got = augment(image.expand(8_000, -1, -1, -1), kind, torch_stream(2))
    unmoved = (got == image).flatten(1).all(1) | (got == image.flip(-1)).flatten(1).all(1)
    assert float(unmoved.float().mean()) == pytest.approx(still, abs=0.02)
    # The padding does not reach the middle, where the pixels rise to the right unless flipped.
    flipped = got[:, 0, 12, 13] < got[:, 0, 12, 12]
    assert float(flipped.float().mean()) == pytest.approx(0.5, abs=0.02)


def test_every_offset_is_as_likely() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4, 4] = 1
    got = augment(image.expand(40_500, -1, -1, -1), "flip-crop", torch_stream(3))
    shares = got.mean(0)[0] * 81
    assert shares.min() > 0.8
    assert shares.max() < 1.2


def test_unknown_kind() -> None:
    with pytest.raises(InputError, match="did you mean 'flip-crop'"):
        augment(IMAGES, "flip-corp", torch_stream(0))
