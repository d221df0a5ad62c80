from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedstill import presets, run
from fedstill.config import load_config
from fedstill.data import list_datasets, load_dataset, load_raw, split
from fedstill.errors import InputError

Arrays = dict[str, np.ndarray]


def grey(train: int = 30, test: int = 20) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (train, 28, 28), dtype=np.uint8),
        "y_train": (np.arange(train) % 10).astype(np.uint8),
        "x_test": rng.integers(0, 256, (test, 28, 28), dtype=np.uint8),
        "y_test": (np.arange(test) % 10).astype(np.uint8),
    }


def colour(train: int = 250, test: int = 125) -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (train, 32, 32, 3), dtype=np.uint8),
        "y_train": (np.arange(train) % 10).astype(np.uint8),
        "x_test": rng.integers(0, 256, (test, 32, 32, 3), dtype=np.uint8),
        "y_test": (np.arange(test) % 10).astype(np.uint8),
    }


def as_webp(arrays: Arrays) -> Arrays:
    from PIL import Image

    stored = {key: value for key, value in arrays.items() if key.startswith("y_")}
    for key in ("x_train", "x_test"):
        strips = []
        for start in range(0, len(arrays[key]), 125):
            file = io.BytesIO()
            strip = arrays[key][start : start + 125].reshape(-1, 32, 3)
            Image.fromarray(strip).save(file, "WEBP", lossless=True, exact=True, quality=0, method=0)
            strips.append(file.getvalue())
        stored[f"{key}_webp"] = np.frombuffer(b"".join(strips), np.uint8)
        stored[f"{key}_webp_bytes"] = np.array([len(strip) for strip in strips], np.int32)
    return stored


def save(folder: Path, name: str, arrays: Arrays) -> Path:
    path = folder / f"{name}.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def sums(folder: Path, name: str, arrays: Arrays) -> None:
    lines = [f"{hashlib.sha256(value.tobytes()).hexdigest()}  {name}/{key}\n" for key, value in arrays.items()]
    (folder / "SHA256SUMS").write_text("".join(lines))


def test_every_source_is_listed_with_one_line() -> None:
    listed = dict(list_datasets())
    assert list(listed) == [
        "digits", "mnist", "fashion_mnist", "emnist_letters", "cifar10", "cifar100", "cifar100_superclasses"
    ]  # fmt: skip
    assert all(summary and "\n" not in summary for summary in listed.values())


def test_digits_need_no_folder_and_are_normalised() -> None:
    data = load_dataset("digits")
    assert data.shape == (1, 8, 8)
    assert (len(data.train), len(data.test), data.num_classes) == (1797, 0, 10)
    assert data.train.x.dtype == torch.float32
    assert data.train.y.dtype == torch.int64
    assert float(data.train.x.mean()) == pytest.approx(0, abs=1e-3)
    assert float(data.train.x.std()) == pytest.approx(1, abs=1e-3)
    assert data.train.y[:10].tolist() == list(range(10))


def test_normalising_leaves_the_stored_pixels() -> None:
    raw = load_raw("digits")
    before = raw.x_train.copy()
    raw.train(), raw.train(np.array([3, 1]))
    assert np.array_equal(raw.x_train, before)


def test_plain_npz(tmp_path: Path) -> None:
    arrays = grey()
    save(tmp_path, "mnist", arrays)
    data = load_dataset("mnist", tmp_path)
    assert data.train.x.shape == (30, 1, 28, 28)
    assert torch.equal(data.test.y, torch.from_numpy(arrays["y_test"]).long())
    expected = (arrays["x_train"][7, 5, 9] / 255 - 0.1307) / 0.3081
    assert float(data.train.x[7, 0, 5, 9]) == pytest.approx(expected, rel=1e-5)


def test_root_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "mnist", grey())
    monkeypatch.setenv("FEDSTILL_DATA", str(tmp_path))
    assert len(load_dataset("mnist").train) == 30


def test_webp_is_read_exactly_as_the_plain_file(tmp_path: Path) -> None:
    arrays = colour()
    (tmp_path / "plain").mkdir()
    save(tmp_path / "plain", "cifar10", arrays)
    save(tmp_path, "cifar10", as_webp(arrays))
    sums(tmp_path, "cifar10", arrays)
    webp, plain = load_raw("cifar10", tmp_path), load_raw("cifar10", tmp_path / "plain")
    assert np.array_equal(webp.x_train, arrays["x_train"])
    assert np.array_equal(webp.x_test, plain.x_test)
    assert webp.shape == (3, 32, 32)
    third = webp.train(np.array([3])).x[0, 2, 10, 20]
    assert float(third) == pytest.approx((arrays["x_train"][3, 10, 20, 2] / 255 - 0.447) / 0.262, rel=1e-5)


