"""FedFTG at feature level: the head alone learns, as in a distillation of heads that is made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from fedstill.build import build
from fedstill.config import load_config
from fedstill.conformance.replays.tiny import TinyCNN
from fedstill.distill.inputs import GeneratedInputs, NoiseInputs, StreamDraws, initial_generator
from fedstill.distill.labels import draw_labels
from fedstill.distill.loop import Distillation, module_state
from fedstill.distill.teachers import GroupedTeachers, StackedTeachers
from fedstill.errors import InputError
from fedstill.methods.base import FederationInfo, RoundContext
from fedstill.methods.fedftg import FedFTG, FedFTGSettings
from fedstill.models import ConditionalGenerator, FeatureGenerator, Stateless, initial_weights, split_state
from fedstill.rng import torch_stream
from fedstill.weights import Weights
from small import SMALL, play, same_weights, small
from stopping import Stop, assert_goes_on_to_the_same_bits

SHAPE, CLASSES, WIDTH = (1, 8, 8), 4, 6
COUNTS = torch.tensor([[6, 0, 1, 0], [2, 3, 0, 0], [0, 5, 3, 0]])
KEYS = {"level": "feature", "iterations": 3, "batch_size": 6, "noise_dim": 5, "student_steps": 2, "generator_width": 4}
MODES = ("paper", "code", "tuned")


def stream(purpose: str) -> torch.Generator:
    return torch_stream(3, purpose)


def network(number: int) -> TinyCNN:
    with initial_weights(torch_stream(3, "network", number)):
        return TinyCNN(1, 3, 48, WIDTH, CLASSES, norm=True)


def scene() -> tuple[Stateless, Weights, StackedTeachers]:
    model = Stateless(network(0), "fc")
    teachers = [Weights(*split_state(network(number))) for number in (1, 2, 3)]
    return model, Weights(*split_state(model.module)), StackedTeachers.of(model, teachers, COUNTS)


def context(round: int = 0, head: str | None = "fc", **info: object) -> RoundContext:
    known = replace(FederationInfo((7, 5, 8), CLASSES, SHAPE, head=head), **info)
    return RoundContext(round, known, 0.9**round, stream, torch.device("cpu"))


def ftg(**keys: object) -> FedFTG:
    return FedFTG(FedFTGSettings(**{**KEYS, **keys}), seed=2)


def head_of(weights: Weights) -> Weights:
    return Weights({"weight": weights.params["fc.weight"], "bias": weights.params["fc.bias"]}, {})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inputs", ["generator", "noise"])
def test_the_head_learns_and_the_body_stays_to_the_bit(mode: str, inputs: str) -> None:
    model, student, teachers = scene()
    before = student.clone()
    refined = ftg(mode=mode, inputs=inputs).refine(model, student, teachers, {}, context())
    after = refined.weights.params | refined.weights.buffers
    changed = {name for name, value in (before.params | before.buffers).items() if not torch.equal(value, after[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert list(refined.weights.params) == list(before.params)
    assert same_weights(before, student)
    assert refined.state.keys() == ({"generator"} if inputs == "generator" else set())


@pytest.mark.parametrize("mode", MODES)
def test_it_is_a_distillation_of_heads_made_by_hand(mode: str) -> None:
    model, student, teachers = scene()
    refined = ftg(mode=mode).refine(model, student, teachers, {}, context())

    settings = FedFTGSettings(**{**KEYS, "mode": mode})
    with initial_weights(torch_stream(2, "generator", "initial-weights")):
        maker = FeatureGenerator(5, CLASSES, WIDTH, hidden=16)
    layer = Stateless(nn.Linear(WIDTH, CLASSES))
    heads = [head_of(Weights(*split_state(network(number)))) for number in (1, 2, 3)]
    labels = draw_labels(settings.labels, COUNTS, settings.iterations, 6, stream("distillation-labels"))
    by_hand = Distillation(
        settings,
        layer,
        head_of(student),
        StackedTeachers.of(layer, heads, COUNTS),
        GeneratedInputs(maker, train_mode=settings.generator_norm == "train"),
        StreamDraws(labels, stream("distillation-noise"), 5),
        maker,
    )
    assert same_weights(by_hand.run(), head_of(refined.weights))
    for name, value in module_state(maker).items():
        assert torch.equal(value, refined.state["generator"][name])
    assert by_hand.log.means() == refined.metrics


def test_one_step_on_noise_features_by_hand() -> None:
    """The gradient of a linear head on features z is (dL / dlogits)^T z; Eq. 4's is s (d - <s, d>)."""
    model, student, teachers = scene()
    keys = {"inputs": "noise", "iterations": 1, "student_steps": 1, "teacher": "uniform", "reduction": "batch"}
    refined = ftg(lr_student=0.5, weight_decay_student=0.25, **keys).refine(model, student, teachers, {}, context())
    z = torch.randn(6, WIDTH, generator=stream("distillation-inputs"))
    old = head_of(student).params

    def logits(weight: Tensor, bias: Tensor) -> Tensor:
        return z @ weight.T + bias

    s = logits(old["weight"], old["bias"]).softmax(-1)
    pairs = zip(teachers.params["fc.weight"], teachers.params["fc.bias"])
    d = s.log() - torch.stack([logits(*pair).log_softmax(-1) for pair in pairs]).mean(0)
    slope = s * (d - (s * d).sum(-1, keepdim=True)) / 6
    moved = refined.weights.params
    weight, bias = old["weight"], old["bias"]
    torch.testing.assert_close(moved["fc.weight"], weight - 0.5 * (slope.T @ z + 0.25 * weight))
    torch.testing.assert_close(moved["fc.bias"], bias - 0.5 * (slope.sum(0) + 0.25 * bias))


