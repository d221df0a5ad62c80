"""Which client holds which training samples: the protocols of the literature, and what came of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedstill.data.dataset import IntArray
from fedstill.data.protocols import PROTOCOLS, Request
from fedstill.errors import InputError
from fedstill.names import unknown
from fedstill.rng import numpy_stream

_NEUTRAL = {"sigma": (0, "set it to 0"), "ratio": (1, "set it to 1"), "classes_per_client": (None, "leave it out")}
"""Keys that only some protocols heed: the value that says nothing, and how to say nothing."""


@dataclass(frozen=True, eq=False)
class Partition:
    """The clients' shares of the training samples.

    Attributes
    ----------
    indices : tuple of int64 array, each (n_k,)
        Positions in the training samples, by client; no position is used twice.
    counts : int64 array, (clients, classes)
        How many samples of a class a client holds.
    protocol : str
        The protocol that made it.
    fingerprint : str
        SHA-256 of the shares alone, in hex: equal for equal indices in equal order.
    """

    indices: tuple[IntArray, ...]
    counts: IntArray
    protocol: str
    fingerprint: str


def make_partition(
    labels: npt.NDArray[np.integer],
    num_classes: int,
    *,
    protocol: str,
    clients: int,
    beta: float = 0.3,
    sigma: float = 0.0,
    shards_per_client: int = 2,
    min_size: int = 10,
    ratio: float = 1.0,
    samples_per_class: int = 3,
    classes_per_client: int | None = None,
    subclasses: npt.NDArray[np.integer] | None = None,
    replay: bool = False,
    seed: int = 0,
) -> Partition:
    """Share the training samples among the clients.

    Every sample is used, save by ``fedgen`` with a ratio below 1, by ``per-class`` and ``per-subclass``, and by the
    replays of ``feddf`` and ``multinomial``, which drop the last N mod ``clients`` samples. Where a protocol gives
    equal sizes, they differ by at most one.

    Parameters
    ----------
    labels : integer array, (N,)
        Labels of the training samples, from 0.
    num_classes : int
        Number of classes.
    protocol : str
        One of :func:`list_protocols`.
    clients : int
        Number of clients, at least 1 and at most N.
    beta : float
        Concentration of the Dirichlet protocols; a small one makes clients differ more.
    sigma : float
        Spread of log-normal client sizes for ``iid`` and ``dirichlet-per-client``; 0 for equal sizes, and
        0 for the other protocols.
    shards_per_client : int
        For ``shards``.
    min_size : int
        Smallest client that ``dirichlet-per-class`` and ``fedgen`` accept; the authors' value is 10 (FedGen's on
        EMNIST is 10 times the number of classes).
    ratio : float
        For ``fedgen``, above 0 and at most 1: a class gives at most the smaller of ``ratio * N / clients`` and
        ``ratio`` times its samples, and a client that holds ``ratio * N / clients`` gets no more classes. With 1 every
        sample is used, as in the released code.
    samples_per_class : int
        For ``per-class`` and ``per-subclass``: how many samples of each of its classes a client gets; FedMD's letters
        and CIFAR have 3, 20 from one sub-class.
    classes_per_client : int or None
        For ``per-class``: how many classes c a client has, client k those with the numbers (k c + j) modulo the
        number of classes, j = 0 to c - 1; by default all.
    subclasses : integer array, (N,), or None
        For ``per-subclass``: labels finer than the classes. Of a class with s of them client k gets samples of the one
        in place k mod s, in ascending order.
    replay : bool
        Draw exactly as the released code does, with its generator seeded with ``seed``: NumPy's legacy one for
        ``dirichlet-per-client`` (FedFTG's loop, its rejection included), ``dirichlet-per-class`` (MOON), ``feddf`` and
        ``fedgen`` (classes in the order of their numbers), PyTorch's for ``multinomial`` (FedFTG's other loop; these
        bits belong to the version of PyTorch).
    seed : int
        Seed of the experiment.

    Raises
    ------
    InputError
        For values out of range (naming the key), an unknown protocol, a replay that does not exist or does
        not end, and a minimum size that is not reached.
    """
    if protocol not in PROTOCOLS:
        raise unknown("partition protocol", protocol, PROTOCOLS)
    chosen = PROTOCOLS[protocol]
    request = Request(
        labels=np.asarray(labels, dtype=np.int64),
        classes=num_classes,
        clients=clients,
        beta=beta,
        sigma=sigma,
        shards_per_client=shards_per_client,
        min_size=min_size,
        ratio=ratio,
        samples_per_class=samples_per_class,
        classes_per_client=classes_per_client,
        subclasses=None if subclasses is None else np.asarray(subclasses, dtype=np.int64),
    )
    _check(request, protocol)
    if not replay:
        indices = chosen.draw(request, numpy_stream(seed, "partition"))
    elif chosen.replay:
        if not 0 <= seed < 2**32:
            raise InputError(f"seed must be from 0 to 2**32 - 1 with data.replay, it is {seed}")
        indices = chosen.replay(request, seed)
    else:
        known = ", ".join(name for name, entry in PROTOCOLS.items() if entry.replay)
        raise InputError(f"data.replay: there is no replay of {protocol!r}, only of {known}; set it to false")
    empty = [client for client, own in enumerate(indices) if len(own) == 0]
    if empty:
        raise InputError(
            f"{protocol!r} leaves {len(empty)} of {clients} clients without a sample, client {empty[0]} "
            f"among them: take another seed, fewer data.clients, or a smaller data.sigma"
        )
    counts = class_counts(request.labels, request.classes, indices)
    return Partition(tuple(indices), counts, protocol, _fingerprint(indices))


def list_protocols() -> list[tuple[str, str]]:
    """Return (name, one-line summary) of every protocol."""
    return [(name, entry.summary) for name, entry in PROTOCOLS.items()]


def client_parts(
    partition: Partition, validation: float, test: float, seed: int
) -> list[tuple[IntArray, IntArray, IntArray]]:
    """Split every client's share into its own training, validation and test samples.

    A part's size is its fraction of the share, rounded; where nothing would be left for training, first the
    test part and then the validation part is made smaller. The parts keep the order of the share.

    Parameters
    ----------
    partition : Partition
        The shares.
    validation, test : float
        Fractions of a share, at least 0 and less than 1 together.
    seed : int
        Seed of the experiment; every client has a stream of its own.

    Returns
    -------
    list of (train, validation, test)
        By client; positions in the training samples. Train is never empty.

    Raises
    ------
    InputError
        For fractions out of range.
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise InputError(
            f"data.client_validation ({validation}) and data.client_test ({test}) must be at least 0 and less than 1 "
            f"together"
        )
    if validation == test == 0:
        return [(own, own[:0], own[:0]) for own in partition.indices]
    parts = []
    for client, own in enumerate(partition.indices):
        most = len(own) - 1
        held = min(round(validation * len(own)), most)
        tested = min(round(test * len(own)), most - held)
        order = numpy_stream(seed, "client parts", client).permutation(len(own))
        cuts = np.split(order, [held, held + tested])
        in_validation, in_test, in_train = (own[np.sort(cut)] for cut in cuts)
        parts.append((in_train, in_validation, in_test))
    return parts


