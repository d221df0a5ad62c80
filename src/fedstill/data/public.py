"""The public set: what FedMD's participants learn from together, and FedDF's unlabelled samples."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from fedstill.data.dataset import ByteArray, IntArray, Samples
from fedstill.data.fingerprint import fingerprint
from fedstill.data.folder import normalised, read_folder
from fedstill.data.sources import list_datasets, load_raw
from fedstill.errors import InputError
from fedstill.rng import numpy_stream


@dataclass(frozen=True, eq=False)
class PublicSet:
    """Samples that everybody has.

    Attributes
    ----------
    samples : Samples
        Normalised with the set's own constants; labels are zeros where it has none.
    class_names : tuple of str or None
        None for a folder of images, which has no labels.
    fingerprint : str
        Digest of the samples; of a folder, of all its images, since each is normalised by the mean of all.
    """

    samples: Samples
    class_names: tuple[str, ...] | None
    fingerprint: str


def load_public(
    name: str,
    root: Path | None,
    *,
    shape: tuple[int, int, int],
    classes: tuple[int, ...] | None,
    samples: int | None,
    seed: int,
    judging: ByteArray | None = None,
) -> PublicSet:
    """Read the public set: a data set's training part, or a folder of images.

    Parameters
    ----------
    name : str
        A data set's name, or the path of a folder.
    root : Path or None
        Folder of the data sets.
    shape : tuple of int
        (C, H, W) that the models take.
    classes : tuple of int or None
        Only these classes, relabelled from 0.
    samples : int or None
        How many, a random subset in the order of the file; None for all.
    seed : int
        ``seed.data``.
    judging : uint8 array, (N, ...), optional
        Images as stored by which models are chosen or judged; those among the set's are left out.

    Raises
    ------
    InputError
        For an unknown name, another shape than the private data's, or more samples than there are.
    """
    names = [known for known, _ in list_datasets()]
    if name not in names and Path(name).is_dir():
        if classes is not None:
            raise InputError(f"public.classes: the folder {name} has no labels to choose by; remove the key")
        pixels = read_folder(Path(name), shape)
        rows = _rows(samples, len(pixels), name, seed)
        x = normalised(pixels, name)[torch.from_numpy(rows)]
        unlabelled = np.zeros(len(pixels), np.int64)
        found = fingerprint(pixels, unlabelled, np.arange(len(pixels)))
        return PublicSet(Samples(x, torch.zeros(len(x), dtype=torch.int64)), None, found)
    if name not in names and ("/" in name or name.startswith(".")):
        raise InputError(f"public.name: there is no folder {name}")
    raw = load_raw(name, root, classes)
    if raw.shape != shape:
        raise InputError(
            f"public.name: one sample of {name} has shape {raw.shape}, but the private data and so the models have "
            f"{shape}; choose a public set of the same shape"
        )
    free = np.arange(len(raw.y_train)) if judging is None else _others(raw.x_train, judging)
    besides = f"besides the {len(raw.y_train) - len(free)} by which models are chosen or judged"
    rows = free[_rows(samples, len(free), f"{name} {besides}" if len(free) < len(raw.y_train) else name, seed)]
    found = fingerprint(raw.x_train, raw.y_train, rows, (raw.scale, *raw.mean, *raw.std))
    return PublicSet(raw.train(rows), raw.class_names, found)


def _others(images: ByteArray, judging: ByteArray) -> IntArray:
    """Return the positions of the images that are none of ``judging``, to the pixel."""
    known = {_digest(image) for image in judging}
    return np.array([at for at, image in enumerate(images) if _digest(image) not in known], np.int64)


def _digest(image: ByteArray) -> bytes:
    return blake2b(image.tobytes(), digest_size=16).digest()


def _rows(number: int | None, there_are: int, name: str, seed: int) -> IntArray:
    """Return the positions of the samples asked for, ascending."""
    if number is None:
        return np.arange(there_are)
    if number > there_are:
        raise InputError(f"public.samples: {number} samples asked for, and there are {there_are} of {name}")
    return np.sort(numpy_stream(seed, "split", "public").permutation(there_are)[:number])