def test_the_teachers_bodies_do_not_matter() -> None:
    model, student, teachers = scene()
    others = {name: value if name.startswith("fc.") else value + 1 for name, value in teachers.params.items()}
    first = ftg().refine(model, student, teachers, {}, context())
    second = ftg().refine(model, student, replace(teachers, params=others), {}, context())
    assert same_weights(first.weights, second.weights)
    heads = {name: 2 * value if name == "fc.weight" else value for name, value in teachers.params.items()}
    third = ftg().refine(model, student, replace(teachers, params=heads), {}, context())
    assert not same_weights(first.weights, third.weights)


def test_the_generator_lives_on_in_the_state() -> None:
    model, student, teachers = scene()
    first = ftg().refine(model, student, teachers, {}, context())
    second = ftg().refine(model, first.weights, teachers, first.state, context(1))
    fresh = ftg().refine(model, first.weights, teachers, {}, context(1))
    assert first.state["generator"]["blocks.3.weight"].shape == (WIDTH, 16)
    assert not same_weights(second.weights, fresh.weights)
    still = ftg(generator_steps=0).refine(model, first.weights, teachers, first.state, context(1))
    for name, value in first.state["generator"].items():
        assert torch.equal(still.state["generator"][name], value)


def test_the_generators_kind_and_width_follow_the_shape() -> None:
    features = initial_generator(0, 5, 64, CLASSES, (WIDTH,), torch.device("cpu"))
    assert isinstance(features, FeatureGenerator)
    with initial_weights(torch_stream(0, "generator", "initial-weights")):
        paper = FeatureGenerator(5, CLASSES, WIDTH)  # its own default: 256 units
    assert [value.shape for value in features.parameters()] == [value.shape for value in paper.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(features.parameters(), paper.parameters()))
    assert isinstance(initial_generator(0, 5, 4, CLASSES, SHAPE, torch.device("cpu")), ConditionalGenerator)


def test_noise_has_the_width_of_the_features() -> None:
    x, _ = NoiseInputs((WIDTH,), stream("noise")).batch(torch.zeros(7, dtype=torch.int64), torch.zeros(7, 5))
    assert x.shape == (7, WIDTH)


