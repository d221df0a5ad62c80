from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fedstill.data import Partition, client_parts, list_protocols, make_partition, notes, protocols
from fedstill.errors import InputError

PROTOCOLS = [name for name, _ in list_protocols()]
WHOLE = [name for name in PROTOCOLS if not name.startswith("per-")]
LABELS = np.random.default_rng(5).integers(0, 10, 2003)
NAMES = [f"class {label}" for label in range(10)]


def make(labels: np.ndarray = LABELS, classes: int = 10, **changes: Any) -> Partition:
    asked: dict[str, Any] = {
        "protocol": "dirichlet-per-client",
        "clients": 10,
        "beta": 0.5,
        "sigma": 0.0,
        "shards_per_client": 2,
        "min_size": 10,
        "replay": False,
        "subclasses": labels * 2 + np.arange(len(labels)) % 2,
        "seed": 0,
    }
    return make_partition(labels, classes, **(asked | changes))


def holding(*shares: list[int], classes: int = 3, labels: list[int]) -> Partition:
    counts = np.array([np.bincount([labels[i] for i in share], minlength=classes) for share in shares])
    return Partition(tuple(np.array(share) for share in shares), counts, "by hand", "")


@pytest.mark.parametrize("protocol", WHOLE)
@pytest.mark.parametrize("clients", [1, 7, 10, 11, 25])
def test_every_sample_is_used_once_and_counted(protocol: str, clients: int) -> None:
    made = make(protocol=protocol, clients=clients)
    assert len(made.indices) == clients
    assert sorted(np.concatenate(made.indices)) == list(range(len(LABELS)))
    for own, counts in zip(made.indices, made.counts):
        assert own.dtype == np.int64
        assert np.array_equal(np.bincount(LABELS[own], minlength=10), counts)
    assert made.counts.shape == (clients, 10)
    assert made.protocol == protocol


@pytest.mark.parametrize("protocol", ["dirichlet-per-client", "dirichlet-per-class", "fedgen"])
def test_replays_use_every_sample_once_too(protocol: str) -> None:
    made = make(protocol=protocol, replay=True, beta=1.0)
    assert sorted(np.concatenate(made.indices)) == list(range(len(LABELS)))


@pytest.mark.parametrize("protocol", ["feddf", "multinomial"])
def test_replays_of_equal_sizes_drop_what_is_left(protocol: str) -> None:
    made = make(protocol=protocol, replay=True, beta=1.0)
    used = np.concatenate(made.indices)
    assert {len(own) for own in made.indices} == {200}
    assert len(set(used)) == 2000


@pytest.mark.parametrize("protocol", ["iid", "dirichlet-per-client", "feddf", "multinomial"])
def test_equal_sizes_differ_by_one_at_most(protocol: str) -> None:
    sizes = [len(own) for own in make(protocol=protocol, clients=100).indices]
    assert sorted(sizes) == [20] * 97 + [21] * 3


@pytest.mark.parametrize("protocol", ["iid", "dirichlet-per-client"])
def test_sigma_spreads_the_sizes(protocol: str) -> None:
    sizes = np.array([len(own) for own in make(protocol=protocol, clients=200, sigma=1.0).indices])
    assert sizes.min() >= 1
    assert sizes.max() > 3 * np.median(sizes)


