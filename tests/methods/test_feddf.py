"""FedDF: its losses by hand, a student with a known optimum, early stopping, drop-worst, inputs, settings."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedstill.build import build
from fedstill.config import load_config, to_toml
from fedstill.conformance.replays.tiny import TinyCNN
from fedstill.data.dataset import Samples
from fedstill.distill.inputs import AugmentedInputs, RealInputs
from fedstill.distill.teachers import GroupedTeachers, ModuleTeachers, SomeTeachers, StackedTeachers, teacher_accuracies
from fedstill.errors import InputError
from fedstill.methods import feddf
from fedstill.methods.base import FederationInfo, RoundContext
from fedstill.methods.feddf import MODES, FedDF, FedDFSettings, StudentPhase, ensemble_loss
from fedstill.models import Stateless, initial_weights, split_state
from fedstill.rng import torch_stream
from fedstill.weights import Weights
from small import SMALL, play, same_state, same_weights, small
from stopping import Stop, assert_goes_on_to_the_same_bits

SHAPE, CLASSES = (1, 8, 8), 4
COUNTS = torch.tensor([[6, 0, 1, 0], [2, 3, 0, 0], [0, 5, 3, 0]])
FIXED = {"patience": 0, "steps": 3, "batch_size": 6}
DATA_FREE = {"mode": "fedftg", "batch_size": 6, "noise_dim": 5, "generator_width": 2, "generator_steps": 4, "steps": 3}


def stream(*name: str | int) -> torch.Generator:
    return torch_stream(5, *name)


def network(number: int, norm: bool = True) -> TinyCNN:
    with initial_weights(stream("network", number)):
        return TinyCNN(1, 3, 48, 6, CLASSES, norm)


def scene(norm: bool = True) -> tuple[Stateless, Weights, StackedTeachers]:
    model = Stateless(network(0, norm))
    teachers = [Weights(*split_state(network(number, norm))) for number in (1, 2, 3)]
    return model, Weights(*split_state(model.module)), StackedTeachers.of(model, teachers, COUNTS)


def samples(number: int, name: str = "samples") -> Samples:
    draw = stream(name, number)
    return Samples(torch.randn(number, *SHAPE, generator=draw), torch.randint(CLASSES, (number,), generator=draw))


def context(round: int = 0, **given: Samples) -> RoundContext:
    info = FederationInfo((7, 5, 8), CLASSES, SHAPE)
    return RoundContext(round, info, 0.9**round, lambda purpose: stream(purpose, round), torch.device("cpu"), **given)


def method(**keys: object) -> FedDF:
    return FedDF(FedDFSettings(**{**FIXED, **keys}), seed=2)


# The loss


def test_the_three_averages_by_hand() -> None:
    # Two teachers at (1/2, 1/2) and (9/10, 1/10), the second with weight 3/4; the student at (1/2, 1/2).
    teachers = torch.tensor([[[0.0, 0.0]], [[math.log(9), 0.0]]], dtype=torch.float64)
    student, weights = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0.25, 0.75])

    def kl_from_half(p: float) -> float:
        return p * math.log(p / 0.5) + (1 - p) * math.log((1 - p) / 0.5)

    logits = 9**0.75 / (9**0.75 + 1)  # the mean of the logits is 3/4 log 9
    assert float(ensemble_loss(student, teachers, weights, "logits")) == pytest.approx(kl_from_half(logits))
    assert float(ensemble_loss(student, teachers, weights, "probabilities")) == pytest.approx(kl_from_half(0.8))
    assert float(ensemble_loss(student, teachers, weights, "losses")) == pytest.approx(0.75 * kl_from_half(0.9))


def test_the_mean_is_over_the_batch_and_a_sure_teacher_is_no_nan() -> None:
    teachers = torch.tensor([[[0.0, 0.0], [500.0, 0.0]]])
    student = torch.zeros(2, 2, requires_grad=True)
    for average in ("logits", "probabilities", "losses"):
        loss = ensemble_loss(student, teachers, torch.ones(1), average)
        assert loss.item() == pytest.approx(math.log(2) / 2)
        slope = torch.autograd.grad(loss, student)[0]
        torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0], [-0.25, 0.25]]))


def linear(number: int) -> nn.Module:
    with initial_weights(stream("linear", number)):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()


def test_a_linear_student_ends_in_the_mean_of_linear_teachers() -> None:
    """Averaged logits of linear models are those of the averaged model: the one student with loss 0."""
    model = Stateless(linear(0))
    weights = [Weights(*split_state(linear(number))) for number in (1, 2)]
    counts = torch.tensor([[1, 0, 0], [1, 1, 1]])
    x = 2 * torch.randn(50, 1, 2, 2, generator=stream("x"), dtype=torch.float64)
    teachers = StackedTeachers.of(model, weights, counts)
    info = FederationInfo((1, 3), 3, (1, 2, 2))
    public = RoundContext(0, info, stream=stream, public=Samples(x, torch.zeros(50, dtype=torch.int64)))
    for client_weights, share in (("uniform", 0.5), ("samples", 0.25)):
        keys = {"steps": 600, "lr_student": 0.05, "client_weights": client_weights}
        refined = method(**keys).refine(model, Weights(*split_state(model.module)), teachers, {}, public)
        for name in ("1.weight", "1.bias"):
            wanted = share * weights[0].params[name] + (1 - share) * weights[1].params[name]
            got = refined.weights.params[name]
            # A constant added to all logits changes no probability.
            torch.testing.assert_close(got - got.mean(0), wanted - wanted.mean(0), rtol=0, atol=1e-3)


# On any list of models


def constant(logit: float) -> nn.Module:
    """Return a model of two outputs: ``w x + b`` with all w 0, the logits of every sample (logit, 0)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([logit, 0.0], dtype=torch.float64))
    return model


