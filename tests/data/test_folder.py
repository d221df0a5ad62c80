from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedstill.data.folder import normalised, read_folder
from fedstill.errors import InputError


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, image: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".npy":
        np.save(path, image)
    else:
        Image.fromarray(image).save(path, **options)


def test_all_kinds_are_read_in_the_order_of_their_paths(tmp_path: Path) -> None:
    images = [pixels(seed, 5, 4, 3) for seed in range(4)]
    save(tmp_path / "b.PNG", images[1])
    save(tmp_path / "a" / "deep" / "z.webp", images[0], lossless=True)
    save(tmp_path / "c.npy", images[2])
    save(tmp_path / "d.jpeg", images[3], quality=100, subsampling=0)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    got = read_folder(tmp_path, (3, 5, 4))
    assert got.dtype == np.uint8
    assert len(got) == 4
    for number in range(3):
        assert np.array_equal(got[number], images[number])
    assert np.abs(got[3].astype(int) - images[3]).mean() < 3  # JPEG loses a little


def test_the_order_is_that_of_the_text_of_the_path(tmp_path: Path) -> None:
    for value, name in enumerate(["a-b.png", "a/b.png", "a1.png", "b.png"]):
        save(tmp_path / name, np.full((2, 2), value, np.uint8))
    assert read_folder(str(tmp_path), (1, 2, 2))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_grey_becomes_colour_and_colour_grey(tmp_path: Path, suffix: str) -> None:
    grey = pixels(0, 3, 2)
    save(tmp_path / "grey" / f"x{suffix}", grey)
    (as_colour,) = read_folder(tmp_path / "grey", (3, 3, 2))
    assert np.array_equal(as_colour, np.stack([grey] * 3, axis=-1))
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    save(tmp_path / "colour" / f"x{suffix}", colours)
    (as_grey,) = read_folder(tmp_path / "colour", (1, 1, 4))
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B
    assert as_grey[0, :, 0].tolist() == [76, 150, 29, 255]


def test_palettes_and_transparency_become_colours(tmp_path: Path) -> None:
    image = np.zeros((2, 2, 4), np.uint8)
    image[..., 1] = 200
    save(tmp_path / "rgba.png", image)
    Image.fromarray(image[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    for got in read_folder(tmp_path, (3, 2, 2)):
        assert got[1, 1].tolist() == [0, 200, 0]


def test_a_npy_file_may_name_its_one_channel(tmp_path: Path) -> None:
    image = pixels(0, 3, 2, 1)
    save(tmp_path / "x.npy", image)
    assert np.array_equal(read_folder(tmp_path, (1, 3, 2))[0], image)


def test_the_folders_own_mean_and_std_are_applied(tmp_path: Path) -> None:
    images = np.stack([pixels(seed, 6, 5, 3) // (seed + 1) for seed in range(3)])
    for number, image in enumerate(images):
        save(tmp_path / f"{number}.png", image)
    x = normalised(read_folder(tmp_path, (3, 6, 5)), tmp_path)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert x.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert x.std(dim=(0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, abs=1e-5)
    mean, std = images[..., 1].mean() / 255, images[..., 1].std() / 255
    assert float(x[2, 1, 3, 4]) == pytest.approx((images[2, 3, 4, 1] / 255 - mean) / std, abs=1e-5)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.npy"])
@pytest.mark.parametrize("keep", [0, 3, 60])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, keep: int) -> None:
    save(tmp_path / "a.png", pixels(0, 8, 8))
    path = tmp_path / "deep" / name
    save(path, pixels(1, 8, 8))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="cannot be read as an image") as error:
        read_folder(tmp_path, (1, 8, 8))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_something_else_under_an_images_name(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_text("{'descr': (")
    with pytest.raises(InputError, match=r"x\.npy cannot be read"):
        read_folder(tmp_path, (1, 8, 8))
    with (tmp_path / "x.npy").open("wb") as file:
        np.savez(file, x=pixels(0, 8, 8))
    with pytest.raises(InputError, match=r"x\.npy cannot be read.*npz"):
        read_folder(tmp_path, (1, 8, 8))


@pytest.mark.parametrize("name", ["x.png", "x.npy"])
def test_another_size_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, pixels(0, 8, 9))
    with pytest.raises(InputError, match=r"8 pixels high and 9 wide, and 9 x 8 are asked for") as error:
        read_folder(tmp_path, (1, 9, 8))
    assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("x.png", np.zeros((4, 4), np.uint16), "8 bits a channel"),
        ("x.npy", np.zeros((4, 4), np.float32), r"must be uint8 .* it is float32 \(4, 4\)"),
        ("x.npy", np.zeros((3, 4, 4), np.uint8), r"must be uint8 .* it is uint8 \(3, 4, 4\)"),
        ("x.npy", np.zeros(16, np.uint8), r"it is uint8 \(16,\)"),
    ],
)
def test_another_type_is_refused(tmp_path: Path, name: str, image: np.ndarray, message: str) -> None:
    save(tmp_path / name, image)
    with pytest.raises(InputError, match=message) as error:
        read_folder(tmp_path, (1, 4, 4))
    assert str(tmp_path / name) in str(error.value)


def test_a_folder_without_images_or_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no image in it"):
        read_folder(tmp_path, (1, 4, 4))
    with pytest.raises(InputError, match="is not a folder"):
        read_folder(tmp_path / "none", (1, 4, 4))


def test_images_without_any_spread_cannot_be_normalised(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="all pixels of a channel are equal"):
        normalised(np.full((2, 4, 4, 1), 77, np.uint8), tmp_path)


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 0, 4)])
def test_shapes_that_cannot_be(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="images are read as"):
        read_folder(tmp_path, shape)
