"""How each partition protocol of the literature draws the clients' shares of the training samples."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from fedstill.data.dataset import IntArray
from fedstill.errors import InputError

Random = np.random.Generator | np.random.RandomState

ATTEMPTS = 5_000
"""How often the protocols with a smallest size are drawn, up to 1,000 clients, before they are given up; seconds."""
REDRAWS = 10_000_000
"""How many draws of exhausted classes a replay may make in all; some seconds."""
GROUP = 10
"""How many clients share a part of the data in ``feddf``."""


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`~fedstill.data.partition.make_partition`, checked."""

    labels: IntArray
    classes: int
    clients: int
    beta: float
    sigma: float
    shards_per_client: int
    min_size: int
    ratio: float
    samples_per_class: int
    classes_per_client: int | None
    subclasses: IntArray | None = None

    @property
    def samples(self) -> int:
        """Number of training samples."""
        return len(self.labels)

    def members(self) -> list[IntArray]:
        """Return the positions of every class's samples, ascending."""
        return [np.flatnonzero(self.labels == label) for label in range(self.classes)]


@dataclass(frozen=True)
class Protocol:
    """How a protocol draws the shares.

    Attributes
    ----------
    summary : str
        One line.
    draw : callable
        The draw from a named stream.
    replay : callable or None
        The draw as the released code makes it, from a seed; None where there is none.
    takes : tuple of str
        Those of the keys ``sigma``, ``ratio`` and ``classes_per_client`` that it heeds.
    """

    summary: str
    draw: Callable[[Request, np.random.Generator], list[IntArray]]
    replay: Callable[[Request, int], list[IntArray]] | None = None
    takes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Pass:
    """One pass over the classes: the order of each one's samples, its cuts between the clients, the clients' sizes."""

    orders: list[IntArray]
    cuts: list[IntArray]
    sizes: IntArray

    def shares(self) -> list[IntArray]:
        """Return each client's samples, class by class."""
        pieces = [np.split(order, cut) for order, cut in zip(self.orders, self.cuts)]
        return [np.concatenate(own) for own in zip(*pieces)]


def _sizes(request: Request, rng: np.random.Generator) -> IntArray:
    """Return client sizes (clients,) that sum to the number of samples, each at least 1."""
    shares = _lognormal_shares(0, request, rng) if request.sigma else np.ones(request.clients) / request.clients
    # Everyone has one sample first; the others go by weight, what rounding leaves to the largest remainders.
    exact = shares * (request.samples - request.clients)
    sizes: IntArray = np.floor(exact).astype(np.int64) + 1
    left = request.samples - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:left]] += 1
    return sizes


def _lognormal_shares(mean: float, request: Request, rng: Random) -> npt.NDArray[np.float64]:
    """Return each client's part of the samples, by log-normal weights."""
    weights: npt.NDArray[np.float64] = rng.lognormal(mean, request.sigma, request.clients)
    with np.errstate(over="ignore"):
        total = weights.sum()
    if not (total > 0 and np.isfinite(total)):
        raise InputError(f"data.sigma: sizes that spread by {request.sigma:g} cannot be computed; take a smaller one")
    weights /= total
    return weights


def _cut(order: IntArray, sizes: IntArray) -> list[IntArray]:
    return np.split(order, np.cumsum(sizes)[:-1])


def _iid(request: Request, rng: np.random.Generator) -> list[IntArray]:
    return _cut(rng.permutation(request.samples), _sizes(request, rng))


def _shards(request: Request, rng: np.random.Generator) -> list[IntArray]:
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


def _per_client(request: Request, rng: np.random.Generator) -> list[IntArray]:
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