def test_a_step_on_any_list_of_models_by_hand() -> None:
    """Teachers at logits 0 and log 9 weigh 1/4 and 3/4; the student at (1/2, 1/2) takes one step of SGD.

    The slope of the KL in the student's logits is s - q, whatever x is. So the bias moves by lr (q - s), and the
    weights by lr (q - s) times the mean of x, which is (1, 1, 1, 1): the samples are all ones.
    """
    student, teachers = constant(0.0), [constant(0.0), constant(math.log(9))]
    keys = {"steps": 1, "batch_size": 5, "optimiser": "sgd", "lr_student": 0.5, "patience": 0}
    wanted = {"logits": 9**0.75 / (9**0.75 + 1), "probabilities": 0.25 * 0.5 + 0.75 * 0.9}
    for average, q in wanted.items():
        student = constant(0.0)
        method = FedDF(FedDFSettings(**keys, average=average, client_weights="samples"))
        ones = torch.ones(7, 1, 2, 2)  # float32, while the models are float64
        returned, state, metrics = method.distil(student, teachers, [[2, 0], [1, 5]], (1, 2, 2), unlabelled=ones)
        assert returned is student
        assert state == {}
        step = 0.5 * (q - 0.5)
        torch.testing.assert_close(student[1].bias, torch.tensor([step, -step], dtype=torch.float64))
        torch.testing.assert_close(student[1].weight, torch.tensor([[step] * 4, [-step] * 4], dtype=torch.float64))
        loss = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
        assert metrics == {
            "student_loss": pytest.approx(loss), "grad_norm": pytest.approx((q - 0.5) * math.sqrt(10)),
            "steps": 1.0, "teachers_dropped": 0.0,
        }  # fmt: skip
    assert all(torch.equal(teacher[1].weight, torch.zeros(2, 4, dtype=torch.float64)) for teacher in teachers)
    assert [float(teacher[1].bias[0]) for teacher in teachers] == [0.0, math.log(9)]


