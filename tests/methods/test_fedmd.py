"""FedMD: what travels, in which order a round goes, what the consensus is, and what is kept."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from fedstill.build import build
from fedstill.client import ClientWork, Site
from fedstill.config import load_config, to_toml
from fedstill.errors import InputError
from fedstill.experiment import resume
from fedstill.federation import Federation, FederationState, Record
from fedstill.methods import fedmd
from fedstill.methods.base import FederationInfo, RoundContext, Upload
from fedstill.methods.fedmd import FedMDFusion, FedMDSettings, Learner, Lesson, alignment_subset, stalled
from fedstill.models.fedmd import fedmd_cnn
from fedstill.payload import Kind, Payload, problem_with
from fedstill.weights import State, Weights
from small import play, same_state, small, untimed
from stopping import Stop, last_state, stopped

PUBLIC, PRIVATE, ALIGN, ROUNDS = 6, 4, 40, 3
OUTPUTS = PUBLIC + PRIVATE


def dropout_cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A model of the paper's layout, with BatchNorm and dropout, small."""
    return fedmd_cnn(input_shape, num_classes, widths=(3, 4), dropout=0.3)


COMMON = [
    "method=fedmd",
    "data.classes=[6, 7, 8, 9]",
    "data.train_samples=150",
    "data.clients=3",
    "public.name=digits",
    "public.classes=[0, 1, 2, 3, 4, 5]",
    "public.samples=90",
    "public.labels=separate",
    f"train.rounds={ROUNDS}",
    f"fedmd.align_samples={ALIGN}",
    "fedmd.digest_batch_size=16",
    "fedmd.public_epochs=2",
    "fedmd.public_batch_size=20",
    "fedmd.private_epochs=1",
]
KEYS = [
    *COMMON,
    "data.partition=per-class",
    "data.samples_per_class=5",
    f'model=[{{name="mlp",hidden=[12]}},{{name="{__name__}:dropout_cnn"}},{{name="mlp",hidden=[9]}}]',
]
ALIKE = [*COMMON, "data.partition=iid", "model.hidden=[12]"]


@contextmanager
def watched() -> Iterator[list[tuple[int, int, Lesson, Weights, Weights]]]:
    """Note every lesson: round, client, what was learnt, the model before and after."""
    study, seen = Learner.study, list[tuple[int, int, Lesson, Weights, Weights]]()

    def noted(learner: Learner, site: Site, lesson: Lesson, moments: State) -> list[Tensor]:
        before = learner.weights.clone()
        losses = study(learner, site, lesson, moments)
        seen.append((site.task.round, site.task.client, lesson, before, learner.weights.clone()))
        return losses

    with patch.object(Learner, "study", noted):
        yield seen


def logits_by_hand(federation: Federation, state: FederationState, client: int, x: Tensor) -> Tensor:
    """Return the logits of the model in a client's state, in eval mode, by PyTorch's own means."""
    module = federation.architectures[federation.architecture_of[client]].model.clone().module.eval()
    own = state.clients[client]
    module.load_state_dict({**own["params"], **own.get("buffers", {})})
    with torch.no_grad():
        return module(x)


def equal(one: Weights, other: Weights) -> bool:
    left, right = {**one.params, **one.buffers}, {**other.params, **other.buffers}
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# The shared subset


@pytest.mark.parametrize("sizes", [(30, 30, 30), (50, 20, 7, 3)])
def test_the_subset_has_every_class_by_its_share(sizes: tuple[int, ...]) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    for number in (1, 10, 31, len(labels) - 1):
        chosen = alignment_subset(labels, number, 0, 0)
        assert len(set(chosen.tolist())) == len(chosen) == number
        found = torch.bincount(labels[chosen], minlength=len(sizes))
        for count, size in zip(found.tolist(), sizes, strict=True):
            assert abs(count - number * size / len(labels)) <= 1


