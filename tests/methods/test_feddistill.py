"""FedDistill and FedDistill+: running means by label, the distillation by hand, what travels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedstill.build import build
from fedstill.config import load_config
from fedstill.conformance.replays.sites import client_turn
from fedstill.errors import InputError
from fedstill.methods.base import FederationInfo, LocalTask, RoundContext, Upload
from fedstill.methods.fedavg import FedAvgFusion, FedAvgObjective
from fedstill.methods.feddistill import FedDistillFusion, FedDistillObjective, FedDistillSettings
from fedstill.models import Stateless, build_model, split_state
from fedstill.payload import Kind, Payload
from fedstill.rng import torch_stream
from fedstill.runs.checkpoint import CheckpointStore
from fedstill.training import SGD, train_locally
from fedstill.weights import State, Tensors, Weights
from small import play, same_state, same_weights, small, untimed

BN = ["model.name=cnn", "model.width=4", "model.norm=bn"]
SKEWED = ["data.partition=dirichlet-per-class", "data.beta=1.0", "data.min_size=5", "local.batch_size=15"]
LOGITS, PLUS = FedDistillSettings(), FedDistillSettings(share="weights")


class Echo(nn.Module):
    """Its logits are its input times one number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


INFO = FederationInfo((2, 2), 2, (2,))
X = torch.tensor([[1.0, 0.0], [5.0, -2.0]], dtype=torch.float64)


def turns(
    settings: FedDistillSettings, labels: Sequence[int], orders: Sequence[Sequence[Sequence[int]]], lr: float
) -> list[tuple[Upload, State]]:
    """Let one client take its turn in as many rounds as there are orders; nothing is fused between them."""
    model = Stateless(Echo())
    fusion, state, found = FedDistillFusion(settings), State(), []
    server = fusion.start(Weights(*split_state(model.module)), INFO)
    for round_, order in enumerate(orders):
        task = LocalTask(round_, 0, 2, lr, lr, len(order))
        data = (X, torch.tensor(labels))
        steps = [torch.tensor(batch) for batch in order]
        turn = client_turn(
            model, FedDistillObjective(settings), fusion, server, INFO, task, data, steps, SGD(lr), state
        )
        state = turn.state
        found.append((turn.upload, state))
    return found