def test_validation_drops_a_teacher_and_finds_the_best_student() -> None:
    """All labels are 0; chance is 1/2, so that the teacher of the other class is dropped and the other one teaches."""
    settings = FedDFSettings(steps=4, batch_size=3, patience=4, validate_every=1, drop_below=1.2, lr_student=0.1)
    x, labels = torch.ones(6, 1, 2, 2), torch.zeros(6, dtype=torch.int32)
    student = constant(-0.3)
    _, _, metrics = FedDF(settings).distil(
        student, [constant(-3.0), constant(3.0)], [[1, 1], [1, 1]], (1, 2, 2), unlabelled=x, validation=(x, labels)
    )
    assert metrics["teachers_dropped"] == 1.0
    assert metrics["validation_accuracy"] == 1.0
    # Each Adam step of 0.1 moves every number by 0.1 at first: the difference of the logits, -0.3, rises by 1.0.
    assert metrics["best_step"] == 1.0
    bias, weight = student[1].bias.detach(), student[1].weight.detach()
    torch.testing.assert_close(bias, torch.tensor([-0.2, -0.1], dtype=torch.float64))
    torch.testing.assert_close(weight, torch.tensor([[0.1] * 4, [-0.1] * 4], dtype=torch.float64))


def test_modules_and_a_federations_round_are_refined_alike() -> None:
    student, teachers = network(0), [network(number) for number in (1, 2, 3)]
    model, start, stacked = scene()
    public = samples(20)
    for keys in ({}, DATA_FREE):
        module, fusion = copy.deepcopy(student), method(**keys)
        unlabelled = public.x if fusion.needs_public else None
        _, state, metrics = fusion.distil(module, teachers, COUNTS, SHAPE, unlabelled=unlabelled)
        same = replace(context(public=public), stream=lambda purpose: torch_stream(2, purpose, 0))
        refined = fusion.refine(model, start, stacked, {}, same)
        assert state.keys() == refined.state.keys()
        assert metrics == pytest.approx(refined.metrics, rel=1e-4)
        for name, value in {**refined.weights.params, **refined.weights.buffers}.items():
            torch.testing.assert_close(module.state_dict()[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "given", "says"),
    [
        ({}, {"unlabelled": None}, "inputs = 'unlabelled' needs samples, unlabelled=x"),
        ({"inputs": "noise"}, {}, "inputs = 'noise' takes no samples"),
        ({"inputs": "real"}, {"unlabelled": None}, "an oracle for simulation"),
        ({"patience": 5}, {}, "needs validation"),
        ({}, {"unlabelled": torch.zeros(3, 64)}, r"expected normalised floating-point images of shape \(N, 1, 8, 8\)"),
        ({}, {"unlabelled": torch.zeros(0, *SHAPE)}, "one at least"),
        ({}, {"unlabelled": torch.zeros(3, *SHAPE, dtype=torch.uint8)}, "unlabelled: samples are torch.uint8"),
        ({}, {"validation": (torch.zeros(3, *SHAPE), torch.tensor([0, 1, CLASSES]))}, "validation: .* from 0 to 3"),
        ({}, {"validation": (torch.zeros(3, *SHAPE), torch.zeros(2, dtype=torch.int64))}, "each of 3 samples"),
        ({}, {"class_counts": COUNTS[:2]}, "expected one row of class counts for each of 3 teachers"),
        ({}, {"class_counts": COUNTS[:, :3]}, "but the data has 3 classes"),
        ({"augment": "turn"}, {}, "unknown augmentation"),
    ],
)
def test_what_distil_refuses_leaves_the_student(keys: dict[str, object], given: dict[str, object], says: str) -> None:
    student = network(0)
    before = copy.deepcopy(student.state_dict())
    usual = {"class_counts": COUNTS, "input_shape": SHAPE, "unlabelled": torch.zeros(3, *SHAPE)}
    with pytest.raises(InputError, match=says):
        method(**keys).distil(student, [network(number) for number in (1, 2, 3)], **{**usual, **given})
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


# The student's steps