def test_the_subset_depends_on_seed_and_round_alone_and_is_capped() -> None:
    labels = torch.arange(60) % 3
    first = alignment_subset(labels, 20, 5, 2)
    torch.rand(7)  # the global stream is not used
    assert torch.equal(first, alignment_subset(labels, 20, 5, 2))
    assert not torch.equal(first, alignment_subset(labels, 20, 5, 3))
    assert not torch.equal(first, alignment_subset(labels, 20, 6, 2))
    assert torch.equal(alignment_subset(labels, 1000, 5, 2), torch.arange(60))
    hits = sum(torch.bincount(alignment_subset(labels, 20, 0, t), minlength=60) for t in range(300))
    assert int(hits.min()) > 50  # 100 times is what each is expected: nobody is left out
    assert int(hits.max()) < 150


# A round


def test_a_round_is_digest_on_the_consensus_then_revisit_and_all_share_one_subset() -> None:
    with watched() as seen:
        federation, state, _ = play(*KEYS)
    assert federation.public is not None
    public = federation.public
    for t in range(ROUNDS):
        own = {k: [entry for entry in seen if entry[:2] == (t, k)] for k in range(3)}
        wanted = ["digest", "revisit"] if t else ["public", "private"]
        assert all([lesson.name for _, _, lesson, *_ in entries] == wanted for entries in own.values())
        for k, (first, second) in own.items():
            assert equal(first[4], second[3])  # one after the other on the same model
            if t == 0:
                assert torch.equal(first[2].target, public.y)
                assert equal(first[3], federation.architectures[k].initial)
                continue
            assert equal(
                first[3], next(e for e in seen if e[:2] == (t - 1, k) and e[2].name in ("private", "revisit"))[4]
            )
            subset = alignment_subset(public.y, ALIGN, 0, t - 1)
            assert torch.equal(first[2].x, public.x[subset])
            assert torch.equal(first[2].target, own[0][0][2].target)  # the same consensus for all
            assert int(second[2].target.min()) >= PUBLIC  # private classes come after the public ones
    # The last consensus is the mean of what the models that are kept say of the last round's samples.
    x = public.x[alignment_subset(public.y, ALIGN, 0, ROUNDS - 1)]
    mean = sum(logits_by_hand(federation, state, k, x).double() for k in range(3)) / 3
    consensus = state.server.method["consensus"]["logits"]
    torch.testing.assert_close(consensus.double(), mean, rtol=0, atol=1e-5)
    assert consensus.shape == (ALIGN, OUTPUTS)


def test_only_logits_travel() -> None:
    _, state, records = play(*KEYS)
    each_way = 3 * ALIGN * OUTPUTS * 4
    assert [record["bytes"]["up"] for record in records] == [{"logits": each_way}] * ROUNDS
    assert [record["bytes"]["down"] for record in records] == [{}, *[{"logits": each_way}] * (ROUNDS - 1)]
    assert not state.server.weights.params
    assert len(state.models) == 1


def test_every_participant_is_measured_with_its_own_model() -> None:
    federation, state, records = play(*KEYS)
    test = federation.evaluation.sets["test"]
    found = [float((logits_by_hand(federation, state, k, test.x).argmax(1) == test.y).float().mean()) for k in range(3)]
    assert records[-1]["fused"]["test"]["per_client"] == pytest.approx(found)
    assert len(set(found)) > 1


def test_the_first_round_is_the_transfer_learning_and_more_rounds_do_not_change_it() -> None:
    _, _, short = play(*KEYS, rounds=1)
    _, _, whole = play(*KEYS)
    assert untimed(short)[0]["fused"] == untimed(whole)[0]["fused"]


# Invariant 7: identical parties