def test_as_many_clients_as_samples() -> None:
    others = [(protocol, 0.0) for protocol in ("shards", "feddf", "multinomial")]
    for protocol, sigma in (("iid", 3.0), ("dirichlet-per-client", 3.0), *others):
        made = make(LABELS[:50], protocol=protocol, sigma=sigma, clients=50, shards_per_client=1)
        assert {len(own) for own in made.indices} == {1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_fingerprint_is_that_of_the_shares(protocol: str) -> None:
    first, again, other = (make(protocol=protocol, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    digest = hashlib.sha256((10).to_bytes(8, "little"))
    for own in first.indices:
        digest.update(len(own).to_bytes(8, "little") + b"".join(int(i).to_bytes(8, "little") for i in own))
    assert first.fingerprint == digest.hexdigest()


def test_fingerprint_depends_on_nothing_a_protocol_does_not_use() -> None:
    plain = make(protocol="iid").fingerprint
    assert make(protocol="iid", beta=3.0, min_size=4, shards_per_client=5, samples_per_class=9).fingerprint == plain
    assert make(LABELS.astype(np.uint8), protocol="iid").fingerprint == plain


def test_clients_of_an_iid_partition_are_like_the_whole() -> None:
    labels = np.arange(100_000) % 10
    counts = make(labels, protocol="iid").counts
    assert np.abs(counts / 10_000 - 0.1).max() < 0.015


def test_shares_tend_to_the_drawn_mixture_when_no_class_runs_out() -> None:
    # With many clients no class runs out before the end, so the realised shares have the variance of Dir(beta).
    beta, classes = 2.0, 5
    labels = np.arange(200_000) % classes
    shares = make(labels, classes, clients=400, beta=beta).counts / 500
    assert shares.var(axis=0).mean() == pytest.approx(0.16 / (classes * beta + 1), rel=0.15)
    assert shares.mean(axis=0) == pytest.approx(np.full(classes, 0.2))


def test_small_beta_gives_few_classes_and_large_beta_all() -> None:
    labels = np.arange(20_000) % 10
    few = (make(labels, clients=20, beta=0.05).counts > 50).sum(axis=1).mean()
    many = (make(labels, clients=20, beta=100.0).counts > 50).sum(axis=1).mean()
    assert few < 4
    assert many == 10


@pytest.mark.parametrize("beta", [1e-3, 1e-6])
def test_mixtures_that_underflow_still_end(beta: float) -> None:
    made = make(beta=beta, clients=50)
    assert made.counts.sum() == len(LABELS)


def test_a_class_without_samples_is_nobodys() -> None:
    for protocol in WHOLE:
        labels = np.where(LABELS == 4, 5, LABELS)
        assert make(labels, protocol=protocol).counts[:, 4].sum() == 0


def test_ten_thousand_clients_take_seconds() -> None:
    labels = np.arange(50_000) % 100
    start = time.perf_counter()
    made = make(labels, 100, clients=10_000, beta=0.1)
    assert time.perf_counter() - start < 20
    assert made.counts.sum() == 50_000


def test_per_class_reaches_the_minimum() -> None:
    made = make(protocol="dirichlet-per-class", clients=20, beta=0.3, min_size=25)
    assert min(len(own) for own in made.indices) >= 25


def test_shards_hold_few_classes() -> None:
    labels = np.sort(np.arange(1000) % 10)
    made = make(labels, protocol="shards", clients=10, shards_per_client=2)
    assert (made.counts > 0).sum(axis=1).max() <= 2
    assert {len(own) for own in made.indices} == {100}


def test_feddf_mixes_within_groups_of_ten() -> None:
    # A group of ten is like the whole, for its slice comes from a shuffle; its clients are not.
    labels = np.arange(20_000) % 10
    counts = make(labels, protocol="feddf", clients=40, beta=0.1).counts
    assert np.abs(counts.reshape(4, 10, 10).sum(axis=1) / 5_000 - 0.1).max() < 0.02
    assert (counts > 50).sum(axis=1).mean() < 5


def test_feddf_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "ATTEMPTS", 1)
    with pytest.raises(InputError, match=r"half their mean size; take a larger data\.beta"):
        make(protocol="feddf", beta=1e-3)


@pytest.mark.parametrize(
    ("classes", "of_each", "ratio", "kept"),
    [(10, 6000, 0.5, 1500), (26, 4800, 0.1, 480), (10, 6000, 1.0, 6000)],
    ids=["mnist", "emnist", "all"],
)
def test_fedgen_keeps_what_the_released_files_hold(classes: int, of_each: int, ratio: float, kept: int) -> None:
    """Their 20 users share 15,000 samples of MNIST with ratio 0.5 and 12,480 of EMNIST with ratio 0.1."""
    labels = np.repeat(np.arange(classes), of_each)
    made = make(labels, classes, protocol="fedgen", clients=20, beta=1.0, ratio=ratio)
    assert made.counts.sum(axis=0).tolist() == [kept] * classes
    assert len(set(np.concatenate(made.indices))) == kept * classes
    assert min(len(own) for own in made.indices) >= 10


@pytest.mark.parametrize("replay", [False, True])
def test_multinomial_has_the_law_of_drawing_one_after_another(replay: bool) -> None:
    # Two samples of each of two classes; the first client takes two. With a mixture (p, 1 - p), p uniform, both are
    # of class 0 with probability p * p / (2 - p), which is 4 log 2 - 5/2 on average.
    draws = 3000
    drawn = Counter(
        int(
            make(
                np.array([0, 0, 1, 1]), 2, protocol="multinomial", clients=2, beta=1.0, replay=replay, seed=seed
            ).counts[0, 0]
        )
        for seed in range(draws)
    )
    both = 4 * math.log(2) - 2.5
    for held, expected in ((0, both), (1, 1 - 2 * both), (2, both)):
        assert drawn[held] / draws == pytest.approx(expected, abs=0.03)


def test_multinomial_gives_the_last_clients_what_is_left() -> None:
    labels = np.arange(1000) % 10
    made = make(labels, protocol="multinomial", beta=1e-6)
    # Each client takes all of a class, or what is there of it, before it takes of another.
    assert made.counts[0].max() == 100
    assert made.counts.sum(axis=0).tolist() == [100] * 10


def test_a_multinomial_replay_stops_where_no_class_with_weight_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # Today's PyTorch gives every class some weight; others did not.
    monkeypatch.setattr(protocols.torch, "_sample_dirichlet", lambda *_, **__: torch.eye(10)[4])
    with pytest.raises(InputError, match=r"client 1 of 10 finds fewer than 100 samples.*set data\.replay to false"):
        make(np.arange(1000) % 10, protocol="multinomial", replay=True)


def test_per_class_gives_every_client_its_number_of_every_class() -> None:
    made = make(protocol="per-class", clients=10, samples_per_class=3)
    assert made.counts.tolist() == [[3] * 10] * 10
    assert len(set(np.concatenate(made.indices))) == 300
    for own in made.indices:
        assert np.bincount(LABELS[own], minlength=10).tolist() == [3] * 10


def test_per_class_takes_classes_in_a_circle() -> None:
    made = make(np.arange(40) % 5, 5, protocol="per-class", clients=5, samples_per_class=2, classes_per_client=3)
    assert made.counts.tolist() == [
        [2, 2, 2, 0, 0],
        [2, 0, 0, 2, 2],
        [0, 2, 2, 2, 0],
        [2, 2, 0, 0, 2],
        [0, 0, 2, 2, 2],
    ]


def test_per_class_can_use_up_every_sample() -> None:
    made = make(np.arange(60) % 3, 3, protocol="per-class", clients=4, samples_per_class=5)
    assert sorted(np.concatenate(made.indices)) == list(range(60))
    with pytest.raises(InputError, match=r"4 clients are to have 5 samples each of class 2, which has 19; take fewer"):
        make((np.arange(60) % 3)[:59], 3, protocol="per-class", clients=4, samples_per_class=5)


def test_per_subclass_gives_a_client_one_subclass_of_each_class() -> None:
    """Two classes: 0 has the sub-classes 4, 7, 9, and 1 has 2, 5; their samples are mixed."""
    fine = np.array([4, 2, 7, 5, 9, 2, 4, 5, 7, 2, 9, 5, 4, 2, 7, 5, 9, 2, 4, 5])
    labels = np.isin(fine, [2, 5]).astype(np.int64)
    made = make(labels, 2, protocol="per-subclass", clients=4, samples_per_class=2, subclasses=fine)
    assert made.counts.tolist() == [[2, 2]] * 4
    assert [sorted(fine[own]) for own in made.indices] == [[2, 2, 4, 4], [5, 5, 7, 7], [2, 2, 9, 9], [4, 4, 5, 5]]
    assert len(set(np.concatenate(made.indices))) == 16
    others = make(labels, 2, protocol="per-subclass", clients=4, samples_per_class=2, subclasses=fine, seed=1)
    assert others.fingerprint != made.fingerprint


def test_per_subclass_that_cannot_be() -> None:
    fine = np.arange(40) % 4
    with pytest.raises(
        InputError, match=r"2 clients are to have 6 samples each of sub-class 1 of class 1, which has 10"
    ):
        make(fine % 2, 2, protocol="per-subclass", clients=3, samples_per_class=6, subclasses=np.where(fine, fine, 2))
    with pytest.raises(InputError, match=r"class 2 has no sample; take more data\.train_samples"):
        make(fine % 2, 3, protocol="per-subclass", clients=2, subclasses=fine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, r"data\.beta"),
        ({"beta": float("nan")}, r"data\.beta"),
        ({"sigma": -1.0}, r"data\.sigma"),
        ({"sigma": 1000.0}, r"data\.sigma: sizes that spread by 1000 cannot be computed"),
        ({"sigma": 1000.0, "replay": True}, r"data\.sigma: sizes that spread by 1000 cannot be computed"),
        ({"sigma": 0.5, "protocol": "shards"}, r"data\.sigma has no meaning for 'shards'"),
        ({"clients": 0}, r"data\.clients must be at least 1"),
        ({"clients": 2004}, r"data\.clients: 2004 clients cannot share 2003"),
        ({"protocol": "dirichlet-per-clint"}, "did you mean 'dirichlet-per-client'"),
        ({"protocol": "iid", "replay": True}, r"data\.replay: there is no replay of 'iid'"),
        ({"replay": True, "seed": -1}, "seed must be from 0"),
        ({"protocol": "shards", "shards_per_client": 0}, r"data\.shards_per_client"),
        ({"protocol": "shards", "shards_per_client": 201}, r"data\.shards_per_client.*from 1 to 200"),
        ({"protocol": "dirichlet-per-class", "min_size": 0}, r"data\.min_size must be"),
        ({"protocol": "dirichlet-per-class", "min_size": 201}, r"data\.min_size: 10 clients cannot"),
        ({"protocol": "dirichlet-per-class", "min_size": 190, "beta": 0.01}, r"smaller data\.min_size.*data\.beta"),
        ({"replay": True, "sigma": 30.0}, "without a sample"),
        ({"protocol": "fedgen", "ratio": 0.0}, r"data\.ratio must be"),
        ({"protocol": "fedgen", "ratio": 1.5}, r"data\.ratio must be"),
        ({"protocol": "fedgen", "ratio": float("nan")}, r"data\.ratio must be"),
        ({"protocol": "fedgen", "ratio": 0.01}, r"data\.min_size: 10 clients cannot.*or a larger data\.ratio$"),
        ({"protocol": "fedgen", "min_size": 0}, r"data\.min_size must be"),
        ({"protocol": "iid", "ratio": 0.5}, r"data\.ratio has no meaning for 'iid', only for fedgen; set it to 1"),
        ({"protocol": "per-class", "samples_per_class": 0}, r"data\.samples_per_class must be"),
        ({"protocol": "per-class", "classes_per_client": 0}, r"data\.classes_per_client must be from 1 to the 10"),
        ({"protocol": "per-class", "classes_per_client": 11}, r"data\.classes_per_client must be from 1 to the 10"),
        ({"protocol": "per-subclass", "samples_per_class": 0}, r"data\.samples_per_class must be"),
        ({"protocol": "per-subclass", "subclasses": None}, r"data\.partition: 'per-subclass' needs a data set whose"),
        ({"protocol": "per-class", "replay": True}, r"data\.replay: there is no replay of 'per-class'"),
        (
            {"protocol": "iid", "classes_per_client": 2},
            r"data\.classes_per_client has no meaning for 'iid'.*leave it out",
        ),
        ({"protocol": "multinomial", "replay": True, "seed": 2**32}, "seed must be from 0"),
    ],
)
def test_values_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**changes)