@pytest.mark.parametrize("average", ["logits", "probabilities", "losses"])
def test_a_student_among_equal_teachers_stays_where_it_is(average: str) -> None:
    model, student, _ = scene(norm=False)
    teachers = StackedTeachers.of(model, [student] * 3, COUNTS)
    fusion = method(average=average, optimiser="sgd", lr_student=0.1)
    refined = fusion.refine(model, student, teachers, {}, context(public=samples(20)))
    for name, value in student.params.items():
        torch.testing.assert_close(refined.weights.params[name], value, rtol=0, atol=1e-6)


def test_only_the_student_moves_and_its_batchnorm_follows_the_inputs() -> None:
    model, student, teachers = scene()
    before = student.clone(), copy.deepcopy(teachers.params), copy.deepcopy(teachers.buffers)
    own = copy.deepcopy(model.module.state_dict())
    refined = method().refine(model, student, teachers, {}, context(public=samples(20)))
    assert same_weights(before[0], student)
    for kept, now in zip(before[1:], (teachers.params, teachers.buffers)):
        assert all(torch.equal(value, now[name]) for name, value in kept.items())
    assert all(torch.equal(value, own[name]) for name, value in model.module.state_dict().items())
    assert not any(torch.equal(value, refined.weights.params[name]) for name, value in student.params.items())
    assert refined.weights.buffers["bn.num_batches_tracked"] == student.buffers["bn.num_batches_tracked"] + 3
    assert not any(value.requires_grad for value in refined.weights.params.values())
    assert refined.state == {}
    assert refined.metrics.keys() == {"student_loss", "grad_norm", "steps", "teachers_dropped"}
    assert (refined.metrics["steps"], refined.metrics["teachers_dropped"]) == (3, 0)


def test_the_two_schedules() -> None:
    model, student, teachers = scene()

    def rates(**keys: object) -> list[float]:
        settings = FedDFSettings(patience=0, steps=4, lr_student=0.2, **keys)
        given = RealInputs(samples(9), stream("inputs"))
        run = StudentPhase(settings, model, student, teachers, given, Nothing(), lr_factor=0.5)
        found = []
        while run.done < 4:
            found.append(run.lr())
            run.step()
        return found

    assert rates() == pytest.approx([0.2, 0.1 * (1 + math.sqrt(0.5)), 0.1, 0.1 * (1 - math.sqrt(0.5))])
    assert rates(lr_schedule="rounds") == [0.1] * 4


@dataclass(frozen=True)
class Nothing:
    """Draws for inputs that need none."""

    def labels(self, iteration: int) -> Tensor:
        return torch.zeros(6, dtype=torch.int64)

    def noise(self, iteration: int, step: int) -> Tensor:
        return torch.zeros(6, 0)


def test_without_steps_nothing_happens() -> None:
    model, student, teachers = scene()
    refined = method(steps=0).refine(model, student, teachers, {"generator": {}}, context())
    assert same_weights(refined.weights, student)
    assert (refined.state, refined.metrics) == ({"generator": {}}, {})


# Early stopping


@dataclass
class Traced(StudentPhase):
    """A student phase that remembers the student after every step."""

    trace: list[Weights] = field(default_factory=list)

    def step(self) -> None:
        super().step()
        self.trace.append(self.student.clone())


def phase(**keys: object) -> Traced:
    model, student, teachers = scene()
    settings = FedDFSettings(**{"batch_size": 6, "validate_every": 2, "patience": 4, "steps": 20, **keys})
    given = RealInputs(samples(30), stream("inputs"))
    return Traced(settings, model, student, teachers, given, Nothing(), validation=samples(8))


def scripted(monkeypatch: pytest.MonkeyPatch, accuracies: Sequence[float]) -> list[float]:
    """Let the validation accuracies be these, in turn; return what is left of them."""
    left = list(accuracies)
    monkeypatch.setattr(feddf, "evaluate", lambda *_, **__: SimpleNamespace(accuracy=left.pop(0)))
    return left