def site_of(federation: Federation, state: FederationState, client: int) -> Site:
    return federation.trainer.site([one.model for one in federation.architectures], federation.work(state, client))


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_identical_parties_digest_their_own_logits(weights: tuple[float, ...] | None) -> None:
    federation, _ = build(small(*ALIKE, "fedmd.head_decay=0.0"))
    settings = federation.config.fedmd.model_copy(update={"consensus_weights": weights})
    objective, fusion, info = fedmd.FedMDObjective(settings), FedMDFusion(settings, 2), federation.info
    site = site_of(federation, federation.start(), 0)
    turn = objective.run(site)
    server = fusion.start(Weights({}, {}), info)
    uploads = [Upload(client, turn.payload, 1, 1) for client in range(2)]
    server = fusion.fuse(server, uploads, RoundContext(0, info))
    received = fusion.broadcast(server, 0, info)
    assert torch.equal(received[Kind.LOGITS]["logits"], turn.payload[Kind.LOGITS]["logits"])

    later = replace(site, task=replace(site.task, round=1), received=received, state=turn.state)
    learner = Learner.of(later, settings)
    losses = learner.study(later, objective.consensus(later), learner.digest)
    assert float(losses[0]) < 1e-5
    apart = replace(later, received=Payload({Kind.LOGITS: {"logits": received[Kind.LOGITS]["logits"] + 1}}))
    losses = Learner.of(apart, settings).study(apart, objective.consensus(apart), learner.digest)
    assert float(losses[0]) == pytest.approx(1.0, abs=1e-3)


# By hand


def test_the_consensus_by_hand() -> None:
    info = FederationInfo((1, 1, 1), 2, (1, 1, 1), public=2)
    sent = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, -2.0], [7.0, 0.0]])]
    for weights, expected in (
        (None, [[3.0, 0.0], [5.0, 2.0]]),
        ((1.0, 9.0, 3.0), [[4.0, -1.0], [6.0, 1.0]]),  # clients 0 and 2 are the cohort: (1 a + 3 b) / 4
    ):
        fusion = FedMDFusion(FedMDSettings(consensus_weights=weights), 3)
        server = fusion.start(Weights({}, {}), info)
        assert fusion.broadcast(server, 0, info).parts == {}
        uploads = [
            Upload(k, Payload({Kind.LOGITS: {"logits": own}}), 1, 1) for k, own in zip((0, 2), sent, strict=True)
        ]
        assert all(problem_with(upload.payload, fusion.upload_like(server)) is None for upload in uploads)
        server = fusion.fuse(server, uploads, RoundContext(0, info))
        assert fusion.broadcast(server, 1, info)[Kind.LOGITS]["logits"].tolist() == expected
        assert problem_with(uploads[0].payload, fusion.upload_like(server)) is None


def test_without_a_digest_nobody_learns_from_anybody() -> None:
    weights = ["fedmd.consensus_weights=[1.0, 1.0, 1.0]", "fedmd.consensus_weights=[9.0, 1.0, 5.0]"]

    def ends(*keys: str) -> list[State]:
        federation, state, _ = play(*KEYS, *keys)
        return [state.clients[client] for client in range(len(federation.info.samples))]

    for epochs, same in (("0", True), ("1", False)):
        one, other = (ends(f"fedmd.digest_epochs={epochs}", consensus) for consensus in weights)
        assert same is all(
            torch.equal(left["params"][name], right["params"][name])
            for left, right in zip(one, other, strict=True)
            for name in left["params"]
        )


def test_an_upload_of_another_shape_is_refused() -> None:
    for public, rows in ((50, 20), (12, 12)):  # align_samples, capped by the public set
        fusion = FedMDFusion(FedMDSettings(align_samples=20), 1)
        server = fusion.start(Weights({}, {}), FederationInfo((1,), 7, (1, 1, 1), public=public))
        good = Payload({Kind.LOGITS: {"logits": torch.zeros(rows, 7)}})
        assert problem_with(good, fusion.upload_like(server)) is None
        for bad in (torch.zeros(rows + 1, 7), torch.zeros(rows, 6), torch.full((rows, 7), math.nan)):
            assert problem_with(Payload({Kind.LOGITS: {"logits": bad}}), fusion.upload_like(server))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("mae", 1.5), ("mse", 2.5), ("kl", 0.75 * math.log(1.5) + 0.25 * math.log(0.5))],
)
def test_the_digest_losses_by_hand(kind: str, expected: float) -> None:
    if kind == "kl":  # softmax of the consensus is (3/4, 1/4), of the own logits (1/2, 1/2)
        own, consensus = torch.tensor([[2.0, 2.0]] * 3), torch.tensor([[math.log(3) + 5, 5.0]] * 3)
    else:
        own, consensus = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert float(fedmd.DIGEST_LOSSES[kind](own, consensus)) == pytest.approx(expected)


