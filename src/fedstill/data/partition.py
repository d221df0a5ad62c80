"""Which client holds which training samples: the protocols of the literature, and what came of them."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedstill.data.dataset import IntArray
from fedstill.errors import InputError
from fedstill.names import unknown
from fedstill.rng import numpy_stream

Random = np.random.Generator | np.random.RandomState

ATTEMPTS = 1_000
"""How often ``dirichlet-per-class`` is drawn before it is given up."""
REDRAWS = 10_000_000
"""How many draws of exhausted classes a replay may make in all; some seconds."""


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


@dataclass(frozen=True)
class _Request:
    """The arguments of :func:`make_partition`, checked."""

    labels: IntArray
    classes: int
    clients: int
    beta: float
    sigma: float
    shards_per_client: int
    min_size: int

    @property
    def samples(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class _Protocol:
    """How a protocol draws the shares, its summary, and the draw with the authors' random stream if any."""

    summary: str
    draw: Callable[[_Request, np.random.Generator], list[IntArray]]
    replay: Callable[[_Request, np.random.RandomState], list[IntArray]] | None = None
    takes_sigma: bool = False


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
    replay: bool = False,
    seed: int = 0,
) -> Partition:
    """Share the training samples among the clients.

    Every sample is used. Where a protocol gives equal sizes, they differ by at most one.

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
        Smallest client that ``dirichlet-per-class`` accepts; the authors' value is 10.
    replay : bool
        Draw exactly as the released code does, with NumPy's legacy generator seeded with ``seed``: for
        ``dirichlet-per-client`` (FedFTG's loop, its rejection included) and ``dirichlet-per-class`` (MOON).
    seed : int
        Seed of the experiment.

    Raises
    ------
    InputError
        For values out of range (naming the key), an unknown protocol, a replay that does not exist or does
        not end, and a minimum size that is not reached.
    """
    if protocol not in _PROTOCOLS:
        raise unknown("partition protocol", protocol, _PROTOCOLS)
    chosen = _PROTOCOLS[protocol]
    request = _Request(
        np.asarray(labels, dtype=np.int64), num_classes, clients, beta, sigma, shards_per_client, min_size
    )
    _check(request, protocol)
    if not replay:
        indices = chosen.draw(request, numpy_stream(seed, "partition"))
    elif chosen.replay:
        indices = chosen.replay(request, _legacy_stream(seed))
    else:
        known = ", ".join(name for name, entry in _PROTOCOLS.items() if entry.replay)
        raise InputError(f"data.replay: there is no replay of {protocol!r}, only of {known}; set it to false")
    empty = [client for client, own in enumerate(indices) if len(own) == 0]
    if empty:
        raise InputError(
            f"{protocol!r} leaves {len(empty)} of {clients} clients without a sample, client {empty[0]} "
            f"among them: take another seed, fewer data.clients, or a smaller data.sigma"
        )
    return Partition(tuple(indices), _count(request, indices), protocol, _fingerprint(indices))


def list_protocols() -> list[tuple[str, str]]:
    """Return (name, one-line summary) of every protocol."""
    return [(name, entry.summary) for name, entry in _PROTOCOLS.items()]


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


