"""The fingerprints of samples and labels: what changes them and what does not, in arrays, folders and runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedstill.build import build
from fedstill.callbacks import StopRun
from fedstill.config import Config
from fedstill.data.dataset import ByteArray, IntArray
from fedstill.data.fingerprint import AT_A_TIME, differing, fingerprint
from fedstill.errors import InputError
from fedstill.experiment import resume, run
from fedstill.studies.compare import compare
from small import small

RANDOM = np.random.default_rng(0)
X = RANDOM.integers(0, 256, (AT_A_TIME + 100, 3, 2), np.uint8)
Y = RANDOM.integers(0, 10, len(X))
ALL = np.arange(len(X))


def changed(array: ByteArray | IntArray, at: tuple[int, ...]) -> ByteArray | IntArray:
    copy = array.copy()
    copy[at] += 1
    return copy


def test_it_is_blake2b_of_size_labels_and_pixels() -> None:
    head = b"(4196, (3, 2), [255.0, 0.5])"
    expected = blake2b(head + Y.astype("<i8").tobytes() + X.tobytes(), digest_size=32).hexdigest()
    assert fingerprint(X, Y, ALL, (255, 0.5)) == expected


def test_what_changes_it() -> None:
    rows = ALL[50:]
    plain = fingerprint(X, Y, rows)
    last = len(X) - 1
    others = [
        fingerprint(changed(X, (last, 2, 1)), Y, rows),
        fingerprint(X, changed(Y, (60,)), rows),
        fingerprint(X, Y, rows[::-1]),
        fingerprint(X, Y, rows[:-1]),
        fingerprint(X, Y, rows, (255.0,)),
        fingerprint(X.reshape(-1, 2, 3), Y, rows),
    ]
    assert len({plain, *others}) == 1 + len(others)
    # What was not selected, and how labels are stored, make no difference.
    assert fingerprint(changed(X, (49, 0, 0)), changed(Y, (3,)), rows) == plain
    assert fingerprint(X, Y.astype(np.uint8), rows) == plain


def test_images_larger_than_the_memory_are_read_from_their_file(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    assert fingerprint(np.load(tmp_path / "x.npy", mmap_mode="r"), Y, ALL) == fingerprint(X, Y, ALL)


def test_differing_in_words() -> None:
    one = {"train": "a", "test": "b"}
    assert differing(one, dict(one)) == ""
    assert differing(one, {"train": "a", "test": "c", "public": "d"}) == "test samples and public samples"
    assert differing(one, {"train": "c", "test": "c"}, ("train",)) == "training samples"


# In runs, on a data set from a folder


def write_mnist(folder: Path, change: Callable[[dict[str, np.ndarray]], None] = lambda arrays: None) -> Path:
    random = np.random.default_rng(1)
    arrays = {
        "x_train": random.integers(0, 256, (90, 28, 28), np.uint8),
        "y_train": np.arange(90, dtype=np.uint8) % 10,
        "x_test": random.integers(0, 256, (20, 28, 28), np.uint8),
        "y_test": np.arange(20, dtype=np.uint8) % 10,
    }
    change(arrays)
    folder.mkdir(exist_ok=True)
    np.savez(folder / "mnist.npz", **arrays)
    return folder


def pixel(part: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[f"x_{part}"][7, 14, 14] ^= 1

    return change


def label(arrays: dict[str, np.ndarray]) -> None:
    arrays["y_train"][7] = 3


def on(root: Path, *keys: str) -> Config:
    given = [f"data.root={json.dumps(str(root))}", "data.name=mnist", "data.train_samples=90", "data.test_samples=20"]
    return small(*given, "train.rounds=1", "model.hidden=[4]", *keys)


def prints(config: Config) -> dict[str, str]:
    return dict(build(config)[0].data_fingerprints)


def test_each_part_has_its_own(tmp_path: Path) -> None:
    root = write_mnist(tmp_path / "data")
    some = "data.train_samples=80"
    plain = prints(on(root, some))
    assert plain.keys() == {"train", "test"}
    assert prints(on(root, some, "seed.train=3", "local.lr=0.5", "data.augment=flip-crop", "data.beta=3.0")) == plain
    with_validation = prints(on(root, some, "data.server_validation=5"))
    assert with_validation.keys() == {"train", "validation", "test"}
    assert {**with_validation, **plain} == with_validation, "asking for validation leaves the other parts"
    other = prints(on(root, some, "seed.data=3"))
    assert other["train"] != plain["train"], "other samples are chosen"
    assert other["test"] == plain["test"], "all of them are"
    moved = prints(on(write_mnist(tmp_path / "moved", pixel("test")), some))
    assert differing(plain, moved) == "test samples"


def test_digits_have_no_official_parts() -> None:
    whole = prints(small("data.train_samples=1400", "data.test_samples=397"))
    assert whole["train"] != whole["test"]
    assert prints(small("data.train_samples=1400", "data.test_samples=397", "seed.data=1"))["test"] != whole["test"]


def test_a_public_set_and_labels_of_its_own(tmp_path: Path) -> None:
    root = write_mnist(tmp_path / "data")
    private = prints(on(root))
    keys = ["public.name=mnist", "public.samples=30"]
    same, separate = (prints(on(root, *keys, f"public.labels={labels}")) for labels in ("same", "separate"))
    assert same == separate, "how the outputs count does not change the data"
    assert {**same, **private} == same
    assert same["public"] != private["train"]
    assert prints(on(root, "public.name=mnist", "public.samples=31"))["public"] != same["public"]


def test_a_folder_of_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    images = np.random.default_rng(2).integers(0, 256, (6, 8, 8), np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")

    def public() -> str:
        return prints(small(f"public.name={folder}", "public.samples=3"))["public"]

    first = public()
    assert public() == first
    Image.fromarray(images[0] ^ 1).save(folder / "0.png")
    assert public() != first


def test_runs_on_equal_data_are_compared_and_on_others_not(tmp_path: Path) -> None:
    one, equal = write_mnist(tmp_path / "one"), write_mnist(tmp_path / "equal")
    changes = {"pixel": pixel("train"), "tested": pixel("test"), "label": label}
    roots = {name: write_mnist(tmp_path / name, change) for name, change in changes.items()}
    run(on(one), directory=tmp_path / "a")
    run(on(equal, "local.lr=0.2"), directory=tmp_path / "b")
    assert compare([tmp_path / "a", tmp_path / "b"]).tables[0].remarks == ()
    says = {"pixel": "their training samples differ", "tested": "their test samples differ", "label": "their training"}
    for name, root in roots.items():
        run(on(root, "local.lr=0.3"), directory=tmp_path / f"run-{name}")
        with pytest.raises(InputError) as caught:
            compare([tmp_path / "a", tmp_path / f"run-{name}"])
        assert f"{tmp_path / 'a'} and {tmp_path / f'run-{name}'} cannot be compared" in str(caught.value)
        assert says[name] in str(caught.value)
        assert f"data.root is {one} and {root}" in str(caught.value)


def stop(round: int, record: object, info: object) -> None:
    raise StopRun("enough")


@pytest.mark.parametrize(("part", "words"), [("train", "training samples"), ("test", "test samples")])
def test_a_run_whose_data_changed_on_disk_is_not_resumed(tmp_path: Path, part: str, words: str) -> None:
    root, path = write_mnist(tmp_path / "data"), tmp_path / "run"
    run(on(root, "train.rounds=2"), directory=path, callbacks=[stop])
    write_mnist(root, pixel(part))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(InputError) as caught:
        resume(path)
    assert str(caught.value) == (
        f"{path}: the {words} are not those that this run began with; put the data back as they were "
        f"(data.name = 'mnist', data.root = '{root}'), or begin a new run"
    )
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    write_mnist(root)
    assert len(resume(path).records) == 2


def test_an_older_run_without_fingerprints_is_resumed(tmp_path: Path) -> None:
    root, path = write_mnist(tmp_path / "data"), tmp_path / "run"
    run(on(root, "train.rounds=2"), directory=path, callbacks=[stop])
    held = json.loads((path / "partition.json").read_text())
    assert held.pop("data_fingerprint").keys() == {"train", "test"}
    (path / "partition.json").write_text(json.dumps(held))
    assert len(resume(path).records) == 2