def test_a_replay_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "REDRAWS", 1000)
    with pytest.raises(InputError, match=r"set data\.replay to false"):
        make(replay=True, beta=0.01)


def test_labels_beyond_the_classes() -> None:
    with pytest.raises(InputError, match="beyond the 9 classes"):
        make(LABELS, 9)


def test_client_parts_split_every_share() -> None:
    made = make(clients=7)
    for own, parts in zip(made.indices, client_parts(made, 0.1, 0.2, seed=0)):
        train, validation, test = parts
        assert sorted(np.concatenate(parts)) == sorted(own)
        assert len(validation) == round(0.1 * len(own))
        assert len(test) == round(0.2 * len(own))
        place = {int(index): at for at, index in enumerate(own)}
        assert all(place[a] < place[b] for a, b in pairwise(train.tolist()))


def test_client_parts_keep_one_training_sample() -> None:
    made = holding([0], [1, 2], [3, 4, 5], labels=[0] * 6)
    parts = client_parts(made, 0.45, 0.5, seed=0)
    assert [[len(part) for part in client] for client in parts] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_client_parts_of_nothing_are_the_shares() -> None:
    made = make()
    for own, (train, validation, test) in zip(made.indices, client_parts(made, 0, 0, seed=0)):
        assert np.array_equal(train, own)
        assert len(validation) == len(test) == 0