@pytest.mark.parametrize(
    ("keys", "accuracies", "done", "best"),
    [
        ({}, [0.5, 0.6, 0.55, 0.6], 8, 4),  # patience 4 runs out at step 8; an equal accuracy is no gain
        ({}, [0.5, 0.4, 0.6, 0.1, 0.1], 10, 6),
        ({}, [0.0, 0.0, 0.0], 6, 2),  # the first measurement is a gain whatever it is
        ({"steps": 5}, [0.5, 0.6, 0.7], 5, 5),  # the last step is measured too
        ({"steps": 4}, [0.5, 0.6], 4, 4),  # and once
        ({"patience": 2}, [0.5, 0.4], 4, 2),
        ({"initial_is_candidate": True}, [0.5, 0.4, 0.4], 4, 0),
        ({"initial_is_candidate": True}, [0.5, 0.6, 0.5, 0.5], 6, 2),
    ],
)
def test_early_stopping_by_hand(
    keys: dict[str, object], accuracies: list[float], done: int, best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = scripted(monkeypatch, accuracies)
    run = phase(**keys)
    start = run.student.clone()
    returned = run.run()
    assert not left
    assert (run.done, run.best_step) == (done, best)
    assert same_weights(returned, [start, *run.trace][best])
    assert run.metrics()["validation_accuracy"] == max(accuracies)
    assert (run.metrics()["steps"], run.metrics()["best_step"]) == (done, best)


def test_without_patience_nothing_is_measured_and_the_last_student_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [])
    run = phase(patience=0, steps=5, initial_is_candidate=True)
    assert same_weights(run.run(), run.trace[-1])
    assert run.done == 5
    assert "validation_accuracy" not in run.metrics()


def test_the_best_student_is_the_one_that_the_validation_samples_say() -> None:
    run = phase(lr_student=0.05, steps=12, patience=12, validate_every=1)
    best = run.run()
    held = samples(8)

    def right(weights: Weights) -> float:
        logits = run.model(weights.params, weights.buffers, held.x, train=False)
        return float((logits.argmax(-1) == held.y).double().mean())

    measured = [right(weights) for weights in run.trace]
    assert right(best) == max(measured) == run.accuracy
    assert run.best_step == 1 + measured.index(max(measured))


# Drop-worst


class Says(nn.Module):
    """A teacher with one answer for every sample."""

    def __init__(self, label: int) -> None:
        super().__init__()
        self.register_buffer("logits", 3 * torch.eye(CLASSES)[label])

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer("logits").expand(len(x), -1)


def held_out() -> Samples:
    """Return ten samples: labels 0 four times, 1 three, 2 three, 3 never."""
    return Samples(samples(10).x, torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2]))


def test_each_teachers_accuracy() -> None:
    held = held_out()
    teachers = ModuleTeachers([Says(label) for label in (3, 0, 1)], COUNTS)
    for batch_size in (500, 3):
        assert teacher_accuracies(teachers, held.x, held.y, batch_size) == [0.0, 0.4, 0.3]


def test_teachers_below_a_multiple_of_chance_are_left_out() -> None:
    model, student, _ = scene()
    teachers = ModuleTeachers([Says(label) for label in (3, 0, 1)], COUNTS)
    given = context(public=samples(20), validation=held_out())
    # Chance is 1/4: 1.2 times it are 0.3, which the third teacher has just reached.
    for drop_below, kept in ((1.2, [1, 2]), (1.3, [1]), (0.01, [1, 2]), (0.0, [0, 1, 2])):
        refined = method(drop_below=drop_below, client_weights="samples").refine(model, student, teachers, {}, given)
        good = ModuleTeachers([teachers.modules[place] for place in kept], COUNTS[kept])
        wanted = method(client_weights="samples").refine(model, student, good, {}, given)
        assert refined.metrics["teachers_dropped"] == 3 - len(kept)
        assert same_weights(refined.weights, wanted.weights)


def test_where_all_are_dropped_the_fused_model_stays() -> None:
    model, student, teachers = scene()
    given = context(public=samples(20), validation=held_out())
    refined = method(drop_below=4.0).refine(model, student, teachers, {"generator": {}}, given)
    assert same_weights(refined.weights, student)
    assert refined.metrics == {"steps": 0.0, "teachers_dropped": 3.0}


