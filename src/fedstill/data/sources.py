"""The named data sets and how they are read: the embedded digits, and npz files in a folder.

``cifar100_superclasses`` is ``cifar100.npz`` once more, with ``y_train_coarse`` and ``y_test_coarse`` as labels.

A file ``<root>/<name>.npz`` holds uint8 ``x_train``, ``y_train``, ``x_test``, ``y_test``, or, for the
colour sets, the images as strips of lossless WebP: ``x_train_webp`` is a run of WebP files and
``x_train_webp_bytes`` their lengths; each is as wide as an image and stacks its images downwards. Where a
``SHA256SUMS`` lies beside it (lines ``<sha256>  <name>/<array>``, over the decoded bytes in C order), the
arrays must agree with it.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedstill.data.dataset import ByteArray, DataSet, IntArray, RawDataSet
from fedstill.errors import InputError
from fedstill.names import unknown

Stored = npt.NDArray[Any]
ROOT_VARIABLE = "FEDSTILL_DATA"

_BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, NotImplementedError)
"""What reading a damaged or a foreign archive raises; it becomes an InputError that names the file."""
_DIGIT_NAMES = tuple("0123456789")
_FASHION_NAMES = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


_SUPERCLASS_NAMES = """
aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees
vehicles_1 vehicles_2
"""


@dataclass(frozen=True)
class Source:
    """What is known of a data set before its file is read; ``shape`` is that of a stored image.

    ``superclasses_of`` names the data set whose file has these classes as ``y_train_coarse`` and ``y_test_coarse``,
    and whose own classes are their sub-classes.
    """

    summary: str
    origin: str
    shape: tuple[int, ...]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    superclasses_of: str | None = None

    def labels(self, part: str) -> str:
        """Return the name of the array that has a part's labels."""
        return f"y_{part}_coarse" if self.superclasses_of else f"y_{part}"


_DIGITS = "digits"
_SOURCES: dict[str, Source] = {
    _DIGITS: Source(
        "8x8 grey handwritten digits, 10 classes, 1,797 images; comes with fedstill",
        "",
        (8, 8),
        _DIGIT_NAMES,
        (0.3053,),
        (0.3760,),
    ),
    "mnist": Source(
        "28x28 grey handwritten digits, 10 classes, 60,000 + 10,000 images; from a folder",
        "http://yann.lecun.com/exdb/mnist/",
        (28, 28),
        _DIGIT_NAMES,
        (0.1307,),
        (0.3081,),
    ),
    "fashion_mnist": Source(
        "28x28 grey pictures of clothes, 10 classes, 60,000 + 10,000 images; from a folder",
        "https://github.com/zalandoresearch/fashion-mnist",
        (28, 28),
        tuple(_FASHION_NAMES.split(",")),
        (0.2860,),
        (0.3530,),
    ),
    "emnist_letters": Source(
        "28x28 grey handwritten letters, 26 classes, 124,800 + 20,800 images; from a folder",
        "https://www.nist.gov/itl/products-and-services/emnist-dataset",
        (28, 28),
        tuple("abcdefghijklmnopqrstuvwxyz"),
        (0.1722,),
        (0.3309,),
    ),
    "cifar10": Source(
        "32x32 colour photographs, 10 classes, 50,000 + 10,000 images; from a folder",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        (32, 32, 3),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        (0.491, 0.482, 0.447),
        (0.247, 0.243, 0.262),
    ),
    "cifar100": Source(
        "32x32 colour photographs, 100 classes, 50,000 + 10,000 images; from a folder",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        (32, 32, 3),
        tuple(_CIFAR100_NAMES.split()),
        (0.5071, 0.4867, 0.4408),
        (0.2675, 0.2565, 0.2761),
    ),
}
_SOURCES["cifar100_superclasses"] = replace(
    _SOURCES["cifar100"],
    summary="cifar100.npz by its 20 superclasses, whose sub-classes a partition can heed; from a folder",
    class_names=tuple(_SUPERCLASS_NAMES.split()),
    superclasses_of="cifar100",
)


def list_datasets() -> list[tuple[str, str]]:
    """Return (name, one-line summary) of every data set."""
    return [(name, source.summary) for name, source in _SOURCES.items()]