@pytest.mark.parametrize(("mode", "step"), [("paper", 1 / (1 + 1e-8)), ("code", 1 / (1 + 1e-7 / math.sqrt(0.001)))])
def test_one_step_by_hand(mode: str, step: float) -> None:
    """One output is off by 1: gradient of the mean absolute value plus ``2 head_decay W``, and Adam's first step."""
    layer = nn.Sequential(nn.Linear(1, 2, bias=False)).double()
    start = Weights({"0.weight": torch.tensor([[3.0], [-1.0]], dtype=torch.float64)}, {})
    settings = FedMDSettings(mode=mode, lr=0.5, head_decay=0.25)
    learner = Learner(
        fedmd.Stateless(layer, "0"), start, settings, fedmd.Adam.start(start.params), fedmd.Adam.start(start.params)
    )
    x, target = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[4.0, -1.0]], dtype=torch.float64)
    loss = learner.step(
        Lesson("digest", x, target, torch.nn.functional.l1_loss, 1, 1), torch.tensor([0]), learner.digest
    )
    assert float(loss) == pytest.approx(0.5 + 0.25 * (9 + 1))
    # d/dw0 = -1/2 + 2 * 0.25 * 3 = 1, d/dw1 = 0 - 2 * 0.25 * 1 = -1/2
    found = learner.weights.params["0.weight"].flatten().tolist()
    assert found[0] == pytest.approx(3 - 0.5 * step, abs=1e-13)
    assert found[1] == pytest.approx(-1 + 0.5, abs=1e-5)
    assert int(learner.digest["count"]["steps"]) == 1
    assert int(learner.private["count"]["steps"]) == 0


def test_when_a_phase_has_stalled() -> None:
    means = [1.0, 0.5, 0.4995, 0.4994]
    assert not stalled(means, None, 1e-3)
    assert not stalled(means, 3, 1e-3)
    assert stalled(means, 2, 1e-3)
    assert not stalled(means, 2, 1e-4)
    assert not stalled([1.0], 1, 1e-3)


def test_patience_ends_the_transfer_learning_alone() -> None:
    still = [*ALIKE, "fedmd.lr=1e-9", "fedmd.public_epochs=9", "fedmd.private_epochs=9", "fedmd.revisit_epochs=5"]
    with watched() as seen:
        _, state, _ = play(*still, "fedmd.patience=3", rounds=2)
    assert [lesson.name for t, k, lesson, *_ in seen if k == 0] == ["public", "private", "digest", "revisit"]
    own = next(len(lesson.x) for _, k, lesson, *_ in seen if k == 0 and lesson.name == "private")
    transfer, revisit = 4 * math.ceil(own / 32), 5 * math.ceil(own / 5)  # the first epoch and three more
    assert int(state.clients[0]["private-count"]["steps"]) == transfer + revisit


# What is kept


def test_model_and_both_adams_go_on_over_the_rounds() -> None:
    _, state, _ = play(*KEYS)
    digest, revisit = math.ceil(ALIGN / 16), 2 * math.ceil(20 / 5)
    for own in state.clients.values():
        assert int(own["digest-count"]["steps"]) == digest * (ROUNDS - 1)
        assert int(own["private-count"]["steps"]) == 1 + revisit * (ROUNDS - 1)
        assert own["digest-first"].keys() == own["private-second"].keys() == own["params"].keys()
        assert any(bool(value.any()) for value in own["digest-second"].values())


def test_a_round_leaves_the_state_that_it_began_with_as_it_was() -> None:
    federation, state, _ = play(*KEYS, rounds=1)
    kept = {
        (k, group, name): value.clone()
        for k, own in state.clients.items()
        for group, tensors in own.items()
        for name, value in tensors.items()
    }
    following, _ = federation.run_round(state)
    assert all(torch.equal(state.clients[k][group][name], value) for (k, group, name), value in kept.items())
    assert not same_state(state, replace(following, round=state.round))