def test_some_of_an_ensemble() -> None:
    _, _, teachers = scene()
    both = GroupedTeachers([teachers, teachers])
    some, x = SomeTeachers(both, [1, 5]), samples(4).x
    assert len(some) == 2
    assert torch.equal(some.counts, COUNTS[[1, 2]])
    assert torch.equal(some.logits(x), teachers.logits(x)[[1, 2]])
    assert torch.equal(some.logits_of(1, x), teachers.logits_of(2, x))
    logits, gaps = some.statistics_gap(x)
    assert torch.equal(logits, some.logits(x))
    assert torch.equal(gaps, teachers.statistics_gap(x)[1][[1, 2]])


# Inputs


def test_the_labels_of_the_public_set_are_not_used() -> None:
    model, student, teachers = scene()
    public = samples(20)
    other = Samples(public.x, (public.y + 1) % CLASSES)
    first, second = (method().refine(model, student, teachers, {}, context(public=one)) for one in (public, other))
    assert same_weights(first.weights, second.weights)
    fewer = method().refine(model, student, teachers, {}, context(public=public.take([0, 1])))
    assert not same_weights(first.weights, fewer.weights)


def test_the_public_set_is_augmented_from_a_stream_of_its_own() -> None:
    public = samples(20)
    labels, noise = torch.zeros(50, dtype=torch.int64), torch.zeros(50, 0)
    plain, y = RealInputs(public, stream("inputs")).batch(labels, noise)

    def augmented(purpose: str) -> tuple[Tensor, Tensor]:
        return AugmentedInputs(RealInputs(public, stream("inputs")), "flip-crop", stream(purpose)).batch(labels, noise)

    x, same = augmented("one")
    assert torch.equal(same, y)
    assert not torch.equal(x, plain)
    for before, after in zip(plain, x):
        pixels = set(before.flatten().tolist()) | {0.0}  # what was moved out is padded with 0
        assert set(after.flatten().tolist()) <= pixels
    assert torch.equal(augmented("one")[0], x)
    assert not torch.equal(augmented("two")[0], x)


def test_the_augmentation_is_the_clients_unless_it_is_named() -> None:
    def chosen(*keys: str) -> str:
        federation, _ = build(small("method=fedavg+feddf", "feddf.patience=0", "public.name=digits", *keys))
        refinement = federation.method.refinements[0]
        assert isinstance(refinement, FedDF)
        return refinement.augment

    assert chosen() == "none"
    assert chosen("data.augment=flip-crop-half") == "flip-crop-half"
    assert chosen("data.augment=flip-crop-half", "feddf.augment=none") == "none"
    with pytest.raises(InputError, match=r"feddf\.augment.*'flip-crpo'.*did you mean"):
        chosen("feddf.augment=flip-crpo")


def test_noise_and_the_oracle() -> None:
    model, student, teachers = scene()
    noise = method(inputs="noise").refine(model, student, teachers, {}, context())
    assert not same_weights(noise.weights, student)
    oracle = method(inputs="real")
    assert oracle.simulation_only
    refined = oracle.refine(model, student, teachers, {}, context(real=samples(20)))
    public = method().refine(model, student, teachers, {}, context(public=samples(20)))
    assert same_weights(refined.weights, public.weights)


@pytest.mark.parametrize(
    ("keys", "given", "says"),
    [
        ({}, {}, "public.name"),
        ({"inputs": "real"}, {}, "oracle"),
        ({"patience": 100}, {"public": samples(5)}, "data.server_validation"),
        ({"drop_below": 1.2}, {"public": samples(5)}, "data.server_validation"),
    ],
)
def test_what_is_missing_is_said(keys: dict[str, object], given: dict[str, Samples], says: str) -> None:
    model, student, teachers = scene()
    with pytest.raises(InputError, match=says):
        method(**keys).refine(model, student, teachers, {}, context(**given))