def _per_client_replay(request: Request, rng: np.random.RandomState) -> list[IntArray]:
    """Follow the law of :func:`_per_client` by FedFTG's calls, which draw again for exhausted classes."""
    samples, clients = request.samples, request.clients
    shuffled = rng.permutation(samples)
    stacks = [shuffled[request.labels[shuffled] == label].tolist() for label in range(request.classes)]
    sizes = np.floor(_lognormal_shares(np.log(samples // clients), request, rng) * samples).astype(np.int64)
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


def _pass_over(orders: Iterable[IntArray], clients: int, beta: float, full: float, rng: Random) -> _Pass:
    """Cut each class between the clients by a Dirichlet draw, past those that hold ``full`` samples or more.

    ``orders`` may draw from ``rng`` itself: a class is asked for right before its own Dirichlet draw.
    """
    taken, cuts = [], []
    sizes = np.zeros(clients, np.int64)
    for order in orders:
        weights = rng.dirichlet(np.full(clients, beta)) * (sizes < full)
        if not weights.sum() > 0:
            weights = (sizes == sizes.min()).astype(np.float64)
        cut = (np.cumsum(weights / weights.sum()) * len(order)).astype(np.int64)[:-1]
        taken.append(order)
        cuts.append(cut)
        sizes += np.diff(cut, prepend=0, append=len(order))
    return _Pass(taken, cuts, sizes)


def _attempts(clients: int) -> int:
    """Return how many draws are tried: fewer where one takes longer."""
    return min(ATTEMPTS, max(100, 1_000 * ATTEMPTS // clients))


def _first(draw: Callable[[], _Pass], clients: int, smallest: int) -> _Pass | None:
    """Return the first draw that gives every client ``smallest`` samples, or None."""
    draws = (draw() for _ in range(_attempts(clients)))
    return next((made for made in draws if made.sizes.min() >= smallest), None)


def _shuffled(members: Iterable[IntArray], rng: Random) -> Iterator[IntArray]:
    for own in members:
        order = own.copy()
        rng.shuffle(order)
        yield order


def _with_min_size(request: Request, protocol: str, samples: int, draw: Callable[[], _Pass]) -> list[IntArray]:
    """Return the first draw in which each client has ``min_size`` of the ``samples`` that are handed out."""
    clients, smallest = request.clients, request.min_size
    if smallest < 1:
        raise InputError(f"data.min_size must be at least 1, it is {smallest}")
    if smallest * clients > samples:
        raise InputError(
            f"data.min_size: {clients} clients cannot have {smallest} samples each of {samples}; take fewer "
            f"data.clients or a smaller data.min_size{' or a larger data.ratio' if request.ratio < 1 else ''}"
        )
    made = _first(draw, clients, smallest)
    if made is None:
        raise InputError(
            f"data.min_size: none of {_attempts(clients)} draws of {protocol!r} gave all {clients} "
            f"clients {smallest} samples; take a smaller data.min_size, fewer data.clients or a "
            f"larger data.beta (it is {request.beta})"
        )
    return made.shares()


def _per_class(request: Request, rng: Random) -> list[IntArray]:
    """Share each class over the clients by a Dirichlet draw, until every client has ``min_size`` samples."""
    members, full = request.members(), request.samples / request.clients

    def draw() -> _Pass:
        return _pass_over(_shuffled(members, rng), request.clients, request.beta, full, rng)

    indices = _with_min_size(request, "dirichlet-per-class", request.samples, draw)
    for share in indices:
        rng.shuffle(share)
    return indices


def _fedgen(request: Request, rng: Random) -> list[IntArray]:
    """Share a part of each class as :func:`_per_class` does; the part is new in every attempt.

    With a ratio below 1 no class gives more than ``ratio * N / clients`` samples, which is a client's own limit
    and not the class's part of the data: of 60,000 samples of 10 classes and 20 clients, 0.5 leaves 15,000.
    """
    members, full = request.members(), request.ratio * request.samples / request.clients
    kept = [int(min(full, request.ratio * len(own))) if request.ratio < 1 else len(own) for own in members]

    def draw() -> _Pass:
        parts = (order[:most] for order, most in zip(_shuffled(members, rng), kept))
        return _pass_over(parts, request.clients, request.beta, full, rng)

    return _with_min_size(request, "fedgen", sum(kept), draw)


def _feddf_order(request: Request, rng: Random) -> IntArray:
    """Return all samples (N,) in the order of FedDF's clients before they are cut again into equal slices.

    Each group of clients shares its own slice of the shuffled data, until the smallest has half the mean.
    """
    order = np.arange(request.samples)
    rng.shuffle(order)
    starts = range(0, request.clients, GROUP)
    rows = int(GROUP / request.clients * request.samples)
    slices = np.split(order, [rows * group for group in range(1, len(starts))])
    shares: list[IntArray] = []
    for start, own in zip(starts, slices):
        clients = min(GROUP, request.clients - start)
        members = [own[request.labels[own] == label] for label in range(request.classes)]
        draw = partial(_pass_over, members, clients, request.beta, len(own) / clients, rng)
        made = _first(draw, clients, int(0.5 * len(own) / clients))
        if made is None:
            raise InputError(
                f"'feddf': none of {ATTEMPTS} draws gave each of {clients} clients of a group half their mean "
                f"size; take a larger data.beta (it is {request.beta}) or another seed"
            )
        shares += made.shares()
    return np.concatenate(shares)


def _feddf(request: Request, rng: np.random.Generator) -> list[IntArray]:
    return _cut(_feddf_order(request, rng), _sizes(request, rng))


def _feddf_replay(request: Request, rng: np.random.RandomState) -> list[IntArray]:
    size = request.samples // request.clients  # the released code drops what is left
    return np.split(_feddf_order(request, rng)[: size * request.clients], request.clients)


def _multinomial(request: Request, rng: np.random.Generator) -> list[IntArray]:
    """Let the clients in turn draw without replacement, a sample's weight being its class's in the mixture.

    Where only classes without weight are left, their samples are equally likely.
    """
    mixtures = np.maximum(rng.dirichlet(np.full(request.classes, request.beta), request.clients), 1e-300)
    pool = np.arange(request.samples)
    shares = []
    for mixture, size in zip(mixtures, _sizes(request, rng)):
        # A race of exponential clocks: who comes first has the law of drawing one after another.
        arrival = rng.exponential(size=len(pool)) / mixture[request.labels[pool]]
        first = np.zeros(len(pool), bool)
        first[np.argpartition(arrival, size - 1)[:size]] = True
        shares.append(pool[first])
        pool = pool[~first]
    return shares


def _multinomial_replay(request: Request, seed: int) -> list[IntArray]:
    """Follow :func:`_multinomial` by the calls of FedFTG's prepare_data.py, on PyTorch's CPU stream."""
    stream = torch.Generator().manual_seed(seed)
    labels, left = torch.from_numpy(request.labels), torch.ones(request.samples)
    concentration = torch.full((request.classes,), request.beta)
    size = request.samples // request.clients  # the released code drops what is left
    shares = []
    for client in range(request.clients):
        # What torch.distributions.Dirichlet calls, which takes no generator.
        mixture = torch._sample_dirichlet(concentration, generator=stream)
        weights = mixture[labels] * left
        if int((weights > 0).sum()) < size:
            raise InputError(
                f"data.replay: client {client} of {request.clients} finds fewer than {size} samples of the classes "
                f"it draws, where the released code stops; set data.replay to false or take a larger data.beta"
            )
        own = torch.multinomial(weights, size, generator=stream)
        left[own] = 0
        shares.append(own.numpy())
    return shares


def _counted_per_class(request: Request, rng: np.random.Generator) -> list[IntArray]:
    """Give every client ``samples_per_class`` samples of each of its classes, which follow one another in a circle."""
    each = request.samples_per_class
    own = request.classes if request.classes_per_client is None else request.classes_per_client
    if each < 1:
        raise InputError(f"data.samples_per_class must be at least 1, it is {each}")
    if not 1 <= own <= request.classes:
        raise InputError(f"data.classes_per_client must be from 1 to the {request.classes} classes, it is {own}")
    held = np.arange(request.clients * own).reshape(request.clients, own) % request.classes
    wanted = each * np.bincount(held.ravel(), minlength=request.classes)
    there = np.bincount(request.labels, minlength=request.classes)
    if (wanted > there).any():
        short = int(np.argmax(wanted > there))
        raise InputError(
            f"data.samples_per_class: {wanted[short] // each} clients are to have {each} samples each of class "
            f"{short}, which has {there[short]}; take fewer, fewer data.clients or data.classes_per_client, "
            f"or more data.train_samples"
        )
    stacks = [iter(order[: len(order) // each * each].reshape(-1, each)) for order in _shuffled(request.members(), rng)]
    return [np.concatenate([next(stacks[label]) for label in hand]) for hand in held]


def _counted_per_subclass(request: Request, rng: np.random.Generator) -> list[IntArray]:
    """Give client k ``samples_per_class`` samples of each class, all from its sub-class number k mod their number."""
    each, fine = request.samples_per_class, request.subclasses
    if fine is None:
        raise InputError(
            "data.partition: 'per-subclass' needs a data set whose classes have sub-classes: "
            "data.name = 'cifar100_superclasses'"
        )
    if each < 1:
        raise InputError(f"data.samples_per_class must be at least 1, it is {each}")
    hands: list[list[IntArray]] = [[] for _ in range(request.clients)]
    for label, members in enumerate(request.members()):
        if not len(members):
            raise InputError(
                f"data.partition: 'per-subclass': class {label} has no sample; take more data.train_samples"
            )
        kinds = np.unique(fine[members])
        for place, kind in enumerate(kinds):
            own = rng.permutation(members[fine[members] == kind])
            takers = hands[place :: len(kinds)]
            if each * len(takers) > len(own):
                raise InputError(
                    f"data.samples_per_class: {len(takers)} clients are to have {each} samples each of sub-class "
                    f"{kind} of class {label}, which has {len(own)}; take fewer, fewer data.clients, or more "
                    f"data.train_samples"
                )
            for turn, hand in enumerate(takers):
                hand.append(own[turn * each : (turn + 1) * each])
    return [np.concatenate([np.zeros(0, np.int64), *hand]) for hand in hands]


def _legacy(
    draw: Callable[[Request, np.random.RandomState], list[IntArray]],
) -> Callable[[Request, int], list[IntArray]]:
    """Return a draw from NumPy's legacy generator as one from a seed."""
    return lambda request, seed: draw(request, np.random.RandomState(seed))


PROTOCOLS = {
    "iid": Protocol("a shuffle cut into slices, every client like the whole", _iid, takes=("sigma",)),
    "dirichlet-per-client": Protocol(
        "each client draws its class mixture from Dir(beta), sizes equal or log-normal (FedDyn, FedFTG)",
        _per_client,
        _legacy(_per_client_replay),
        takes=("sigma",),
    ),
    "dirichlet-per-class": Protocol(
        "each class is shared over the clients by Dir(beta), sizes unequal (MOON, NIID-Bench)",
        _per_class,
        _legacy(_per_class),
    ),
    "shards": Protocol("sorted by label, cut into shards, some shards per client (McMahan et al.)", _shards),
    "feddf": Protocol(
        "dirichlet-per-class within groups of 10 clients, cut again into equal slices, so that neighbours mix (FedDF)",
        _feddf,
        _legacy(_feddf_replay),
    ),
    "fedgen": Protocol(
        "dirichlet-per-class on a part of the data, set by the ratio (FedGen)",
        _fedgen,
        _legacy(_fedgen),
        takes=("ratio",),
    ),
    "multinomial": Protocol(
        "clients in turn draw by their mixture from Dir(beta), sizes equal, the last take the rest (FedFTG's mode 1)",
        _multinomial,
        _multinomial_replay,
    ),
    "per-class": Protocol(
        "a fixed number of samples of each of a client's classes, the others unused (FedMD)",
        _counted_per_class,
        takes=("classes_per_client",),
    ),
    "per-subclass": Protocol(
        "a fixed number of samples of each class, from one of its sub-classes by client (FedMD's unequal CIFAR)",
        _counted_per_subclass,
    ),
}