def test_absent_clients_keep_their_models_and_late_ones_transfer_first() -> None:
    partial = [*KEYS, "data.clients=4", "train.participation=0.5", "train.rounds=6"]
    with watched() as seen:
        federation, _ = build(small(*partial))
        state, states, cohorts = federation.start(), [], []
        for _ in range(6):
            state, record = federation.run_round(state)
            states.append(state)
            cohorts.append(record["cohort"])
    assert all(len(cohort) == 2 for cohort in cohorts)
    late = [k for k in range(4) if k not in cohorts[0] and any(k in cohort for cohort in cohorts)]
    assert late
    for k in late:
        t = next(t for t, cohort in enumerate(cohorts) if k in cohort)
        names = [lesson.name for at, who, lesson, *_ in seen if (at, who) == (t, k)]
        assert names == ["public", "private", "digest", "revisit"]
    for t in range(1, 6):
        for k in states[t - 1].clients.keys() - set(cohorts[t]):
            assert states[t].clients[k] is states[t - 1].clients[k]
        x = federation.public.x[alignment_subset(federation.public.y, ALIGN, 0, t)] if federation.public else None
        assert x is not None
        mean = sum(logits_by_hand(federation, states[t], k, x).double() for k in cohorts[t]) / 2
        consensus = states[t].server.method["consensus"]["logits"].double()
        torch.testing.assert_close(consensus, mean, rtol=0, atol=1e-5)


# The same bits


@pytest.fixture(scope="module")
def serial() -> tuple[FederationState, list[Record]]:
    _, state, records = play(*KEYS)
    return state, records


def test_threads_give_the_bits_of_serial(serial: tuple[FederationState, list[Record]]) -> None:
    _, state, records = play(*KEYS, "execution.executor=threads", "execution.workers=2")
    assert same_state(state, serial[0])
    assert untimed(records) == untimed(serial[1])


@pytest.mark.parametrize("at", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(
    tmp_path: Path, serial: tuple[FederationState, list[Record]], at: int
) -> None:
    stopped(small(*KEYS), tmp_path / "run", Stop(client_of=at))
    result = resume(tmp_path / "run")
    assert untimed(result.records) == untimed(serial[1])
    assert same_state(last_state(tmp_path / "run"), serial[0])


def test_a_long_phase_can_be_stopped() -> None:
    federation, _ = build(small(*KEYS, "fedmd.public_epochs=100000"))
    work: ClientWork = federation.work(federation.start(), 0)
    models = [one.model for one in federation.architectures]
    timer = threading.Timer(0.2, federation.trainer.stop.set)
    timer.start()
    with pytest.raises(InterruptedError):
        federation.trainer(models, work)


# What does not go


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ([*COMMON[:4], "data.partition=iid"], "needs a public set"),
        ([*KEYS, "public.labels=same"], "public.labels = 'separate'"),
        ([*KEYS, "fedmd.consensus_weights=[1.0, 2.0]"], "fedmd.consensus_weights: there are 3 clients and 2 weights"),
        ([*KEYS, "fedmd.consensus_weights=[1.0, 0.0, 2.0]"], "fedmd.consensus_weights"),
        ([*KEYS, "method=fedmd+fedftg"], "no global model"),
        ([*KEYS, 'eval.models=["sel"]'], "eval.models"),
        ([*KEYS, "fedmd.digest_loss=ce"], "fedmd.digest_loss"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_round(keys: list[str], says: str) -> None:
    with pytest.raises(InputError) as caught:
        build(small(*keys))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_without_a_weight_of_its_own_is_refused() -> None:
    params = {"other.weight": torch.zeros(2, 2)}
    module = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"fedmd\.head_decay = 0"):
        fedmd.head_weight(fedmd.Stateless(module, "0"), params)


# Settings


def test_the_modes_choose_adams_form(tmp_path: Path) -> None:
    assert FedMDSettings().adam == "pytorch"
    assert FedMDSettings(mode="code").adam == "keras"
    assert FedMDSettings(mode="code", adam="pytorch").adam == "pytorch"
    (tmp_path / "whole.toml").write_text(to_toml(small(*KEYS)))
    assert load_config(tmp_path / "whole.toml", ["fedmd.mode=code"]).fedmd.adam == "keras"
