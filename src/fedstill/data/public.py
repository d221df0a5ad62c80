"""The public set: what FedMD's participants learn from together, and FedDF's unlabelled samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedstill.data.dataset import IntArray, Samples
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
    rows = _rows(samples, len(raw.y_train), name, seed)
    found = fingerprint(raw.x_train, raw.y_train, rows, (raw.scale, *raw.mean, *raw.std))
    return PublicSet(raw.train(rows), raw.class_names, found)


def _rows(number: int | None, there_are: int, name: str, seed: int) -> IntArray:
    """Return the positions of the samples asked for, ascending."""
    if number is None:
        return np.arange(there_are)
    if number > there_are:
        raise InputError(f"public.samples: {number} samples asked for, and {name} has {there_are}")
    return np.sort(numpy_stream(seed, "split", "public").permutation(there_are)[:number])
