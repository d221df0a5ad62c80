"""MOON: its contrastive term by hand, when it is FedAvg, what a client keeps, features without a direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedstill.build import build
from fedstill.config import load_config, to_toml
from fedstill.conformance.replays.tiny import TinyCNN
from fedstill.errors import InputError
from fedstill.federation import LAST_PARAMS
from fedstill.methods.base import LocalTask
from fedstill.methods.moon import MoonObjective, MoonSettings, contrastive
from fedstill.models import Stateless, initial_weights, split_state
from fedstill.payload import model_payload
from fedstill.rng import torch_stream
from fedstill.training import SGD, Trained, train_locally
from fedstill.weights import State, Weights
from small import play, same_state, same_weights, small, untimed
from stopping import Stop, assert_goes_on_to_the_same_bits

CNN = ["model.name=cnn", "model.width=4", "model.norm=bn", "local.batch_size=25"]
MOON = ["method=moon", "data.clients=5"]
TASK = LocalTask(0, 0, 6, 0.1, 0.1, 2)


def features(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_the_contrastive_term_by_hand() -> None:
    # Cosines with the global model's: 1 and 0, with the first old model's: 0 and 1, with the second's: -1 and 0.
    z, glob = features([2, 0], [0, 3]), features([5, 0], [1, 0])
    old, older = features([0, 1], [0, 0.1]), features([-4, 0], [7, 0])
    first, second = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert float(contrastive(z, [glob, old], tau=0.5)) == pytest.approx((first + second) / 2, rel=1e-12)
    first, second = math.log(1 + math.exp(-0.2) + math.exp(-0.4)), math.log(2 + math.exp(0.2))
    assert float(contrastive(z, [glob, old, older], tau=5.0)) == pytest.approx((first + second) / 2, rel=1e-12)


def test_the_pull_is_towards_the_global_features_and_away_from_the_old_ones() -> None:
    z = features([1, 1]).requires_grad_()
    (slope,) = torch.autograd.grad(contrastive(z, [features([1, 0]), features([0, 1])], tau=0.5), z)
    assert slope[0, 0] < 0 < slope[0, 1]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_features_without_a_direction_give_numbers(which: int) -> None:
    given = [features([1, 2], [3, 1]), features([1, 0], [2, 2]), features([0, 1], [1, 5])]
    given[which] = given[which] * features([1], [0])
    z = given[0].requires_grad_()
    value = contrastive(z, given[1:], tau=0.5)
    (slope,) = torch.autograd.grad(value, z)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(slope).all())
    if which == 0:  # the second sample's cosines are both 0
        first = contrastive(z[:1], [other[:1] for other in given[1:]], tau=0.5)
        torch.testing.assert_close(value, (first + math.log(2)) / 2)


# One client


def weights_of(seed: int, norm: bool = True) -> Weights:
    with initial_weights(torch_stream(seed, "network")):
        return Weights(*split_state(TinyCNN(1, 3, 48, 5, 3, norm)))


def model(norm: bool = True) -> Stateless:
    return Stateless(TinyCNN(1, 3, 48, 5, 3, norm), "fc")


def trained(weights: Weights) -> Trained:
    return Trained(weights, 1, torch.zeros(1), None, torch.zeros(1, dtype=torch.int64))


def kept(objective: MoonObjective, *models: Weights) -> State:
    """Return a client's state after rounds that ended with these models."""
    state: State = {}
    for one in models:
        _, state = objective.finish(model_payload(one), state, trained(one), TASK)
    return state


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 1, 8, 8, generator=torch_stream(0, "x")), torch.arange(6) % 3


def same_stack(stack: dict[str, Tensor], models: Sequence[dict[str, Tensor]]) -> bool:
    return all(torch.equal(value, torch.stack([one[name] for one in models])) for name, value in stack.items())


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_client_keeps_its_last_uploads_the_newest_first(number: int) -> None:
    objective = MoonObjective(MoonSettings(previous_models=number))
    models = [weights_of(seed) for seed in range(4)]
    for rounds in range(1, 5):
        state = kept(objective, *models[:rounds])
        last = models[:rounds][::-1][:number]
        assert state.keys() == {"previous", "previous-buffers"}
        assert same_stack(state["previous"], [one.params for one in last])
        assert same_stack(state["previous-buffers"], [one.buffers for one in last])
    received = weights_of(9)
    extras = objective.prepare(model_payload(received), state, TASK)
    assert same_stack(extras["frozen"], [received.params, *(one.params for one in last)])
    assert same_stack(extras["frozen-buffers"], [received.buffers, *(one.buffers for one in last)])


def test_the_frozen_models_are_not_changed_and_each_runs_once_a_step() -> None:
    objective = MoonObjective(MoonSettings(previous_models=2))
    net, received = model(), weights_of(9)
    state = kept(objective, weights_of(1), weights_of(2))
    extras = objective.prepare(model_payload(received), state, TASK)
    before = {group: {name: value.clone() for name, value in own.items()} for group, own in extras.items()}
    passes: list[bool] = []
    net.module.register_forward_hook(lambda module, *_: passes.append(module.training))
    done = train_locally(net, objective, received, extras, *batch(), [torch.arange(6)] * 2, SGD(0.1))
    assert sorted(passes) == [False] * 6 + [True] * 2
    for group, own in extras.items():
        assert all(torch.equal(value, before[group][name]) for name, value in own.items())
    assert int(done.weights.buffers["bn.num_batches_tracked"]) == 2
    assert not any(value.requires_grad for value in done.weights.params.values())