def test_client_parts_depend_on_the_client_and_the_seed_alone() -> None:
    made = make(clients=7)
    fewer = replace(made, indices=made.indices[:3])
    pairs = zip(client_parts(made, 0.2, 0.2, seed=1), client_parts(fewer, 0.2, 0.2, seed=1))
    assert all(np.array_equal(a, b) for one, other in pairs for a, b in zip(one, other))
    other = client_parts(made, 0.2, 0.2, seed=2)
    assert not np.array_equal(client_parts(made, 0.2, 0.2, seed=1)[0][0], other[0][0])


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.0), (0.0, -0.1), (0.5, 0.5), (float("nan"), 0.0)])
def test_client_parts_out_of_range(validation: float, test: float) -> None:
    with pytest.raises(InputError, match="less than 1 together"):
        client_parts(make(), validation, test, seed=0)


def test_notes_are_silent_on_an_ordinary_partition() -> None:
    assert notes(make(protocol="iid"), NAMES, 50) == []


def test_notes_tell_what_is_unusual() -> None:
    made = holding([0], [1, 2], [3, 4, 5, 6], labels=[0, 0, 1, 1, 1, 0, 0])
    unheld, single, small = notes(made, ["cat", "dog", "owl"], 3)
    assert "no client holds a sample of owl" in unheld
    assert single == "1 of 3 clients holds a single sample: 0"
    assert small == "2 of 3 clients hold fewer samples than a batch of 3; their batches are what they have"