# What is refused


class Tied(nn.Module):
    """A model whose head has the weight of a layer before it."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        names = ("fc", "body") if head_first else ("body", "fc")
        for name in names:
            setattr(self, name, nn.Linear(4, 4))
        self.body.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x.flatten(1)).relu())
        return out


class Scaled(nn.Linear):
    """A head with a parameter of its own beside weight and bias."""

    def __init__(self) -> None:
        super().__init__(4, CLASSES)
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self.scale


@pytest.mark.parametrize("head_first", [True, False])
def test_a_tied_head_is_refused(head_first: bool) -> None:
    with pytest.raises(InputError, match="'fc' are tied"):
        ftg().check(Stateless(Tied(head_first), "fc"), context().info)


def test_a_computed_head_is_refused() -> None:
    module = network(0)
    nn.utils.parametrizations.weight_norm(module.fc)
    with pytest.raises(InputError, match="'fc' are tied to others, or computed"):
        ftg().check(Stateless(module, "fc"), context().info)


def test_a_head_of_any_linear_kind_learns_with_all_that_it_has() -> None:
    def made(number: int) -> nn.Module:
        with initial_weights(torch_stream(3, "scaled", number)):
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), Scaled())

    model = Stateless(made(0), "2")
    weights = [Weights(*split_state(made(number))) for number in range(4)]
    teachers = StackedTeachers.of(model, weights[1:], COUNTS)
    refined = ftg().refine(model, weights[0], teachers, {}, context(head="2"))
    changed = {
        name for name, value in weights[0].params.items() if not torch.equal(value, refined.weights.params[name])
    }
    assert changed == {"2.weight", "2.bias", "2.scale"}


@pytest.mark.parametrize(
    ("info", "says"),
    [({"head": None}, "name it with model.head"), ({"architectures": 2}, "different architectures")],
)
def test_check_refuses_what_has_no_common_head(info: dict[str, object], says: str) -> None:
    model, student, teachers = scene()
    with pytest.raises(InputError, match=says):
        ftg().check(model, context(**info).info)
    with pytest.raises(InputError, match=says):
        ftg().refine(model, student, teachers, {}, context(**info))
    ftg().check(model, context().info)


def test_grouped_teachers_are_refused() -> None:
    model, student, teachers = scene()
    with pytest.raises(InputError, match="the student's architecture"):
        ftg().refine(model, student, GroupedTeachers([teachers]), {}, context())


@pytest.mark.parametrize(("keys", "says"), [({"inputs": "real"}, "no features"), ({"lambda_bn": 0.1}, "lambda_bn")])
def test_settings_that_do_not_go_with_features(keys: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        FedFTGSettings(level="feature", **keys)
    overrides = ["fedftg.level=feature", *(f"fedftg.{key}={value}" for key, value in keys.items())]
    with pytest.raises(InputError, match=says):
        load_config(None, overrides)


# In a federation


FEATURE = ["method=fedavg+fedftg", "fedftg.level=feature"]


def test_it_runs_in_a_federation_and_learns_the_head_alone() -> None:
    _, state, records = play(*FEATURE, rounds=1)
    _, fused, _ = play("method=fedavg", rounds=1)
    refined, plain = state.server.weights.params, fused.server.weights.params
    assert {name for name, value in plain.items() if not torch.equal(value, refined[name])} == {
        "head.weight",
        "head.bias",
    }
    assert records[0]["refinement"]["fedftg"]["student_loss"] >= 0


def test_several_architectures_are_refused_before_round_0() -> None:
    models = [{"name": "mlp", "hidden": [16], "clients": [0, 3]}, {"name": "cnn", "width": 4}]
    with pytest.raises(InputError, match="different architectures"):
        build(load_config(None, FEATURE, {**SMALL, "model": models}))


def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = small(*FEATURE, "train.rounds=3")
    assert_goes_on_to_the_same_bits(config, tmp_path, Stop(after=1))