def test_dead_features_train_to_numbers() -> None:
    objective = MoonObjective(MoonSettings())
    dead = weights_of(9, norm=False)
    dead.params["fc1.bias"].fill_(-1000.0)
    extras = objective.prepare(model_payload(dead), kept(objective, weights_of(1, norm=False)), TASK)
    done = train_locally(model(norm=False), objective, dead, extras, *batch(), [torch.arange(6)] * 2, SGD(0.1))
    assert bool(torch.isfinite(done.losses).all())
    assert done.weights.all_finite()
    assert not torch.equal(done.weights.params["fc.bias"], dead.params["fc.bias"])


def test_the_loss_batches_over_clients() -> None:
    objective = MoonObjective(MoonSettings(mu=2.0))
    net, (x, y) = model(norm=False), batch()
    params = [weights_of(seed, norm=False).params for seed in (1, 2)]
    extras = [
        objective.prepare(model_payload(weights_of(5, norm=False)), kept(objective, weights_of(seed, norm=False)), TASK)
        for seed in (3, 4)
    ]

    def loss(own: dict[str, Tensor], more: State) -> Tensor:
        return objective.loss(net, own, {}, x, y, more)

    together = torch.func.vmap(torch.func.grad(loss))(
        {name: torch.stack([one[name] for one in params]) for name in params[0]},
        {group: {n: torch.stack([one[group][n] for one in extras]) for n in own} for group, own in extras[0].items()},
    )
    for place in (0, 1):
        leaves = {name: value.requires_grad_() for name, value in params[place].items()}
        alone = torch.autograd.grad(loss(leaves, extras[place]), list(leaves.values()))
        for name, value in zip(leaves, alone, strict=True):
            torch.testing.assert_close(together[name][place], value, rtol=1e-4, atol=1e-6)


# Whole federations


@pytest.mark.parametrize("keys", [[], CNN])
def test_without_mu_it_is_fedavg_to_the_bit(keys: list[str]) -> None:
    more = [*keys, "data.clients=5", "train.participation=0.6", "train.rounds=3"]
    _, fedavg, _ = play("method=fedavg", *more)
    _, moon, _ = play("method=moon", "moon.mu=0", *more)
    assert same_weights(moon.server.weights, fedavg.server.weights)
    _, other, _ = play("method=moon", *more)
    assert not same_weights(other.server.weights, fedavg.server.weights)


@pytest.mark.parametrize("keys", [[], CNN])
def test_at_the_first_participation_it_is_fedavg_to_the_bit(keys: list[str]) -> None:
    _, fedavg, (want,) = play("method=fedavg", *keys, rounds=1)
    _, moon, (got,) = play("method=moon", *keys, rounds=1)
    assert same_weights(moon.server.weights, fedavg.server.weights)
    assert got["train_loss"] == want["train_loss"]
    assert got["bytes"] == want["bytes"]  # and nothing more travels
    _, fedavg, _ = play("method=fedavg", *keys, rounds=2)
    _, moon, (_, later) = play("method=moon", *keys, rounds=2)
    assert not same_weights(moon.server.weights, fedavg.server.weights)
    assert later["bytes"] == want["bytes"]


def test_an_absent_client_keeps_its_old_model() -> None:
    keys = [*MOON, "train.participation=0.4", 'eval.models=["all"]']
    _, state, records = play(*keys, rounds=4)
    _, earlier, _ = play(*keys, rounds=3)
    absent = set(earlier.clients) - set(records[-1]["cohort"])
    again = set(earlier.clients) & set(records[-1]["cohort"])
    assert absent
    assert again
    for client in state.clients:
        kept, last = state.clients[client]["previous"], state.clients[client][LAST_PARAMS]
        assert all(torch.equal(value, last[name][None]) for name, value in kept.items())
    for client in absent | again:
        before, now = earlier.clients[client]["previous"], state.clients[client]["previous"]
        assert all(torch.equal(before[name], now[name]) for name in now) == (client in absent)


@pytest.mark.parametrize("keys", [[], [*CNN, "model.projection=6", "moon.previous_models=2"], ["method=moon+fedftg"]])
def test_threads_give_the_bits_of_serial(keys: list[str]) -> None:
    more = [*MOON, *keys, "train.participation=0.6", "train.rounds=3"]
    _, serial, records = play(*more)
    _, state, found = play(*more, "execution.executor=threads", "execution.workers=2")
    assert same_state(state, serial)
    assert untimed(found) == untimed(records)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = small(*MOON, *CNN, "train.participation=0.6", "train.rounds=4", "moon.previous_models=2")
    assert_goes_on_to_the_same_bits(config, tmp_path, Stop(after=2))


# Settings


class Headless(nn.Module):
    """A model whose logits come from no linear layer."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.last = nn.Conv2d(input_shape[0], num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x).mean((2, 3))


def test_a_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(InputError, match=r"method = 'moon'.*model\.head"):
        build(small("method=moon", "model.name=test_moon:Headless"))


def test_modes_fill_only_what_is_not_given(tmp_path: Path) -> None:
    paper, code = MoonSettings(), MoonSettings(mode="code")
    assert (paper.mu, paper.tau, paper.previous_models) == (5.0, 0.5, 1)
    assert (code.mu, code.tau, code.previous_models) == (0.5, 5.0, 1)
    assert MoonSettings(mode="code", mu=3.0) == MoonSettings(mode="code", mu=3.0, tau=5.0)
    for wrong in ({"mode": "official"}, {"mu": -1.0}, {"tau": 0.0}, {"previous_models": 0}):
        with pytest.raises(ValidationError):
            MoonSettings(**wrong)
    complete = tmp_path / "config.toml"
    complete.write_text(to_toml(small("method=moon", "moon.tau=0.25")))
    assert load_config(complete, ["moon.mode=code"]).moon == MoonSettings(mode="code", tau=0.25)