def notes(partition: Partition, class_names: Sequence[str], batch_size: int) -> list[str]:
    """Return one line on each thing about a partition that is allowed but worth knowing.

    Parameters
    ----------
    partition : Partition
        The shares.
    class_names : sequence of str
        One name per class.
    batch_size : int
        The clients' batch size.
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
    small = np.flatnonzero(sizes < batch_size)
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


def _check(request: _Request, protocol: str) -> None:
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
    if request.sigma and not _PROTOCOLS[protocol].takes_sigma:
        known = " and ".join(name for name, entry in _PROTOCOLS.items() if entry.takes_sigma)
        raise InputError(f"data.sigma has no meaning for {protocol!r}, only for {known}; set it to 0")
    if request.labels.min() < 0 or request.labels.max() >= request.classes:
        raise InputError(f"the labels go beyond the {request.classes} classes from 0")


def _count(request: _Request, indices: Sequence[IntArray]) -> IntArray:
    owner = np.repeat(np.arange(request.clients), [len(own) for own in indices])
    cell = owner * request.classes + request.labels[np.concatenate(indices)]
    flat = np.bincount(cell, minlength=request.clients * request.classes)
    return flat.reshape(request.clients, request.classes).astype(np.int64)


def _fingerprint(indices: Sequence[IntArray]) -> str:
    digest = hashlib.sha256(np.array(len(indices), "<i8").tobytes())
    for own in indices:
        digest.update(np.array(len(own), "<i8").tobytes())
        digest.update(own.astype("<i8").tobytes())
    return digest.hexdigest()


def _legacy_stream(seed: int) -> np.random.RandomState:
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be from 0 to 2**32 - 1 with data.replay, it is {seed}")
    return np.random.RandomState(seed)


def _sizes(request: _Request, rng: np.random.Generator) -> IntArray:
    """Return client sizes (clients,) that sum to the number of samples, each at least 1."""
    weights = rng.lognormal(0, request.sigma, request.clients) if request.sigma else np.ones(request.clients)
    # Everyone has one sample first; the others go by weight, what rounding leaves to the largest remainders.
    exact = weights / weights.sum() * (request.samples - request.clients)
    sizes: IntArray = np.floor(exact).astype(np.int64) + 1
    left = request.samples - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:left]] += 1
    return sizes


def _cut(order: IntArray, sizes: IntArray) -> list[IntArray]:
    return np.split(order, np.cumsum(sizes)[:-1])


def _iid(request: _Request, rng: np.random.Generator) -> list[IntArray]:
    return _cut(rng.permutation(request.samples), _sizes(request, rng))


def _shards(request: _Request, rng: np.random.Generator) -> list[IntArray]:
    shards = request.clients * request.shards_per_client
    if not request.clients <= shards <= request.samples:
        raise InputError(
            f"data.shards_per_client: {request.shards_per_client} shards for each of {request.clients} "
            f"clients cannot be cut from {request.samples} training samples; it must be from 1 to "
            f"{request.samples // request.clients}"
        )
    shuffled = rng.permutation(request.samples)
    by_label = shuffled[np.argsort(request.labels[shuffled], kind="stable")]
    pieces = np.array_split(by_label, shards)
    dealt = rng.permutation(shards).reshape(request.clients, request.shards_per_client)
    return [np.concatenate([pieces[shard] for shard in hand]) for hand in dealt]


def _per_client(request: _Request, rng: np.random.Generator) -> list[IntArray]:
    """Draw each sample's client uniformly among those not full and its class from the client's mixture.

    The mixture is taken over the classes that are not exhausted, which is the law of drawing again until
    such a class comes up; where the classes left have no weight at all, they are equally likely.
    """
    quota = _sizes(request, rng).tolist()
    mixtures = rng.dirichlet(np.full(request.classes, request.beta), request.clients)
    shuffled = rng.permutation(request.samples)
    stacks = [shuffled[request.labels[shuffled] == label].tolist() for label in range(request.classes)]
    left = np.array([float(len(stack) > 0) for stack in stacks])
    waiting = list(range(request.clients))
    shares: list[list[int]] = [[] for _ in waiting]
    for for_client, for_class in rng.random((request.samples, 2)).tolist():
        slot = int(for_client * len(waiting))
        client = waiting[slot]
        cumulative = (mixtures[client] * left).cumsum()
        if cumulative[-1] < np.finfo(np.float64).tiny:
            cumulative = left.cumsum()
        # 1 - u lies in (0, 1]: the first class to reach it has weight, and the last one does reach it.
        label = int(cumulative.searchsorted((1 - for_class) * cumulative[-1]))
        shares[client].append(stacks[label].pop())
        if not stacks[label]:
            left[label] = 0
        if len(shares[client]) == quota[client]:
            waiting[slot] = waiting[-1]
            waiting.pop()
    return [np.array(share, np.int64) for share in shares]


def _per_client_replay(request: _Request, rng: np.random.RandomState) -> list[IntArray]:
    """Follow the law of :func:`_per_client` by FedFTG's calls, which draw again for exhausted classes."""
    samples, clients = request.samples, request.clients
    shuffled = rng.permutation(samples)
    stacks = [shuffled[request.labels[shuffled] == label].tolist() for label in range(request.classes)]
    weights = rng.lognormal(np.log(samples // clients), request.sigma, clients)
    sizes = np.floor(weights / weights.sum() * samples).astype(np.int64)
    sizes[0] += samples - sizes.sum()
    quota = sizes.tolist()
    mixtures = rng.dirichlet([request.beta] * request.classes, clients)
    if not np.isfinite(mixtures).all():
        raise InputError(f"data.beta: {request.beta} is too small for data.replay; set data.replay to false")
    cumulative = mixtures.cumsum(axis=1).tolist()
    shares: list[list[int]] = [[] for _ in range(clients)]
    redraws = 0
    for _ in range(samples):
        client = rng.randint(clients)
        while not quota[client]:
            client = rng.randint(clients)
        quota[client] -= 1
        while True:
            # A sum that rounding left below 1 can be missed; the released argmax then answers class 0.
            label = bisect_left(cumulative[client], rng.random_sample()) % request.classes
            if stacks[label]:
                break
            redraws += 1
            if redraws > REDRAWS:
                raise InputError(
                    f"data.replay: the released loop had drawn {REDRAWS} exhausted classes with "
                    f"{sum(quota) + 1} samples still to give, and may never end; "
                    f"set data.replay to false, which follows the same law"
                )
        shares[client].append(stacks[label].pop())
    return [np.array(share[::-1], np.int64) for share in shares]


def _per_class(request: _Request, rng: Random) -> list[IntArray]:
    """Share each class over the clients by a Dirichlet draw, until every client has ``min_size`` samples."""
    if request.min_size < 1:
        raise InputError(f"data.min_size must be at least 1, it is {request.min_size}")
    if request.min_size * request.clients > request.samples:
        raise InputError(
            f"data.min_size: {request.clients} clients cannot have {request.min_size} samples each of "
            f"{request.samples}; take fewer data.clients or a smaller data.min_size"
        )
    members = [np.flatnonzero(request.labels == label) for label in range(request.classes)]
    for _ in range(ATTEMPTS):
        orders, cuts = [], []
        sizes = np.zeros(request.clients, np.int64)
        for own in members:
            order = own.copy()
            rng.shuffle(order)
            weights = rng.dirichlet(np.full(request.clients, request.beta))
            weights = weights * (sizes < request.samples / request.clients)
            if not weights.sum() > 0:
                weights = (sizes == sizes.min()).astype(np.float64)
            cut = (np.cumsum(weights / weights.sum()) * len(order)).astype(np.int64)[:-1]
            orders.append(order)
            cuts.append(cut)
            sizes += np.diff(cut, prepend=0, append=len(order))
        if sizes.min() >= request.min_size:
            break
    else:
        raise InputError(
            f"data.min_size: none of {ATTEMPTS} draws of 'dirichlet-per-class' gave all {request.clients} "
            f"clients {request.min_size} samples; take a smaller data.min_size, fewer data.clients or a "
            f"larger data.beta (it is {request.beta})"
        )
    pieces = [np.split(order, cut) for order, cut in zip(orders, cuts)]
    indices = [np.concatenate(own) for own in zip(*pieces)]
    for share in indices:
        rng.shuffle(share)
    return indices


_PROTOCOLS = {
    "iid": _Protocol("a shuffle cut into slices, every client like the whole", _iid, takes_sigma=True),
    "dirichlet-per-client": _Protocol(
        "each client draws its class mixture from Dir(beta), sizes equal or log-normal (FedDyn, FedFTG)",
        _per_client,
        _per_client_replay,
        takes_sigma=True,
    ),
    "dirichlet-per-class": _Protocol(
        "each class is shared over the clients by Dir(beta), sizes unequal (MOON, NIID-Bench)",
        _per_class,
        _per_class,
    ),
    "shards": _Protocol("sorted by label, cut into shards, some shards per client (McMahan et al.)", _shards),
}
