"""FedGen: the generator's size and losses, what the clients learn from it, what travels, what stays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedstill.build import build
from fedstill.config import load_config, to_toml
from fedstill.conformance.replays.sites import over_the_wire
from fedstill.errors import InputError
from fedstill.methods.base import FederationInfo, LocalTask, RoundContext, ServerState, Upload
from fedstill.methods.fedgen import (
    FedGenFusion,
    FedGenObjective,
    FedGenSettings,
    Predictors,
    draw_noise,
    imitate,
    initial_generator,
)
from fedstill.models import Stateless, build_model, split_state
from fedstill.payload import Kind, Payload, problem_with
from fedstill.rng import torch_stream
from fedstill.runs.checkpoint import CheckpointStore
from fedstill.training import SGD, Trained, train_locally
from fedstill.weights import State, Tensors, Weights
from small import flat, play, same_state, same_weights, small, untimed

BN = ["model.name=cnn", "model.width=4", "model.norm=bn"]
SKEWED = ["data.partition=dirichlet-per-class", "data.beta=1.0", "data.min_size=5", "local.batch_size=15"]
CODE, PAPER = FedGenSettings(mode="code"), FedGenSettings()


def net(classes: int = 4) -> Stateless:
    stream = torch_stream(0, "net")
    module = build_model("fedgen-cnn", input_shape=(1, 8, 8), num_classes=classes, generator=stream)
    return Stateless(module.double(), "head")


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    stream = torch_stream(0, "batch")
    x = torch.randn(size, 1, 8, 8, generator=stream, dtype=torch.float64)
    return x, torch.randint(4, (size,), generator=stream)


def received(model: Stateless, settings: FedGenSettings, samples: int = 6) -> tuple[Payload, Weights]:
    """Return what a client of a federation of one gets at first, and the initial model."""
    initial = Weights(*split_state(model.module))
    fusion, info = FedGenFusion(settings), FederationInfo((samples,), 4, (1, 8, 8), "head")
    return over_the_wire(fusion.broadcast(fusion.start(initial, info), 0, info)), initial


# The generator


@pytest.mark.parametrize(
    ("noise", "hidden", "classes", "count"), [(32, 256, 10, 19744), (32, 256, 26, 23840), (32, 128, 2, 8864)]
)
def test_the_generators_of_the_paper_have_their_sizes(noise: int, hidden: int, classes: int, count: int) -> None:
    params, statistics = initial_generator(0, noise, classes, hidden, 32)
    assert sum(value.numel() for value in params.values()) == count
    assert sum(value.numel() for value in statistics.values()) == 2 * hidden


def test_the_settings_defaults_are_the_size_for_mnist() -> None:
    assert (PAPER.noise_dim, PAPER.generator_hidden) == (32, 256)


def test_the_functional_generator_is_the_usual_network() -> None:
    params, statistics = initial_generator(3, 5, 4, 7, 6)
    usual = nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 6))
    for ours, theirs in (("hidden", "0"), ("norm", "1"), ("latent", "3")):
        for part in ("weight", "bias"):
            usual.get_parameter(f"{theirs}.{part}").data.copy_(params[f"{ours}.{part}"])
    eps, labels = torch.randn(8, 5, generator=torch_stream(0, "eps")), torch.tensor([0, 1, 2, 3, 3, 2, 0, 1])
    given = torch.cat([eps, nn.functional.one_hot(labels, 4)], dim=1)
    for train in (True, False):
        usual.train(train)
        made = imitate({**params, **statistics}, eps, labels, train)
        torch.testing.assert_close(made, usual(given))
    torch.testing.assert_close(statistics["norm.running_mean"], usual.get_buffer("1.running_mean"))
    assert statistics["norm.running_mean"].any(), "train mode moves the running statistics"


def test_generators_of_two_seeds_differ_and_of_one_do_not() -> None:
    one, same, other = (initial_generator(seed, 4, 3, 5, 6)[0]["hidden.weight"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# What teaches it


def two_heads() -> Predictors:
    """Return heads that give (3/4, 1/4) and (1/2, 1/2) whatever the features, and what each has seen."""
    bias = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]], dtype=torch.float64)
    sent = [{"head.weight": torch.zeros(2, 5, dtype=torch.float64), "head.bias": row} for row in bias]
    uploads = [Upload(client, Payload({Kind.WEIGHTS: params}), 1, 1) for client, params in enumerate(sent)]
    return Predictors.of(uploads, torch.tensor([[3, 1], [1, 3]]), "head")


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        # mean CE_0 = (ln 4/3 + ln 4) / 2, mean CE_1 = ln 2, and all label weights are 1/2 in the mean.
        ("product-of-means", ((math.log(4 / 3) + math.log(4)) / 2) / 2 + math.log(2) / 2),
        # Client 0: (3/4 ln 4/3 + 1/4 ln 4) / 2; client 1: (1/4 ln 2 + 3/4 ln 2) / 2.
        ("per-sample", (3 / 4 * math.log(4 / 3) + 1 / 4 * math.log(4)) / 2 + math.log(2) / 2),
        # Mean logits (ln 3 / 2, 0): probabilities sqrt 3 to 1.
        ("mean-logits", (math.log(1 + 1 / math.sqrt(3)) + math.log(1 + math.sqrt(3))) / 2),
    ],
)
def test_the_teachers_by_hand(teacher: Any, expected: float) -> None:
    fusion = FedGenFusion(FedGenSettings(teacher=teacher))
    z = torch.zeros(2, 5, dtype=torch.float64)
    taught, apart = fusion.terms(two_heads(), z, torch.tensor([0, 1]), z)
    assert float(taught) == pytest.approx(expected, rel=1e-12)
    assert float(apart) == 1.0  # equal features


def test_the_product_and_the_per_sample_weights_are_not_the_same() -> None:
    found = []
    for mode in ("code", "corrected"):
        z = torch.zeros(2, 5, dtype=torch.float64)
        fusion = FedGenFusion(FedGenSettings(mode=mode))
        found.append(round(float(fusion.terms(two_heads(), z, torch.tensor([0, 1]), z)[0]), 3))
    assert found == [0.765, 0.628]


@pytest.mark.parametrize("mode", ["paper", "code", "corrected"])
def test_the_generator_learns_what_the_heads_agree_on(mode: Any) -> None:
    info = FederationInfo((5, 5), 3, (1,), "head")
    settings = FedGenSettings(
        mode=mode, generator_lr=0.01, generator_steps=200, lambda_div=0.0, noise_dim=4, generator_hidden=16
    )
    fusion = FedGenFusion(settings)
    server = fusion.start(Weights({"head.weight": torch.zeros(3, 3), "head.bias": torch.zeros(3)}, {}), info)
    params = {"head.weight": 2 * torch.eye(3), "head.bias": torch.zeros(3)}
    uploads = [upload(client, params, [5, 5, 5]) for client in range(2)]
    eps, labels = torch.rand(60, 4, generator=torch_stream(0, "eps")), torch.arange(60) % 3

    def right(state: ServerState) -> int:
        made = imitate({**state.method["generator"], **state.method["statistics"]}, eps, labels)
        return int((made.argmax(1) == labels).sum())

    after = fusion.fuse(server, uploads, RoundContext(0, info))
    assert right(server) < 40
    assert right(after) == 60


def upload(client: int, params: Tensors, seen: list[int], samples: int = 5) -> Upload:
    payload = Payload({Kind.WEIGHTS: params}).also(Kind.LABEL_COUNTS, {"seen": torch.tensor(seen, dtype=torch.int32)})
    return Upload(client, payload, samples, 1)


def test_the_generator_and_its_moments_live_on_and_what_was_is_left_alone() -> None:
    settings = FedGenSettings(generator_steps=3, noise_dim=4, generator_hidden=6)
    fusion, info = FedGenFusion(settings), FederationInfo((5, 5), 3, (1,), "head")
    params = {"head.weight": torch.randn(3, 2, generator=torch_stream(0, "w")), "head.bias": torch.zeros(3)}
    first = fusion.start(Weights(params, {}), info)
    before = {name: value.clone() for name, value in first.method["generator"].items()}
    once = fusion.fuse(first, [upload(0, params, [4, 2, 1])], RoundContext(0, info))
    twice = fusion.fuse(once, [upload(0, params, [4, 2, 1])], RoundContext(1, info))
    assert all(torch.equal(value, before[name]) for name, value in first.method["generator"].items())
    assert [int(state.method["count"]["steps"]) for state in (first, once, twice)] == [0, 3, 6]
    assert not torch.equal(once.method["statistics"]["norm.running_mean"], torch.zeros(6))


def test_the_generators_learning_rate_decays_with_the_round() -> None:
    settings = FedGenSettings(generator_steps=1, generator_lr_decay=0.5, generator_weight_decay=0, noise_dim=2)
    fusion, info = FedGenFusion(settings), FederationInfo((5,), 3, (1,), "head")
    params = {"head.weight": torch.eye(3), "head.bias": torch.zeros(3)}
    first = fusion.start(Weights(params, {}), info)
    moved = []
    for round_ in (0, 1):
        after = fusion.fuse(first, [upload(0, params, [4, 2, 1])], RoundContext(round_, info))
        moved.append(after.method["generator"]["latent.bias"] - first.method["generator"]["latent.bias"])
    # The first step of Adam is one learning rate in each coordinate that has a gradient.
    torch.testing.assert_close(moved[0].abs().max(), torch.tensor(3e-4), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved[1].abs().max(), torch.tensor(1.5e-4), rtol=1e-3, atol=0)


# Labels


def test_p_is_the_distribution_of_what_the_cohort_counted() -> None:
    fusion = FedGenFusion(FedGenSettings(generator_steps=1, noise_dim=2, generator_hidden=4))
    info = FederationInfo((5, 5), 3, (1,), "head")
    params = {"head.weight": torch.eye(3), "head.bias": torch.zeros(3)}
    server = fusion.start(Weights(params, {}), info)
    assert server.method["labels"]["prior"].tolist() == [1, 1, 1]
    after = fusion.fuse(server, [upload(0, params, [4, 1, 1]), upload(1, params, [2, 7, 1])], RoundContext(0, info))
    assert after.method["labels"]["prior"].tolist() == [4, 6, 0]  # counters start at 1
    code = FedGenFusion(FedGenSettings(mode="code", generator_steps=1, noise_dim=2))
    after = code.fuse(code.start(Weights(params, {}), info), [upload(0, params, [4, 1, 1])], RoundContext(0, info))
    assert after.method["labels"]["prior"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_no_feature_is_generated_for_a_class_that_nobody_in_the_cohort_has_seen(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def watched(self: FedGenFusion, method: State, heads: Predictors, labels: Tensor, *more: Any) -> None:
        seen.append(labels)

    monkeypatch.setattr(FedGenFusion, "train_generator", watched)
    fusion = FedGenFusion(FedGenSettings(mode=mode))
    info = FederationInfo((5, 5), 4, (1,), "head")
    params = {"head.weight": torch.zeros(4, 2), "head.bias": torch.zeros(4)}
    server = fusion.start(Weights(params, {}), info)
    fusion.fuse(server, [upload(0, params, [9, 1, 1, 1]), upload(1, params, [1, 1, 3, 1])], RoundContext(0, info))
    counts = torch.bincount(seen[0].flatten(), minlength=4)
    assert int(counts.sum()) == 50 * 32
    assert (counts > 0).tolist() == [True, False, True, False]
    # 8 to 2 as counted, or half and half.
    assert abs(int(counts[0]) / 1600 - (0.8 if mode == "paper" else 0.5)) < 0.06


def test_clients_draw_their_labels_from_p_and_every_round_anew() -> None:
    objective = FedGenObjective(PAPER, 10)
    got = Payload({Kind.LABEL_COUNTS: {"prior": torch.tensor([0, 3, 1], dtype=torch.int32)}})
    task = LocalTask(2, 0, 7, 0.1, 0.1, 60)
    draws = objective.draws(got, task, torch_stream(0, "draws"))
    assert draws["labels"].shape == (60, 10)
    counts = torch.bincount(draws["labels"].flatten(), minlength=3)
    assert int(counts[0]) == 0
    assert abs(int(counts[1]) / 600 - 0.75) < 0.06
    again = objective.draws(got, task, torch_stream(0, "draws", 1))
    assert not torch.equal(again["noise"], draws["noise"])


# The clients


def test_nothing_is_regularised_in_round_0_or_after_the_early_stop() -> None:
    got = Payload({Kind.LABEL_COUNTS: {"prior": torch.ones(3, dtype=torch.int32)}})
    for settings in (PAPER, CODE):
        assert FedGenObjective(settings, 4).draws(got, LocalTask(0, 0, 7, 0.1, 0.1, 5), torch_stream(0)) == {}
    late = LocalTask(7, 0, 7, 0.1, 0.1, 22)
    draws = FedGenObjective(CODE, 4).draws(got, late, torch_stream(0))
    assert draws["alpha"].tolist() == pytest.approx([10 * 0.98**7] * 20 + [0.0] * 2)
    assert draws["beta"].tolist() == pytest.approx([10 * 0.98**7] * 20 + [0.0] * 2)
    assert draws["batch_noise"].shape == draws["noise"].shape == (22, 4, 32)
    draws = FedGenObjective(PAPER, 4).draws(got, late, torch_stream(0))
    assert draws["alpha"].tolist() == [1.0] * 22
    assert "beta" not in draws
    old = LocalTask(5000, 0, 7, 0.1, 0.1, 1)
    draws = FedGenObjective(FedGenSettings(mode="code", beta=0.0), 4).draws(got, old, torch_stream(0))
    assert draws["alpha"].tolist() == [1e-4]
    assert "beta" not in draws


def test_noise_has_the_law_it_is_named_after() -> None:
    uniform, normal = (draw_noise(kind, (4000,), torch_stream(0)) for kind in ("uniform", "normal"))
    assert 0 <= float(uniform.min()) < 0.01 < 0.99 < float(uniform.max()) < 1
    assert abs(float(normal.mean())) < 0.1
    assert abs(float(normal.std()) - 1) < 0.1


@pytest.mark.parametrize("settings", [PAPER, CODE])
def test_features_generated_for_drawn_labels_move_the_head_alone(settings: FedGenSettings) -> None:
    model, (x, y) = net(), batch()
    got, initial = received(model, settings)
    objective = FedGenObjective(settings, 6)
    task = LocalTask(1, 0, 6, 0.1, 0.1, 1)
    extras = objective.prepare(got, {}, task)
    draws = {name: value[0] for name, value in objective.draws(got, task, torch_stream(0)).items()}
    leaves = {name: value.clone().requires_grad_() for name, value in initial.params.items()}

    def gradients(weight: float) -> Tensors:
        given = {**extras, "draws": {**draws, "alpha": torch.tensor(weight)}}
        loss = objective.loss(model, leaves, initial.clone().buffers, x, y, given)
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    without, with_them = gradients(0.0), gradients(3.0)
    for name, value in without.items():
        assert torch.equal(value, with_them[name]) != name.startswith("head."), name


def test_the_last_smaller_batch_takes_as_many_rows_of_noise() -> None:
    model, (x, y) = net(), batch(5)
    got, initial = received(model, CODE)
    objective, task = FedGenObjective(CODE, 3), LocalTask(1, 0, 5, 0.1, 0.1, 2)
    draws = objective.draws(got, task, torch_stream(0))
    order = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    done = train_locally(
        model, objective, initial, objective.prepare(got, {}, task), x, y, order, SGD(0.1), draws=draws
    )
    cut = {**draws, "batch_noise": draws["batch_noise"].clone()}
    cut["batch_noise"][1, 2] = float("nan")  # a row that no sample of the last batch has
    same = train_locally(model, objective, initial, objective.prepare(got, {}, task), x, y, order, SGD(0.1), draws=cut)
    assert torch.equal(done.losses, same.losses)
    assert bool(torch.isfinite(done.losses).all())


@pytest.mark.parametrize("settings", [PAPER, CODE])
def test_steps_can_be_batched_over_clients(settings: FedGenSettings) -> None:
    model, clients = net(), 3
    got, initial = received(model, settings)
    objective, generator = FedGenObjective(settings, 6), got[Kind.GENERATOR]
    stream = torch_stream(0, "clients")
    x = torch.randn(clients, 6, 1, 8, 8, generator=stream, dtype=torch.float64)
    y = torch.randint(4, (clients, 6), generator=stream)
    task = LocalTask(1, 0, 6, 0.1, 0.1, 1)
    each = [objective.draws(got, task, torch_stream(0, client)) for client in range(clients)]
    draws = {name: torch.stack([own[name][0] for own in each]) for name in each[0]}
    many = {name: torch.stack([value] * clients) for name, value in initial.buffers.items()}

    def loss(params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, draws: Tensors) -> tuple[Tensor, Tensors]:
        return objective.loss_and_sums(model, params, buffers, x, y, {"generator": generator, "draws": draws})

    gradient = torch.func.grad(loss, has_aux=True)
    found, _ = torch.func.vmap(gradient, in_dims=(None, 0, 0, 0, 0))(initial.params, many, x, y, draws)
    for client in range(clients):
        own = {name: value[client] for name, value in draws.items()}
        alone, _ = gradient(initial.params, initial.clone().buffers, x[client], y[client], own)
        for name, value in alone.items():
            torch.testing.assert_close(found[name][client], value)


def test_counters_start_at_one_and_count_the_batches() -> None:
    got, initial = received(net(), PAPER)
    objective, task = FedGenObjective(PAPER, 3), LocalTask(0, 0, 6, 0.1, 0.1, 2)
    trained = Trained(initial, 2, torch.zeros(2), None, torch.tensor([2, 2, 0, 2]))
    payload, state = objective.finish(got, {}, trained, task)
    assert payload[Kind.LABEL_COUNTS]["seen"].tolist() == [2, 1, 4, 1]
    assert payload[Kind.LABEL_COUNTS]["seen"].dtype == torch.int32
    assert state == {}


# What travels, what stays


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({}, set()),
        ({"buffers": "personal"}, {"buffers"}),
        ({"share": "predictor"}, {"body", "buffers"}),
    ],
)
def test_what_comes_back_is_of_the_kinds_that_went_and_the_rest_stays(keys: dict[str, Any], kept: set[str]) -> None:
    model, settings = net(), FedGenSettings(**keys)
    initial = Weights(*split_state(model.module))
    fusion, info = FedGenFusion(settings), FederationInfo((6,), 4, (1, 8, 8), "head")
    server = fusion.start(initial, info)
    got, objective = over_the_wire(fusion.broadcast(server, 0, info)), FedGenObjective(settings, 6)
    assert same_weights(objective.own_model(got, {}, initial), initial)
    assert list(objective.own_model(got, {}, initial).params) == list(initial.params)
    trained = Trained(initial.map(lambda value: value + 1), 1, torch.zeros(1), None, torch.tensor([0]))
    payload, state = objective.finish(got, {}, trained, LocalTask(0, 0, 6, 0.1, 0.1, 1))
    assert problem_with(over_the_wire(payload), fusion.upload_like(server)) is None
    assert state.keys() == kept
    assert objective.personal == bool(kept)
    # The next model is what the client kept with what the server sends then, which here is the initial model's.
    own = objective.own_model(got, state, initial)
    for name, value in {**own.params, **own.buffers}.items():
        stayed = any(name in tensors for tensors in state.values())
        assert torch.equal(value, {**initial.params, **initial.buffers}[name] + stayed), name


def test_bytes_are_those_of_the_table() -> None:
    body, head, generator = 64 * 16 + 16, 16 * 10 + 10, (8 + 10) * 12 + 12 + 2 * 12 + 12 * 16 + 16
    keys = ["method=fedgen", "model.hidden=[16]", "train.participation=0.5", "fedgen.noise_dim=8"]
    for share, model in (("all", body + head), ("predictor", head)):
        _, _, records = play(*keys, "fedgen.generator_hidden=12", f"fedgen.share={share}")
        for record in records:
            # The generator goes with its running statistics, 12 means and 12 variances.
            down = {"weights": 4 * model, "generator": 4 * (generator + 24), "label-counts": 4 * 10}
            assert record["bytes"]["down"] == {kind: 2 * size for kind, size in down.items()}
            assert record["bytes"]["up"] == {"weights": 2 * 4 * model, "label-counts": 2 * 4 * 10}


def test_the_label_counts_that_another_part_asks_for_do_not_collide_with_the_counters() -> None:
    _, state, records = play("method=fedgen+fedftg", "fedftg.iterations=1", rounds=2)
    assert [record["bytes"]["up"]["label-counts"] for record in records] == [4 * 2 * 40, 4 * 40]
    assert sum(int(counts.sum()) for counts in state.label_counts.values()) == 200
    assert all("refined" in record for record in records)


# Methods that coincide


@pytest.mark.parametrize("model", [["model.hidden=[16]"], BN])
def test_without_regularisation_it_is_fedavg(model: list[str]) -> None:
    keys = [*model, *SKEWED, "train.rounds=3"]
    _, expected, _ = play("method=fedavg", *keys)
    _, found, _ = play("method=fedgen", "fedgen.alpha=0", "fedgen.client_weights=samples", *keys)
    assert same_weights(found.server.weights, expected.server.weights)
    _, other, _ = play("method=fedgen", "fedgen.client_weights=samples", *keys)
    assert not same_weights(other.server.weights, expected.server.weights)
    _, uniform, _ = play("method=fedgen", "fedgen.alpha=0", *keys, rounds=1)
    _, expected, _ = play("method=fedavg", "fusion.client_weights=uniform", *keys, rounds=1)
    assert same_weights(uniform.server.weights, expected.server.weights)


@pytest.mark.parametrize("own", ["fedgen.buffers=personal", "fedgen.share=predictor"])
def test_a_federation_of_one_does_not_notice_what_stays_at_home(own: str) -> None:
    keys = ["method=fedgen", "data.clients=1", "data.train_samples=60", "local.batch_size=15", *BN]
    _, shared, shared_records = play(*keys)
    federation, state, records = play(*keys, own)
    assert same_weights(federation.own_models(state)[0][1], shared.server.weights)
    assert [r["fused"]["test"]["accuracy"] for r in records] == [r["fused"]["test"]["accuracy"] for r in shared_records]


def test_with_personal_buffers_every_client_predicts_with_its_own() -> None:
    federation, state, records = play("method=fedgen", "fedgen.mode=code", *BN, "train.participation=0.5", rounds=1)
    (here,) = [set(record["cohort"]) for record in records]
    assert len(records[0]["fused"]["test"]["per_client"]) == 4
    own = [weights for _, weights in federation.own_models(state)]
    name = next(key for key in federation.initial.buffers if key.endswith("running_mean"))
    for client, weights in enumerate(own):
        assert all(torch.equal(value, state.server.weights.params[key]) for key, value in weights.params.items())
        assert torch.equal(weights.buffers[name], federation.initial.buffers[name]) == (client not in here)
    assert same_weights(Weights({}, state.server.weights.buffers), Weights({}, federation.initial.buffers))


def test_with_a_shared_predictor_the_bodies_grow_apart() -> None:
    federation, state, _ = play("method=fedgen", "fedgen.share=predictor", "model.hidden=[16]")
    assert state.server.weights.params.keys() == {"head.weight", "head.bias"}
    own = [weights.params for _, weights in federation.own_models(state)]
    for name in own[0]:
        assert torch.equal(own[0][name], own[1][name]) == name.startswith("head.")


# Federations


@pytest.mark.parametrize("keys", [[], ["fedgen.mode=code"], ["fedgen.mode=corrected", "fedgen.share=predictor"]])
def test_threads_give_the_bits_of_serial_and_a_file_does_too(keys: list[str], tmp_path: Path) -> None:
    keys = ["method=fedgen", *keys, *BN, *SKEWED, "train.participation=0.75", "train.rounds=3"]
    federation, serial, records = play(*keys)
    _, state, found = play(*keys, "execution.executor=threads", "execution.workers=2")
    assert same_state(state, serial)
    assert untimed(found) == untimed(records)
    resumed = federation.start()
    for round_ in range(3):
        store = CheckpointStore(tmp_path, 1, "test")
        store.save(resumed)
        loaded = CheckpointStore(tmp_path, 1, "test").load()
        assert loaded is not None
        resumed, record = federation.run_round(loaded)
        assert untimed([record]) == untimed([records[round_]])
    assert flat(resumed).keys() == flat(serial).keys()
    assert same_state(resumed, serial)


def test_a_run_is_its_seed() -> None:
    keys = ["method=fedgen", "fedgen.generator_steps=2", "train.rounds=2"]
    one, same, other = (play(*keys, f"seed.train={seed}")[1] for seed in (1, 1, 2))
    assert same_state(one, same)
    one_generator, other_generator = (state.server.method["generator"] for state in (one, other))
    assert not torch.equal(one_generator["hidden.weight"], other_generator["hidden.weight"])


def test_each_architecture_has_a_generator_for_its_own_head() -> None:
    config = load_config(
        None,
        ["method=fedgen", "execution.executor=serial"],
        {
            "data": {"train_samples": 80, "test_samples": 20, "clients": 4, "partition": "iid"},
            "model": [{"name": "mlp", "hidden": [16]}, {"name": "mlp", "hidden": [9]}],
            "train": {"rounds": 2},
            "local": {"epochs": 1},
        },
    )
    federation, _ = build(config)
    state, _ = federation.run_round(federation.start())
    state, record = federation.run_round(state)
    widths = [model.server.method["generator"]["latent.weight"].shape[0] for model in state.models]
    assert widths == [16, 9]
    assert "by_model" in record["fused"]


class Headless(nn.Module):
    """Its logits come from no linear layer."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, num_classes, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)