@pytest.mark.parametrize(
    ("keys", "public", "validation", "counts", "simulation"),
    [
        ({"patience": 1000}, True, True, False, False),
        ({}, True, False, False, False),
        ({"drop_below": 1.2}, True, True, False, False),
        ({"inputs": "noise"}, False, False, False, False),
        ({"inputs": "real"}, False, False, False, True),
        ({"inputs": "generator"}, False, False, True, False),
        ({"inputs": "generator", "labels": "uniform"}, False, False, False, False),
        ({"mode": "fedftg"}, False, False, True, False),
    ],
)
def test_what_the_settings_need(
    keys: dict[str, object], public: bool, validation: bool, counts: bool, simulation: bool
) -> None:
    part = method(**keys)
    needs = (part.needs_public, part.needs_validation, part.needs_label_counts, part.simulation_only)
    assert needs == (public, validation, counts, simulation)


# Without data


def data_free(**keys: object) -> FedDF:
    return FedDF(FedDFSettings(**{**DATA_FREE, **keys}), seed=2)


def test_the_generator_lives_on_in_the_state() -> None:
    model, student, teachers = scene()
    first = data_free().refine(model, student, teachers, {}, context())
    kept = copy.deepcopy(first.state)
    second = data_free().refine(model, student, teachers, first.state, context(1))
    fresh = data_free().refine(model, student, teachers, {}, context(1))
    still = data_free(generator_steps=0).refine(model, student, teachers, first.state, context(1))
    for name, value in kept["generator"].items():
        assert torch.equal(first.state["generator"][name], value)
        assert torch.equal(still.state["generator"][name], value)
    name = "from_noise.weight"
    assert not torch.equal(second.state["generator"][name], kept["generator"][name])
    assert not torch.equal(second.state["generator"][name], fresh.state["generator"][name])
    assert {"generator_cls", "generator_dis", "student_loss"} <= first.metrics.keys()


@pytest.mark.parametrize(("forwards", "times"), [("once", 1), ("per-teacher", 4)])
def test_the_generators_statistics_follow_once_or_for_every_teacher(forwards: str, times: int) -> None:
    model, student, teachers = scene()
    refined = data_free(generator_forwards=forwards).refine(model, student, teachers, {}, context())
    assert int(refined.state["generator"]["blocks.0.num_batches_tracked"]) == 4 * times


def test_the_generator_learns_from_the_teachers_that_are_kept() -> None:
    model, student, teachers = scene()
    held = Samples(samples(10).x, teachers.logits_of(0, samples(10).x).argmax(-1))
    assert teacher_accuracies(teachers, held.x, held.y)[0] == 1
    given = context(validation=held)
    refined = data_free(drop_below=4.0).refine(model, student, teachers, {}, given)
    kept = [place for place, right in enumerate(teacher_accuracies(teachers, held.x, held.y)) if right == 1]
    wanted = data_free().refine(model, student, SomeTeachers(teachers, kept), {}, given)
    assert refined.metrics["teachers_dropped"] == 3 - len(kept) > 0
    assert torch.equal(refined.state["generator"]["blocks.2.weight"], wanted.state["generator"]["blocks.2.weight"])
    assert same_weights(refined.weights, wanted.weights)


def test_samples_that_no_generator_makes_are_refused_before_round_0() -> None:
    info = replace(context().info, input_shape=(1, 7, 8))
    with pytest.raises(InputError, match="multiples of 4"):
        data_free().check(scene()[0], info)
    method().check(scene()[0], info)


# In a federation


PUBLIC = ["public.name=digits", "public.samples=60", "feddf.batch_size=16"]


def test_the_papers_form_runs_in_a_federation() -> None:
    keys = [*PUBLIC, "data.server_validation=40", "feddf.steps=60", "feddf.patience=20", "feddf.validate_every=5"]
    _, state, records = play("method=fedavg+feddf", *keys)
    for record in records:
        measured = record["refinement"]["feddf"]
        assert measured["best_step"] <= measured["steps"] <= 60
        assert 0 <= measured["validation_accuracy"] <= 1
        assert measured["best_step"] % 5 == 0
    assert state.refinements == ({},)
    with pytest.raises(InputError, match=r"feddf needs samples.*server_validation"):
        build(small("method=fedavg+feddf", *PUBLIC))
    with pytest.raises(InputError, match="needs a public set"):
        build(small("method=fedavg+feddf", "feddf.patience=0"))


