"""What must hold whatever the numbers: methods that coincide, messages that survive the wire, bytes that add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedstill.conformance.replays.sites import client_turn, over_the_wire
from fedstill.conformance.replays.tiny import TinyCNN
from fedstill.distill.teachers import StackedTeachers
from fedstill.errors import InputError
from fedstill.methods.base import FederationInfo, LocalObjective, LocalTask, RoundContext, ServerFusion, Upload
from fedstill.methods.fedavg import FedAvgFusion, FedAvgObjective
from fedstill.methods.fedftg import FedFTG, FedFTGSettings
from fedstill.methods.fedprox import FedProxObjective, FedProxSettings
from fedstill.methods.scaffold import ScaffoldFusion, ScaffoldObjective, ScaffoldSettings
from fedstill.models import Stateless, initial_weights, parameter_count, split_state
from fedstill.payload import Kind, Payload, describe, model_payload, problem_with, scalars
from fedstill.rng import torch_stream
from fedstill.training import SGD, batches, step_count
from fedstill.weights import State, Weights

SHAPE, CLASSES = (1, 8, 8), 3
LOCAL = SGD(lr=0.1, momentum=0.0, weight_decay=1e-3, clip_norm=10.0)


def network(norm: bool = True) -> TinyCNN:
    with initial_weights(torch_stream(0, "network")):
        return TinyCNN(1, 3, 48, 5, CLASSES, norm)


def start(norm: bool = True) -> Weights:
    return Weights(*split_state(network(norm)))


def play(
    objective: LocalObjective,
    fusion: ServerFusion,
    rounds: int = 1,
    sizes: Sequence[int] = (7, 7, 7),
    norm: bool = True,
    sgd: SGD = LOCAL,
    refinement: FedFTG | None = None,
) -> Weights:
    """Run whole rounds with named streams, all clients in each; float32, as users do."""
    model, info = Stateless(network(norm)), FederationInfo(tuple(sizes), CLASSES, SHAPE, "fc")
    server, states = fusion.start(start(norm), info), [State() for _ in sizes]
    for round_ in range(rounds):
        uploads: list[Upload] = []
        for client, size in enumerate(sizes):
            data = torch_stream(0, "data", client)
            x, y = torch.randn(size, *SHAPE, generator=data), torch.randint(CLASSES, (size,), generator=data)
            steps = step_count(size, 3, 2, None)
            order = list(batches(size, 3, steps, torch_stream(0, "batches", round_, client)))
            task = LocalTask(round_, client, size, sgd.lr, sgd.lr, steps)
            counts = torch.bincount(y, minlength=CLASSES)
            turn = client_turn(model, objective, fusion, server, info, task, (x, y), order, sgd, states[client], counts)
            states[client] = turn.state
            uploads.append(turn.upload)
        server = fusion.fuse(server, uploads, RoundContext(0, info))
        if refinement is not None:
            counts = torch.stack([upload.label_counts for upload in uploads if upload.label_counts is not None])
            teachers = StackedTeachers.of(model, [upload.weights for upload in uploads], counts)
            context = RoundContext(round_, info, 1.0, lambda purpose: torch_stream(0, purpose), torch.device("cpu"))
            refined = refinement.refine(model, server.weights, teachers, {}, context)
            server = replace(server, weights=refined.weights)
    return server.weights


def same(left: Weights, right: Weights) -> bool:
    pairs = [(left.params, right.params), (left.buffers, right.buffers)]
    return all(one.keys() == other.keys() for one, other in pairs) and all(
        torch.equal(value, other[name]) for one, other in pairs for name, value in one.items()
    )


# Methods that coincide


@pytest.mark.parametrize("kind", ["proximal", "weight_decay_bug"])
def test_fedprox_without_mu_is_fedavg(kind: str) -> None:
    prox = FedProxObjective(FedProxSettings(mu=0.0, kind=kind))
    assert same(play(prox, FedAvgFusion(), rounds=3), play(FedAvgObjective(), FedAvgFusion(), rounds=3))


def test_fedprox_with_mu_is_not_fedavg_and_its_bug_is_weight_decay() -> None:
    fedavg = play(FedAvgObjective(), FedAvgFusion())
    proximal = play(FedProxObjective(FedProxSettings(mu=0.5)), FedAvgFusion())
    bug = play(FedProxObjective(FedProxSettings(mu=0.5, kind="weight_decay_bug")), FedAvgFusion())
    assert not same(proximal, fedavg)
    assert not same(proximal, bug)
    decayed = replace(LOCAL, weight_decay=LOCAL.weight_decay + 0.5)
    assert same(bug, play(FedAvgObjective(), FedAvgFusion(), sgd=decayed))


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_scaffolds_first_round_is_fedavgs_for_clients_of_equal_size(mode: str) -> None:
    settings = ScaffoldSettings(mode=mode)
    parts = ScaffoldObjective(settings), ScaffoldFusion(settings)
    assert same(play(*parts), play(FedAvgObjective(), FedAvgFusion()))
    assert not same(play(*parts, rounds=2), play(FedAvgObjective(), FedAvgFusion(), rounds=2))
    unequal = (4, 7, 10)
    assert not same(play(*parts, sizes=unequal), play(FedAvgObjective(), FedAvgFusion(), sizes=unequal))


def test_fedftg_without_iterations_is_its_base_method() -> None:
    small = {"batch_size": 4, "noise_dim": 5}
    idle = FedFTG(FedFTGSettings(iterations=0, **small))
    working = FedFTG(FedFTGSettings(iterations=1, **small))
    settings = ScaffoldSettings(mode="code")
    for parts in (
        (FedAvgObjective(), FedAvgFusion()),
        (ScaffoldObjective(settings), ScaffoldFusion(settings)),
    ):
        base = play(*parts, rounds=2)
        assert same(play(*parts, rounds=2, refinement=idle), base)
        assert not same(play(*parts, rounds=2, refinement=working), base)


def test_a_client_does_not_change_what_it_received() -> None:
    model, info, fusion = Stateless(network()), FederationInfo((6,), CLASSES, SHAPE), FedAvgFusion()
    server = fusion.start(start(), info)
    x, y = torch.randn(6, *SHAPE, generator=torch_stream(0, "x")), torch.arange(6) % CLASSES
    for objective in (FedAvgObjective(), FedProxObjective(FedProxSettings(mu=0.1))):
        task = LocalTask(0, 0, 6, 0.1, 0.1, 2)
        turn = client_turn(model, objective, fusion, server, info, task, (x, y), [torch.arange(6)] * 2, LOCAL, {})
        assert same(server.weights, start())
        assert same(turn.received.weights(), start())
        assert not same(turn.upload.weights, start())


# Messages


def message() -> Payload:
    payload = model_payload(start()).also(Kind.CONTROL_VARIATE, {"conv.weight": torch.randn(3, 1, 3, 3)})
    payload = payload.also(Kind.SCALARS, scalars(omega=1 / 3)).also(Kind.SCALARS, scalars(steps=4.0))
    return payload.also(Kind.LABEL_COUNTS, {"counts": torch.tensor([3, 0, 2])})


def test_a_message_survives_the_wire() -> None:
    sent = message()
    arrived = over_the_wire(sent)
    assert arrived.parts.keys() == sent.parts.keys()
    for kind, tensors in sent.parts.items():
        assert arrived[kind].keys() == tensors.keys()
        for name, value in tensors.items():
            assert arrived[kind][name].dtype == value.dtype
            assert torch.equal(arrived[kind][name], value)
    assert arrived.scalar("omega") == 1 / 3
    assert arrived.bytes_by_kind() == sent.bytes_by_kind()
    assert Kind.GENERATOR not in arrived
    assert over_the_wire(Payload()).parts == {}


def test_a_message_may_hold_a_tensor_twice_a_view_or_another_memory_layout() -> None:
    w = torch.randn(4, 3, 2, 2)
    sent = Payload({Kind.WEIGHTS: {"a": w, "b": w[1:3], "c": w.to(memory_format=torch.channels_last), "d": w.mT}})
    sent = sent.also(Kind.REFERENCE, {"a": w})
    arrived = over_the_wire(sent)
    assert all(torch.equal(arrived[Kind.WEIGHTS][name], value) for name, value in sent[Kind.WEIGHTS].items())
    assert torch.equal(arrived[Kind.REFERENCE]["a"], w)


def test_adding_to_a_message_leaves_the_old_one_as_it_was() -> None:
    old = model_payload(start())
    new = old.also(Kind.SCALARS, scalars(omega=1.0))
    assert Kind.SCALARS not in old
    assert new.weights().params.keys() == start().params.keys()
    assert Kind.BUFFERS not in model_payload(start(norm=False))


def framed(header: str, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"hello",
        bytes(8),
        b"\xff" * 200,
        framed("{"),
        framed('{"weights/a": 1}'),
        framed('{"weights/a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
        framed('{"weights/a":{"dtype":"F8_E8M0","shape":[1],"data_offsets":[0,1]}}', bytes(1)),
        framed('{"secrets/a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        framed('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        message().to_bytes()[:-1],
        message().to_bytes()[:100],
        message().to_bytes() + b"more",
    ],
)
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(InputError, match="payload"):
        Payload.from_bytes(garbage)


def changed(name: str, value: Tensor | None, buffers: bool = False) -> Payload:
    weights = start()
    group = weights.buffers if buffers else weights.params
    if value is None:
        del group[name]
    else:
        group[name] = value
    return model_payload(weights)


@pytest.mark.parametrize(
    ("upload", "says"),
    [
        (Payload(), "no weights"),
        (Payload({Kind.SCALARS: scalars(omega=1.0)}), "no weights"),
        (model_payload(Weights(start().params, {})), "no buffers"),
        (changed("fc.bias", None), "weights lack 'fc.bias'"),
        (changed("fc2.bias", torch.zeros(3)), "unknown tensor 'fc2.bias'"),
        (changed("bn.count", torch.zeros(3), buffers=True), "unknown tensor 'bn.count'"),
        (changed("fc.bias", torch.zeros(4)), "'fc.bias' is float32 (4,), expected float32 (3,)"),
        (changed("fc.bias", torch.zeros(3, 1)), "(3, 1)"),
        (changed("fc.bias", torch.zeros(3).double()), "float64 (3,), expected float32 (3,)"),
        (changed("fc.bias", torch.tensor([0.0, float("nan"), 0.0])), "weights 'fc.bias' is not finite"),
        (changed("fc.bias", torch.tensor([0.0, float("inf"), 0.0])), "not finite"),
        (changed("bn.running_var", torch.full((3,), float("nan")), buffers=True), "buffers 'bn.running_var' is not"),
        (changed("bn.num_batches_tracked", torch.tensor(1.0), buffers=True), "expected int64 ()"),
        (model_payload(start()).also(Kind.CONTROL_VARIATE, {"c": torch.zeros(1)}), "control-variate, which was not"),
    ],
)
def test_what_is_wrong_with_an_upload(upload: Payload, says: str) -> None:
    problem = problem_with(upload, model_payload(start()))
    assert problem is not None
    assert says in problem


def test_nothing_is_wrong_with_a_good_upload() -> None:
    assert problem_with(message(), message()) is None
    assert problem_with(model_payload(start(norm=False)), model_payload(start(norm=False))) is None
    assert describe(torch.zeros(2, 3)) == "float32 (2, 3)"


# Bytes


@pytest.mark.parametrize("norm", [True, False])
def test_fedavg_sends_the_model_each_way_and_scaffold_twice_that(norm: bool) -> None:
    model, info = Stateless(network(norm)), FederationInfo((6, 9), CLASSES, SHAPE)
    p = 4 * parameter_count(network(norm))
    buffers = {"buffers": 4 * 6 + 8} if norm else {}
    settings = ScaffoldSettings()
    fedavg: tuple[LocalObjective, ServerFusion] = (FedAvgObjective(), FedAvgFusion())
    fedprox: tuple[LocalObjective, ServerFusion] = (FedProxObjective(FedProxSettings()), FedAvgFusion())
    scaffold: tuple[LocalObjective, ServerFusion] = (ScaffoldObjective(settings), ScaffoldFusion(settings))
    x, y = torch.zeros(6, *SHAPE), torch.zeros(6, dtype=torch.int64)
    for (objective, fusion), more, scalar in (
        (fedavg, {}, {}),
        (fedprox, {}, {}),
        (scaffold, {"control-variate": p}, {"scalars": 8}),
    ):
        server = fusion.start(start(norm), info)
        task = LocalTask(0, 0, 6, 0.1, 0.1, 1)
        turn = client_turn(model, objective, fusion, server, info, task, (x, y), [torch.arange(6)], LOCAL, {})
        assert turn.received.bytes_by_kind() == {"weights": p, **buffers, **more, **scalar}
        assert turn.upload.payload.bytes_by_kind() == {"weights": p, **buffers, **more}


def test_the_released_scaffold_also_sends_the_model_before_refinement() -> None:
    info, p = FederationInfo((6, 9), CLASSES, SHAPE), 4 * parameter_count(network())
    fusion = ScaffoldFusion(ScaffoldSettings(mode="code"))
    sizes = fusion.broadcast(fusion.start(start(), info), 0, info).bytes_by_kind()
    assert sizes["reference-weights"] == sizes["control-variate"] == sizes["weights"] == p


def test_momentum_and_clip_by_hand() -> None:
    sgd = SGD(lr=0.5, momentum=0.5, weight_decay=0.1, clip_norm=5.0)
    params, velocity = [torch.tensor([2.0], dtype=torch.float64)], []
    grads, norm = sgd.clip([torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)])
    assert float(norm) == 5.0
    assert float(grads[0]) == pytest.approx(3.0, rel=1e-6)
    velocity = sgd.update(params, [torch.tensor([1.0], dtype=torch.float64)], velocity)
    assert float(params[0]) == pytest.approx(2.0 - 0.5 * 1.2)
    sgd.update(params, [torch.tensor([1.0], dtype=torch.float64)], velocity)
    assert float(params[0]) == pytest.approx(1.4 - 0.5 * (0.6 + 1.14))