def test_webp_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "cifar10", as_webp(colour(125, 125)))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match=r"pip install fedstill\[webp\]"):
        load_raw("cifar10", tmp_path)


def test_a_damaged_webp_strip(tmp_path: Path) -> None:
    stored = as_webp(colour(125, 125))
    stored["x_train_webp"] = np.zeros_like(stored["x_train_webp"])
    path = save(tmp_path, "cifar10", stored)
    with pytest.raises(InputError, match="damaged") as error:
        load_raw("cifar10", tmp_path)
    assert str(path) in str(error.value)


def test_webp_lengths_that_do_not_add_up(tmp_path: Path) -> None:
    stored = as_webp(colour(125, 125))
    stored["x_train_webp_bytes"] = stored["x_train_webp_bytes"] - 1
    save(tmp_path, "cifar10", stored)
    with pytest.raises(InputError, match="do not add up"):
        load_raw("cifar10", tmp_path)


def test_checksums_are_compared_where_listed(tmp_path: Path) -> None:
    arrays = grey()
    sums(tmp_path, "mnist", arrays)
    save(tmp_path, "mnist", arrays)
    assert len(load_raw("mnist", tmp_path).x_train) == 30
    changed = arrays | {"y_test": arrays["y_test"][::-1]}
    save(tmp_path, "mnist", changed)
    with pytest.raises(InputError, match="y_test does not match its SHA-256"):
        load_raw("mnist", tmp_path)
    save(tmp_path, "fashion_mnist", changed)
    assert len(load_raw("fashion_mnist", tmp_path).x_train) == 30


def superclasses(train: int = 40, test: int = 20) -> Arrays:
    """CIFAR-100 in small: the fine label is 3 times the superclass and 0, 1 or 2, in another order than the file's."""
    arrays = colour(train, test)
    for part, count in (("train", train), ("test", test)):
        coarse = np.arange(count) % 20
        arrays[f"y_{part}_coarse"] = coarse.astype(np.uint8)
        arrays[f"y_{part}"] = (3 * coarse + np.arange(count) % 3).astype(np.uint8)
    return arrays