@pytest.mark.parametrize("mode", ["paper", "fedftg"])
def test_architectures_teach_each_other(mode: str) -> None:
    models = [{"name": "mlp", "hidden": [16], "clients": [0, 3]}, {"name": "cnn", "width": 4}]
    keys = [*PUBLIC, f"feddf.mode={mode}", "feddf.patience=0", "feddf.steps=3", "feddf.generator_width=4"]
    config = load_config(None, ["method=fedavg+feddf", *keys], {**SMALL, "model": models})
    federation, _ = build(config)
    state, record = federation.run_round(federation.start())
    assert set(record["refinement"]["by_model"]) == {"mlp", "cnn"}
    alone = load_config(None, ["method=fedavg", *keys], {**SMALL, "model": models})
    fused, _ = build(alone)
    plain, _ = fused.run_round(fused.start())
    for refined, model in zip(state.models, plain.models):
        assert not same_weights(refined.server.weights, model.server.weights)


@pytest.mark.parametrize("mode", ["paper", "fedftg"])
def test_a_stopped_run_ends_with_the_same_bits(mode: str, tmp_path: Path) -> None:
    keys = [*PUBLIC, f"feddf.mode={mode}", "feddf.patience=0", "feddf.steps=4", "feddf.generator_width=4"]
    config = small("method=fedavg+feddf", "train.rounds=3", "feddf.generator_steps=4", *keys)
    assert_goes_on_to_the_same_bits(config, tmp_path, Stop(after=1))


def test_without_steps_it_is_its_base_method() -> None:
    _, plain, _ = play("method=fedavg")
    _, idle, _ = play("method=fedavg+feddf", *PUBLIC, "feddf.patience=0", "feddf.steps=0")
    assert same_state(plain, replace(idle, models=(replace(idle.models[0], refinements=()),)))


# Settings


def test_the_modes() -> None:
    paper, baseline = FedDFSettings(), FedDFSettings(mode="fedftg")
    assert (paper.inputs, paper.average, paper.client_weights) == ("unlabelled", "logits", "uniform")
    assert (paper.steps, paper.patience, paper.validate_every) == (10_000, 1000, 100)
    assert (paper.optimiser, paper.lr_student, paper.clip_norm, paper.weight_decay_student) == ("adam", 1e-3, 5, 0)
    assert (paper.batch_size, paper.initial_is_candidate, paper.drop_below) == (128, False, 0)
    assert (baseline.generator_steps, baseline.steps, baseline.patience, baseline.clip_norm) == (50, 20, 0, 0)
    assert (baseline.inputs, baseline.average, baseline.labels) == ("generator", "probabilities", "stratified")
    assert FedDFSettings(mode="fedftg", steps=7).steps == 7
    assert FedDFSettings(clip_norm="none").clip_norm == 0


@pytest.mark.parametrize(
    "keys",
    [{"mode": "code"}, {"average": "votes"}, {"batch_size": 1}, {"patience": -1}, {"steps": 1.5}, {"inputs": "public"}],
)
def test_settings_that_are_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(keys))):
        FedDFSettings(**keys)


def test_another_mode_speaks_over_a_complete_file(tmp_path: Path) -> None:
    for first, second in (("paper", "fedftg"), ("fedftg", "paper")):
        path = tmp_path / f"{first}.toml"
        path.write_text(to_toml(small(f"feddf.mode={first}", "feddf.lr_generator=0.5")))
        assert load_config(path).feddf == FedDFSettings(mode=first, lr_generator=0.5)
        assert load_config(path, [f"feddf.mode={second}"]).feddf == FedDFSettings(mode=second, lr_generator=0.5)
        assert set(MODES[second]) <= set(FedDFSettings.model_fields)