def notes(partition: Partition, class_names: Sequence[str], batch_size: int | None) -> list[str]:
    """Return one line on each thing about a partition that is allowed but worth knowing.

    Parameters
    ----------
    partition : Partition
        The shares.
    class_names : sequence of str
        One name per class.
    batch_size : int or None
        The clients' batch size; None where the method has batches of its own.
    """
    sizes = partition.counts.sum(axis=1)
    clients = len(sizes)
    lines = []
    unheld = [name for name, count in zip(class_names, partition.counts.sum(axis=0)) if count == 0]
    if unheld:
        lines.append(f"no client holds a sample of {_some(unheld)}: nothing can be learnt of it from them")
    single = [str(client) for client in np.flatnonzero(sizes == 1)]
    if single:
        lines.append(f"{len(single)} of {clients} clients hold{_s(single)} a single sample: {_some(single)}")
    small = np.flatnonzero(sizes < (batch_size or 0))
    if len(small):
        lines.append(
            f"{len(small)} of {clients} clients hold{_s(small)} fewer samples than a batch of {batch_size}; "
            f"their batches are what they have"
        )
    return lines


def _s(things: Sequence[object] | IntArray) -> str:
    return "s" if len(things) == 1 else ""


def _some(names: Sequence[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _check(request: Request, protocol: str) -> None:
    if request.clients < 1:
        raise InputError(f"data.clients must be at least 1, it is {request.clients}")
    if request.clients > request.samples:
        raise InputError(
            f"data.clients: {request.clients} clients cannot share {request.samples} training samples; "
            f"take fewer clients or more data.train_samples"
        )
    if not (request.beta > 0 and math.isfinite(request.beta)):
        raise InputError(f"data.beta must be a number above 0, it is {request.beta}")
    if not (request.sigma >= 0 and math.isfinite(request.sigma)):
        raise InputError(f"data.sigma must be a number of at least 0, it is {request.sigma}")
    if not 0 < request.ratio <= 1:
        raise InputError(f"data.ratio must be a number above 0 and at most 1, it is {request.ratio}")
    for key, (neutral, remedy) in _NEUTRAL.items():
        if getattr(request, key) != neutral and key not in PROTOCOLS[protocol].takes:
            known = " and ".join(name for name, entry in PROTOCOLS.items() if key in entry.takes)
            raise InputError(f"data.{key} has no meaning for {protocol!r}, only for {known}; {remedy}")
    if request.labels.min() < 0 or request.labels.max() >= request.classes:
        raise InputError(f"the labels go beyond the {request.classes} classes from 0")


def class_counts(labels: IntArray, classes: int, indices: Sequence[IntArray]) -> IntArray:
    """Return how many samples of a class each client holds, (clients, classes)."""
    owner = np.repeat(np.arange(len(indices)), [len(own) for own in indices])
    cell = owner * classes + labels[np.concatenate(indices)]
    flat = np.bincount(cell, minlength=len(indices) * classes)
    return flat.reshape(len(indices), classes).astype(np.int64)


def _fingerprint(indices: Sequence[IntArray]) -> str:
    digest = hashlib.sha256(np.array(len(indices), "<i8").tobytes())
    for own in indices:
        digest.update(np.array(len(own), "<i8").tobytes())
        digest.update(own.astype("<i8").tobytes())
    return digest.hexdigest()