def test_superclasses_are_read_from_the_file_of_their_classes(tmp_path: Path) -> None:
    arrays = superclasses()
    save(tmp_path, "cifar100", arrays)
    sums(tmp_path, "cifar100", arrays)
    fine, coarse = load_raw("cifar100", tmp_path), load_raw("cifar100_superclasses", tmp_path)
    assert (fine.num_classes, coarse.num_classes, len(set(coarse.class_names))) == (100, 20, 20)
    assert fine.subclasses is None
    assert coarse.subclasses is not None
    assert np.array_equal(coarse.subclasses, fine.y_train)
    assert np.array_equal(coarse.y_train, coarse.subclasses // 3)
    assert coarse.y_test.tolist() == list(range(20))
    assert np.array_equal(coarse.x_train, fine.x_train)
    chosen = coarse.only([7, 2])
    assert chosen.subclasses is not None
    assert np.array_equal(chosen.subclasses // 3, np.array([7, 2])[chosen.y_train])
    splits = split(chosen, train_samples=3, test_samples=None, server_validation=0, seed=0)
    assert splits.subclasses is not None
    assert np.array_equal(splits.subclasses // 3, np.array([7, 2])[splits.train.y.numpy()])


def test_superclasses_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cifar100\.npz does not exist.*y_train_coarse, y_test_coarse, images"):
        load_raw("cifar100_superclasses", tmp_path)
    save(tmp_path, "cifar100", colour(40, 20))
    with pytest.raises(InputError, match="has no array y_train_coarse"):
        load_raw("cifar100_superclasses", tmp_path)
    for name, low, high in (("y_test_coarse", 20, 19), ("y_train", 100, 99)):
        arrays = superclasses()
        arrays[name][0] = low
        save(tmp_path, "cifar100", arrays)
        with pytest.raises(InputError, match=f"{name} must be within 0 to {high}"):
            load_raw("cifar100_superclasses", tmp_path)


def test_unknown_name_tells_the_nearest_and_all() -> None:
    with pytest.raises(InputError, match=r"did you mean 'cifar10'.*mnist.*cifar100"):
        load_raw("cifar-10")


def test_no_folder_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSTILL_DATA", raising=False)
    with pytest.raises(InputError, match=r"data\.root or the environment variable FEDSTILL_DATA"):
        load_raw("mnist")


def test_missing_file_says_where_and_what(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"images \(N, 32, 32, 3\)") as error:
        load_raw("cifar10", tmp_path)
    assert str(tmp_path / "cifar10.npz") in str(error.value)


@pytest.mark.parametrize("keep", [0, 10, 2000, -100])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = save(tmp_path, "mnist", grey())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="cannot be read"):
        load_raw("mnist", tmp_path)


def test_flipped_byte(tmp_path: Path) -> None:
    path = save(tmp_path, "mnist", grey())
    content = bytearray(path.read_bytes())
    content[1000] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="cannot be read"):
        load_raw("mnist", tmp_path)


def test_an_npy_file_under_the_name(tmp_path: Path) -> None:
    with (tmp_path / "mnist.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="not an npz file"):
        load_raw("mnist", tmp_path)


def test_members_that_are_no_arrays(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mnist.npz", "w") as file:
        for key in grey():
            file.writestr(f"{key}.npy", b"garbage")
    with pytest.raises(InputError, match=r"mnist\.npz: y_train is no NumPy array"):
        load_raw("mnist", tmp_path)


def test_missing_array(tmp_path: Path) -> None:
    arrays = grey()
    del arrays["y_test"]
    save(tmp_path, "mnist", arrays)
    with pytest.raises(InputError, match=r"has no array y_test \(it has: x_train"):
        load_raw("mnist", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((30, 28, 27), np.uint8)}, r"x_train must be uint8 \(N, 28, 28\)"),
        ({"x_test": np.zeros((20, 28, 28), np.float32)}, "x_test must be uint8"),
        ({"x_train": np.zeros((29, 28, 28), np.uint8)}, "29 images and y_train has 30 labels"),
        ({"y_train": np.zeros((30, 1), np.uint8)}, r"y_train must be uint8 \(N,\)"),
        ({"y_test": np.full(20, 10, np.uint8)}, "y_test must be within 0 to 9"),
        ({"y_test": np.array([None] * 20)}, "cannot be read"),
    ],
)
def test_wrong_arrays(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save(tmp_path, "mnist", grey() | change)
    with pytest.raises(InputError, match=message):
        load_raw("mnist", tmp_path)


def test_take_keeps_the_order_asked_for() -> None:
    samples = load_dataset("digits").train.take([5, 2, 5])
    assert samples.y.tolist() == [5, 2, 5]
    assert torch.equal(samples.x[0], samples.x[2])
    assert len(samples.to("cpu")) == 3


@pytest.mark.skipif("FEDSTILL_DATA" not in os.environ, reason="FEDSTILL_DATA names no folder with real data")
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_real_data(name: str) -> None:
    if not (Path(os.environ["FEDSTILL_DATA"]) / f"{name}.npz").exists():
        pytest.skip(f"FEDSTILL_DATA has no {name}.npz")
    raw = load_raw(name)
    first = raw.train(np.arange(5000))
    assert len(raw.x_test) == 10_000
    assert first.x.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (first.x.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05


def test_letters_and_the_preset_that_learns_them(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, classes in {"emnist_letters": 26, "mnist": 10}.items():
        y = np.arange(8 * classes) % classes
        x = np.tile(random.integers(0, 255, (classes, 28, 28), np.uint8), (8, 1, 1))
        x_train = np.repeat(x, 5, 0)
        np.savez_compressed(tmp_path / name, x_train=x_train, y_train=np.repeat(y, 5), x_test=x, y_test=y)
    assert load_dataset("emnist_letters", tmp_path).class_names[10:16] == tuple("klmnop")
    keys = [f"data.root={tmp_path}", f"public.root={tmp_path}", "public.samples=60", "fedmd.align_samples=20"]
    keys += ["train.rounds=2", "fedmd.public_epochs=1", "fedmd.private_epochs=1", "execution.executor=serial"]
    result = run(load_config(None, keys, presets.preset("fedmd-emnist")))
    scores: Any = result.records[-1]["fused"]
    assert len(scores["test"]["per_client"]) == 10
    assert result.federation.info.num_classes == 10 + 6
    counts = result.federation.partition.counts
    assert counts.shape[0] == 10
    assert (counts.sum(1) == 18).all()