def source_of(name: str) -> Source:
    """Return what is known of a data set without its file; an InputError for an unknown name."""
    if name not in _SOURCES:
        raise unknown("data set", name, _SOURCES)
    return _SOURCES[name]


def file_of(name: str) -> str:
    """Return the name of the file that a data set is read from."""
    source = _SOURCES.get(name)
    return f"{(source and source.superclasses_of) or name}.npz"


def load_dataset(name: str, root: Path | str | None = None, classes: Sequence[int] | None = None) -> DataSet:
    """Return a whole data set as normalised float32; arguments and errors as :func:`load_raw`."""
    return load_raw(name, root, classes).normalised()


def load_raw(name: str, root: Path | str | None = None, classes: Sequence[int] | None = None) -> RawDataSet:
    """Read a data set and check it, its images still uint8.

    Parameters
    ----------
    name : str
        One of :func:`list_datasets`.
    root : Path or str, optional
        Folder with ``<name>.npz``; by default the environment variable ``FEDSTILL_DATA``. Not needed for
        ``digits``.
    classes : sequence of int, optional
        Only these classes, as :meth:`RawDataSet.only` gives them; by default all.

    Raises
    ------
    InputError
        For an unknown name; no folder; a file that is missing, damaged or does not agree with
        ``SHA256SUMS``; arrays that are missing or of the wrong type, shape, length or labels; WebP images
        without Pillow; classes that :meth:`RawDataSet.only` refuses.
    """
    raw = _whole(name, root)
    return raw if classes is None else raw.only(classes)


def _whole(name: str, root: Path | str | None) -> RawDataSet:
    source = source_of(name)
    if name == _DIGITS:
        return _digits(source)
    folder = root or os.environ.get(ROOT_VARIABLE)
    if not folder:
        raise InputError(
            f"data set {name!r} is read from a folder, and none was given: "
            f"set data.root or the environment variable {ROOT_VARIABLE} to the folder with {file_of(name)}"
        )
    path = Path(folder).expanduser() / file_of(name)
    arrays = _read(path, source)
    _verify(path, arrays)
    for part in ("train", "test"):
        _check_part(path, part, source.labels(part), arrays, source.shape, len(source.class_names))
    if source.superclasses_of:
        _check_part(path, "train", "y_train", arrays, source.shape, len(_SOURCES[source.superclasses_of].class_names))
    return RawDataSet(
        name=name,
        x_train=arrays["x_train"],
        y_train=arrays[source.labels("train")].astype(np.int64),
        x_test=arrays["x_test"],
        y_test=arrays[source.labels("test")].astype(np.int64),
        class_names=source.class_names,
        mean=source.mean,
        std=source.std,
        subclasses=arrays["y_train"].astype(np.int64) if source.superclasses_of else None,
    )


def _digits(source: Source) -> RawDataSet:
    with resources.files("fedstill.data").joinpath("digits.npz").open("rb") as file, np.load(file) as stored:
        x: ByteArray = stored["x"]
        y: IntArray = stored["y"].astype(np.int64)
    return RawDataSet(
        name=_DIGITS,
        x_train=x,
        y_train=y,
        x_test=x[:0],
        y_test=y[:0],
        class_names=source.class_names,
        mean=source.mean,
        std=source.std,
        scale=16.0,
        held_out=397,
    )


def _read(path: Path, source: Source) -> dict[str, Stored]:
    """Return the arrays of the file, its images decoded; their contents are not checked yet."""
    if not path.is_file():
        raise InputError(
            f"{path} does not exist: get the data from {source.origin} and save it there with "
            f"numpy.savez_compressed as uint8 arrays x_train, y_train, x_test, y_test, {_more_labels(source)}"
            f"images (N, {', '.join(map(str, source.shape))}); "
            f"or give another folder with data.root or {ROOT_VARIABLE}"
        )
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is not an npz file: save the arrays with numpy.savez_compressed")
        arrays: dict[str, Stored] = {}
        with opened as stored:
            for part in ("train", "test"):
                x, labels = f"x_{part}", list(dict.fromkeys([f"y_{part}", source.labels(part)]))
                strips = x not in stored and len(source.shape) == 3 and f"{x}_webp" in stored
                pixels = [f"{x}_webp", f"{x}_webp_bytes"] if strips else [x]
                missing = [key for key in (*labels, *pixels) if key not in stored]
                if missing:
                    raise InputError(
                        f"{path} has no array {' and no '.join(missing)} (it has: {', '.join(stored.files)})"
                    )
                arrays |= {key: _array(path, stored, key) for key in labels}
                images = [_array(path, stored, key) for key in pixels]
                arrays[x] = _from_webp(images[0], images[1], source.shape) if strips else images[0]
        return arrays
    except _BROKEN as error:
        raise InputError(f"{path} cannot be read, it is truncated or damaged ({error})") from error