def test_running_means_by_label_by_hand() -> None:
    # Round 0 sees sample 0 (label 0, logits (1, 0)) three times; round 1 both samples, sample 1 of label 1.
    first, second = turns(PLUS, [0, 1], [[[0, 0], [0]], [[0, 1]]], lr=0.0)
    # Counts start at 1 and are not reset: 3 / 4, nothing of label 1; then 4 / 5, and (5, -2) / 2.
    assert first[0].payload[Kind.LOGITS]["mean"].tolist() == [[0.75, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(second[0].payload[Kind.LOGITS]["mean"], torch.tensor([[0.8, 0.0], [2.5, -1.0]]))
    assert second[1]["seen"]["counts"].tolist() == [5.0, 2.0]


def test_each_steps_logits_count_as_they_were_in_that_step() -> None:
    # Sample 0, label 1: d CE / d scale = p_0 = sigmoid(scale), so that with lr 1 the scale goes 1, 1 - sigmoid(1).
    (upload, _) = turns(PLUS, [1, 1], [[[0], [0]]], lr=1.0)[0]
    after = 1 - 1 / (1 + math.exp(-1))
    mean = upload.payload[Kind.LOGITS]["mean"]
    assert mean[1].tolist() == pytest.approx([(1 + after) / 3, 0.0], rel=1e-6)
    assert mean[0].tolist() == [0.0, 0.0]


def test_the_loss_by_hand() -> None:
    # p is (1/2, 1/2) for zeros; softmax of t is (3/4, 1/4) for label 0 and (1/2, 1/2) for label 1.
    targets = {"mean": torch.tensor([[math.log(3), 0.0], [7.0, 7.0]])}
    objective, model = FedDistillObjective(FedDistillSettings(lambda_kl=2.0)), Stateless(Echo())
    params, x = split_state(model.module)[0], torch.zeros(2, 2, dtype=torch.float64)
    plain = objective.loss(model, params, {}, x, torch.tensor([0, 1]), {})
    assert float(plain) == pytest.approx(math.log(2))
    distilled = objective.loss(model, params, {}, x, torch.tensor([0, 1]), {"targets": targets})
    expected = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert float(distilled) == pytest.approx(math.log(2) + 2.0 * expected / 2, rel=1e-6)


def test_the_server_averages_over_the_cohort_and_says_nothing_at_first() -> None:
    fusion = FedDistillFusion(LOGITS)
    server = fusion.start(Weights({}, {}), INFO)
    assert fusion.broadcast(server, 0, INFO).parts == {}
    sent = [torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([[4.0, 0.0], [0.0, 0.0]])]
    uploads = [Upload(k, Payload({Kind.LOGITS: {"mean": mean}}), 2 + 10 * k, 1) for k, mean in enumerate(sent)]
    after = fusion.fuse(server, uploads, RoundContext(0, INFO))
    # Uniformly, whatever the clients' sizes.
    assert fusion.broadcast(after, 0, INFO)[Kind.LOGITS]["mean"].tolist() == [[3.0, 0.0], [0.5, 0.5]]
    assert fusion.broadcast(server, 0, INFO).parts == {}


def test_steps_can_be_batched_over_clients() -> None:
    module = build_model("fedgen-cnn", input_shape=(1, 8, 8), num_classes=4, generator=torch_stream(0)).double()
    model, objective, stream = Stateless(module), FedDistillObjective(LOGITS), torch_stream(0, "clients")
    params, buffers = split_state(module)
    many = {name: torch.stack([value] * 3) for name, value in buffers.items()}
    x = torch.randn(3, 6, 1, 8, 8, generator=stream, dtype=torch.float64)
    y = torch.randint(4, (3, 6), generator=stream)
    extras = {"targets": {"mean": torch.randn(4, 4, generator=stream)}}

    def loss(params: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensors]:
        return objective.loss_and_sums(model, params, buffers, x, y, extras)

    gradient = torch.func.grad(loss, has_aux=True)
    found, sums = torch.func.vmap(gradient, in_dims=(None, 0, 0, 0))(params, many, x, y)
    for client in range(3):
        own = {name: value.clone() for name, value in buffers.items()}
        alone, noted = gradient(params, own, x[client], y[client])
        for left, right in ((found, alone), (sums, noted)):
            for name, value in right.items():
                torch.testing.assert_close(left[name][client], value)


def test_what_is_noted_is_summed_over_the_steps_and_changes_nothing() -> None:
    model, start = Stateless(Echo()), Weights(*split_state(Echo()))
    order, y = [torch.tensor([0, 1]), torch.tensor([1])], torch.tensor([0, 1])
    plain = train_locally(model, FedAvgObjective(), start, {}, X, y, order, SGD(0.1))
    noted = train_locally(model, FedDistillObjective(LOGITS), start, {}, X, y, order, SGD(0.1))
    assert plain.sums == {}
    assert same_weights(plain.weights, noted.weights)
    assert torch.equal(plain.losses, noted.losses)
    assert noted.sums["counts"].tolist() == [1.0, 2.0]


# Methods that coincide


@pytest.mark.parametrize("model", [["model.hidden=[16]"], BN])
def test_without_distillation_the_plus_is_fedavg(model: list[str]) -> None:
    keys = [*model, *SKEWED, "train.rounds=3"]
    plus = ["method=feddistill", "feddistill.share=weights", *keys]
    _, expected, _ = play("method=fedavg", *keys)
    _, found, _ = play(*plus, "feddistill.lambda_kl=0")
    assert same_weights(found.server.weights, expected.server.weights)
    _, other, _ = play(*plus)
    assert not same_weights(other.server.weights, expected.server.weights)
    # Round 0 has no logits to learn from, whatever their weight.
    _, first, _ = play(*plus, rounds=1)
    _, expected, _ = play("method=fedavg", *keys, rounds=1)
    assert same_weights(first.server.weights, expected.server.weights)


def test_alone_in_the_world_without_distillation_it_is_central_training() -> None:
    keys = ["data.clients=1", "data.train_samples=60", "train.rounds=3", *BN, "local.batch_size=15"]
    _, expected, _ = play("method=fedavg", *keys)
    federation, state, _ = play("method=feddistill", "feddistill.lambda_kl=0", *keys)
    assert same_weights(federation.own_models(state)[0][1], expected.server.weights)


def test_logits_that_say_what_the_model_says_move_nothing() -> None:
    # The same label twice and equal inputs: the model's answer is the target, up to a shift of the logits.
    model, objective = Stateless(Echo()), FedDistillObjective(FedDistillSettings(lambda_kl=50.0))
    leaf = {"scale": torch.ones((), dtype=torch.float64, requires_grad=True)}
    x, y = X[:1].expand(2, 2), torch.tensor([0, 0])
    same = {"targets": {"mean": torch.tensor([[4.0, 3.0], [0.0, 0.0]])}}
    other = {"targets": {"mean": torch.tensor([[4.0, 4.0], [0.0, 0.0]])}}
    found = [
        float(torch.autograd.grad(objective.loss(model, leaf, {}, x, y, extras), leaf["scale"])[0])
        for extras in ({}, same, other)
    ]
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert abs(found[2] - found[0]) > 1


# What travels, what stays


def test_bytes_are_those_of_the_logits_and_for_the_plus_of_the_model() -> None:
    size = 4 * ((64 * 16 + 16) + (16 * 10 + 10))
    keys = ["method=feddistill", "model.hidden=[16]", "train.participation=0.5", "train.rounds=3"]
    logits = {"logits": 2 * 4 * 10 * 10}
    _, _, records = play(*keys)
    assert [record["bytes"]["up"] for record in records] == [logits] * 3
    assert [record["bytes"]["down"] for record in records] == [{}, logits, logits]
    _, _, records = play(*keys, "feddistill.share=weights")
    assert [record["bytes"]["up"] for record in records] == [{"weights": 2 * size, **logits}] * 3
    assert [record["bytes"]["down"].get("logits", 0) for record in records] == [0, 800, 800]


def test_models_stay_at_home_and_are_measured_there() -> None:
    federation, state, records = play("method=feddistill", "train.participation=0.5", rounds=1)
    here = set(records[0]["cohort"])
    assert state.server.weights.params == {}
    assert len(records[0]["fused"]["test"]["per_client"]) == 4
    for client, (_, own) in enumerate(federation.own_models(state)):
        assert same_weights(own, federation.initial) == (client not in here)
    assert "ensembles" not in records[0]
    with pytest.raises(InputError, match="no global model"):
        build(small("method=feddistill+fedftg"))
    _, _, records = play("method=feddistill+fedftg", "feddistill.share=weights", "fedftg.iterations=1", rounds=1)
    assert "refined" in records[0]


def test_clients_of_several_architectures_share_one_set_of_logits() -> None:
    table: dict[str, Any] = {
        "data": {"train_samples": 80, "test_samples": 20, "clients": 4, "partition": "iid"},
        "model": [{"name": "mlp", "hidden": [16]}, {"name": "cnn", "width": 4, "norm": "bn"}],
        "train": {"rounds": 2},
        "local": {"epochs": 1, "batch_size": 10},
    }
    federation, _ = build(load_config(None, ["method=feddistill", "execution.executor=serial"], table))
    state, _ = federation.run_round(federation.start())
    means = [own["seen"]["logits"] / own["seen"]["counts"][:, None] for _, own in sorted(state.clients.items())]
    torch.testing.assert_close(state.server.method["logits"]["mean"], torch.stack(means).mean(0).float())
    state, record = federation.run_round(state)
    assert record["bytes"]["down"] == {"logits": 4 * 400}


def test_the_class_weighted_head_belongs_to_the_plus() -> None:
    assert FedDistillFusion(PLUS, small("fusion.head=class-weighted").fusion).needs_label_counts
    assert not FedDistillFusion(LOGITS, small("fusion.head=class-weighted").fusion).needs_label_counts
    assert FedDistillFusion(PLUS).client_weights == FedAvgFusion().client_weights == "samples"


@pytest.mark.parametrize("share", ["logits", "weights"])
def test_threads_give_the_bits_of_serial_and_a_file_does_too(share: str, tmp_path: Path) -> None:
    keys = ["method=feddistill", f"feddistill.share={share}", *BN, *SKEWED, "train.participation=0.75"]
    federation, serial, records = play(*keys, rounds=3)
    _, state, found = play(*keys, "execution.executor=threads", "execution.workers=2", rounds=3)
    assert same_state(state, serial)
    assert untimed(found) == untimed(records)
    resumed = federation.start()
    for round_ in range(3):
        CheckpointStore(tmp_path, 1, "test").save(resumed)
        loaded = CheckpointStore(tmp_path, 1, "test").load()
        assert loaded is not None
        resumed, record = federation.run_round(loaded)
        assert untimed([record]) == untimed([records[round_]])
    assert same_state(resumed, serial)