class NoBias(nn.Module):
    """Its last layer goes by another name and has no bias."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(64, 12)
        self.last = nn.Linear(12, num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x.flatten(1)).relu())


def test_it_needs_a_head_whatever_its_name() -> None:
    with pytest.raises(InputError, match=r"model\.head"):
        build(small("method=fedgen", f"model.name={__name__}:Headless"))
    _, state, _ = play("method=fedgen", f"model.name={__name__}:NoBias", "fedgen.mode=corrected")
    assert state.server.method["generator"]["latent.weight"].shape[0] == 12
    _, state, _ = play("method=fedgen", f"model.name={__name__}:NoBias", "fedgen.share=predictor", rounds=1)
    assert state.server.weights.params.keys() == {"last.weight"}


def test_a_refinement_of_what_is_personal_is_refused() -> None:
    for own in ("fedgen.mode=code", "fedgen.share=predictor"):
        with pytest.raises(InputError, match="no global model"):
            build(small("method=fedgen+fedftg", own))


def test_a_mode_given_on_the_command_line_counts_in_a_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(load_config(None, ["method=fedgen", "fedgen.mode=code", "fedgen.noise_dim=7"])))
    config = load_config(path, ["fedgen.mode=paper"])
    assert config.fedgen == FedGenSettings(noise_dim=7)
    assert load_config(path, ["fedgen.mode=corrected"]).fedgen.teacher == "per-sample"
    assert load_config(path).fedgen == FedGenSettings(mode="code", noise_dim=7)
