"""Training, server validation and test samples of an experiment, drawn from its seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedstill.data.dataset import IntArray, RawDataSet, Samples
from fedstill.data.fingerprint import Fingerprints, fingerprint
from fedstill.errors import InputError
from fedstill.rng import numpy_stream


@dataclass(frozen=True, eq=False)
class Splits:
    """Three disjoint sets of samples; ``server_validation`` may be empty.

    Attributes
    ----------
    train : Samples
        What the clients share.
    server_validation : Samples
        Labelled samples that only the server has, cut from the training part.
    test : Samples
        What the models are judged by.
    fingerprints : mapping
        ``train``, ``validation``, ``test`` -> digest of that part.
    positions : mapping
        The same names -> where that part lies in the file; of a source without official split, all in its one part.
    subclasses : int64 array, (N,), or None
        The training samples' labels finer than their classes, where the source has them.
    """

    train: Samples
    server_validation: Samples
    test: Samples
    fingerprints: Fingerprints = field(default_factory=dict)
    positions: Mapping[str, IntArray] = field(default_factory=dict)
    subclasses: IntArray | None = None


def split(
    raw: RawDataSet, *, train_samples: int | None, test_samples: int | None, server_validation: int, seed: int
) -> Splits:
    """Draw the samples of an experiment; every part keeps the order of the file.

    Where the source has no official split, ``raw.held_out`` samples drawn at random are its test part. A
    part that is asked for whole is taken whole; otherwise it is drawn at random. Training samples are taken
    from the start of a shuffle and validation samples from its end, so for one seed a smaller training
    set lies within a larger one, and asking for validation changes it only when nothing else is left.

    Parameters
    ----------
    raw : RawDataSet
        The data; only the chosen samples become float32.
    train_samples, test_samples : int or None
        How many samples; None takes all there are (for training: all that validation leaves).
    server_validation : int
        How many samples of the training part the server keeps; 0 for none.
    seed : int
        Seed of the experiment.

    Raises
    ------
    InputError
        When a number is too small or more is asked for than there is; it names the key.
    """
    train_pool = np.arange(len(raw.y_train))
    test_pool = np.arange(len(raw.y_test))
    if raw.held_out:
        shuffled = numpy_stream(seed, "split", "held out").permutation(train_pool)
        test_pool, train_pool = np.sort(shuffled[: raw.held_out]), np.sort(shuffled[raw.held_out :])

    if server_validation < 0:
        raise InputError(f"data.server_validation must be 0 or more, it is {server_validation}")
    left = len(train_pool) - server_validation
    if left < 1:
        raise InputError(
            f"data.server_validation: {server_validation} samples asked for, and {raw.name} has "
            f"{len(train_pool)} training samples, of which the clients need some"
        )
    there_are = f"{raw.name} has {left} training samples"
    if server_validation:
        there_are += f" besides {server_validation} for data.server_validation"
    train_count = _count("data.train_samples", train_samples, left, there_are)
    there_are = f"{raw.name} has {len(test_pool)} test samples"
    test_count = _count("data.test_samples", test_samples, len(test_pool), there_are)

    train_pool = numpy_stream(seed, "split", "train").permutation(train_pool)
    test_pool = numpy_stream(seed, "split", "test").permutation(test_pool)
    # Sorted into the order of the file, so that a whole part is the published one, as a replay needs.
    train, validation = np.sort(train_pool[:train_count]), np.sort(train_pool[left:])
    test = np.sort(test_pool[:test_count])
    return Splits(
        train=raw.train(train),
        server_validation=raw.train(validation),
        test=raw.train(test) if raw.held_out else raw.test(test),
        fingerprints=_fingerprints(raw, train, validation, test),
        positions={"train": train, "validation": validation, "test": test},
        subclasses=None if raw.subclasses is None else raw.subclasses[train],
    )


def _fingerprints(raw: RawDataSet, train: IntArray, validation: IntArray, test: IntArray) -> Fingerprints:
    """Return the digest of every part that has samples, by their positions."""
    of_train, constants = (raw.x_train, raw.y_train), (raw.scale, *raw.mean, *raw.std)
    of_test = of_train if raw.held_out else (raw.x_test, raw.y_test)
    parts = {"train": (*of_train, train), "validation": (*of_train, validation), "test": (*of_test, test)}
    return {name: fingerprint(x, y, rows, constants) for name, (x, y, rows) in parts.items() if len(rows)}


def _count(key: str, asked: int | None, available: int, there_are: str) -> int:
    if asked is None:
        return available
    if asked < 1:
        raise InputError(f"{key} must be 1 or more, it is {asked}")
    if asked > available:
        raise InputError(f"{key}: {asked} samples asked for, and {there_are}")
    return asked