def _array(path: Path, stored: np.lib.npyio.NpzFile, key: str) -> Stored:
    """Return a member, which NumPy gives as bytes where it is no array."""
    member = stored[key]
    if not isinstance(member, np.ndarray):
        raise InputError(f"{path}: {key} is no NumPy array; save the arrays with numpy.savez_compressed")
    return member


def _from_webp(blob: Stored, sizes: Stored, shape: tuple[int, ...]) -> ByteArray:
    """Decode WebP strips to images (N, H, W, 3); a ValueError says what does not fit."""
    try:
        from PIL import Image, UnidentifiedImageError, features
    except ImportError as error:
        raise InputError("images stored as WebP need Pillow to be decoded: pip install fedstill[webp]") from error
    if not features.check("webp"):
        raise InputError("this Pillow was built without WebP: pip install fedstill[webp]")
    if blob.dtype != np.uint8 or blob.ndim != 1 or sizes.dtype.kind not in "iu" or sizes.ndim != 1:
        raise ValueError("the WebP images are not a run of bytes with a list of lengths")
    if len(sizes) == 0 or sizes.min() < 1 or int(sizes.sum(dtype=np.int64)) != len(blob):
        raise ValueError("the lengths of the WebP images do not add up to their bytes")
    height, width, _ = shape
    ends = np.cumsum(sizes, dtype=np.int64)
    files = [io.BytesIO(blob[end - size : end].tobytes()) for size, end in zip(sizes, ends)]
    heights = []
    for number, file in enumerate(files):
        try:
            with Image.open(file) as strip:
                columns, rows = strip.size
        except UnidentifiedImageError:
            raise ValueError(f"strip {number} of the images is no WebP file") from None
        if columns != width or rows % height:
            raise ValueError(f"strip {number} of the images is {columns} pixels wide and {rows} high")
        heights.append(rows)
    pixels = np.empty((sum(heights), width, 3), np.uint8)
    start = 0
    for file, count in zip(files, heights):
        with Image.open(file) as strip:
            pixels[start : start + count] = np.asarray(strip.convert("RGB"))
        start += count
    return pixels.reshape(-1, *shape)


def _verify(path: Path, arrays: dict[str, Stored]) -> None:
    """Compare the arrays with SHA256SUMS where that file lies beside ``path`` and lists them."""
    sums = path.with_name("SHA256SUMS")
    if not sums.is_file():
        return
    fields = [line.split() for line in sums.read_text(encoding="utf-8", errors="replace").splitlines()]
    expected = {pair[1]: pair[0] for pair in fields if len(pair) == 2}
    for key, array in arrays.items():
        digest = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
        if expected.get(f"{path.stem}/{key}", digest) != digest:
            raise InputError(
                f"{path}: {key} does not match its SHA-256 in {sums}: it is damaged or another version; "
                f"fetch it again, or remove its lines from SHA256SUMS if you mean to use it"
            )


def _more_labels(source: Source) -> str:
    return f"{source.labels('train')}, {source.labels('test')}, " if source.superclasses_of else ""


def _check_part(
    path: Path, part: str, labels: str, arrays: dict[str, Stored], shape: tuple[int, ...], classes: int
) -> None:
    x, y = arrays[f"x_{part}"], arrays[labels]
    form = f"(N, {', '.join(map(str, shape))})"
    if x.dtype != np.uint8 or x.shape[1:] != shape:
        raise InputError(f"{path}: x_{part} must be uint8 {form}, it is {x.dtype} {x.shape}")
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise InputError(f"{path}: {labels} must be uint8 (N,), it is {y.dtype} {y.shape}")
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"{path}: x_{part} has {len(x)} images and {labels} has {len(y)} labels")
    if y.min() < 0 or y.max() >= classes:
        raise InputError(f"{path}: {labels} must be within 0 to {classes - 1}, it has {y.min()} to {y.max()}")
