"""The public set: what FedMD's participants learn from together, and FedDF's unlabelled samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedstill.data.dataset import Samples
from fedstill.data.folder import load_folder
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
    """

    samples: Samples
    class_names: tuple[str, ...] | None


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
        x = load_folder(Path(name), shape).x
        public = PublicSet(Samples(x, torch.zeros(len(x), dtype=torch.int64)), None)
    elif name not in names and ("/" in name or name.startswith(".")):
        raise InputError(f"public.name: there is no folder {name}")
    else:
        raw = load_raw(name, root, classes)
        if raw.shape != shape:
            raise InputError(
                f"public.name: one sample of {name} has shape {raw.shape}, but the private data and so the models have "
                f"{shape}; choose a public set of the same shape"
            )
        public = PublicSet(raw.train(), raw.class_names)
    return PublicSet(_subset(public.samples, samples, name, seed), public.class_names)


def _subset(samples: Samples, number: int | None, name: str, seed: int) -> Samples:
    if number is None:
        return samples
    if number > len(samples):
        raise InputError(f"public.samples: {number} samples asked for, and {name} has {len(samples)}")
    chosen = numpy_stream(seed, "split", "public").permutation(len(samples))[:number]
    return samples.take(np.sort(chosen))
