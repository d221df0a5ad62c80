"""FedFTG: its losses by hand, its labels, which phase changes what, its modes, and its use on any models."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fedstill.conformance.replays.tiny import TinyCNN
from fedstill.data.dataset import Samples
from fedstill.distill import losses
from fedstill.distill.graphs import Recorder
from fedstill.distill.inputs import NoiseInputs, RealInputs, StreamDraws, initial_generator
from fedstill.distill.labels import draw_labels, stratified_counts
from fedstill.distill.loop import Distillation, Pieces, generated
from fedstill.distill.teachers import StackedTeachers
from fedstill.distill.weighting import class_shares, mixture, sample_weights
from fedstill.errors import InputError
from fedstill.methods.base import FederationInfo, RoundContext
from fedstill.methods.fedftg import FedFTG, FedFTGSettings
from fedstill.models import ConditionalGenerator, Stateless, initial_weights, split_state
from fedstill.rng import torch_stream
from fedstill.weights import State, Tensors, Weights

SHAPE = (1, 8, 8)
COUNTS = torch.tensor([[6, 0, 1, 0], [2, 3, 0, 0], [0, 5, 3, 0]])  # nobody holds class 3
SMALL = {"iterations": 3, "batch_size": 6, "noise_dim": 5, "student_steps": 2}
MODES = ("paper", "code", "tuned")


def stream(*name: str | int) -> torch.Generator:
    return torch_stream(3, *name)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=stream("test", *shape), dtype=torch.float64)


# Losses


def shares_and_logits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    labels = torch.tensor([0, 1, 2, 0, 1])
    return class_shares(COUNTS), labels, random(5, 4).requires_grad_(), 2 * random(3, 5, 4)


@pytest.mark.parametrize(("reduction", "factor"), [("batch", 1.0), ("batch-classes", 1 / 4)])
def test_the_papers_student_gradient(reduction: losses.Reduction, factor: float) -> None:
    shares, labels, student, teachers = shares_and_logits()
    weights = sample_weights(shares, labels, "label")
    target = mixture(teachers, shares, labels, "label")
    loss = losses.student_loss(student, teachers, weights, target, "kl-student-teacher", reduction)
    s = student.detach().softmax(-1)
    d = s.log() - (weights[..., None] * teachers.log_softmax(-1)).sum(0)
    wanted = s * (d - (s * d).sum(-1, keepdim=True)) / 5 * factor
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], wanted)


def test_the_papers_student_loss_for_two_classes_by_hand() -> None:
    # s = (1/4, 3/4) against one teacher at (1/2, 1/2).
    student = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
    teacher = torch.zeros(1, 1, 2, dtype=torch.float64)
    weights, target = torch.ones(1, 1), torch.full((1, 2), 0.5)
    loss = losses.student_loss(student, teacher, weights, target, "kl-student-teacher", "batch")
    assert loss.item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    slope = float(torch.autograd.grad(loss, student)[0][0, 0])
    assert slope == pytest.approx(0.25 * 0.75 * (math.log(0.5) - math.log(1.5)))
    md = losses.discrepancy(student, teacher, weights, target, "kl-student-teacher")
    assert md.item() == pytest.approx(loss.item())


def test_the_released_student_gradient_is_the_forward_kls_over_the_number_of_classes() -> None:
    shares, labels, student, teachers = shares_and_logits()
    weights = sample_weights(shares, labels, "label")
    target = mixture(teachers, shares, labels, "label")
    code = losses.student_loss(student, teachers, weights, target, "kl-teacher-student", "batch-classes")
    forward = (weights * losses.kl(teachers, student)).sum(0).mean()
    got, wanted = (torch.autograd.grad(loss, student)[0] for loss in (code, forward))
    torch.testing.assert_close(got, wanted / 4)


def test_a_label_that_nobody_holds_weighs_nothing_but_counts_in_the_batch() -> None:
    shares, _, student, teachers = shares_and_logits()
    for kind in ("kl-student-teacher", "kl-teacher-student", "mse"):
        value = []
        for labels in (torch.tensor([0]), torch.tensor([0, 3])):
            size = len(labels)
            weights, target = sample_weights(shares, labels, "label"), mixture(
                teachers[:, :size], shares, labels, "label"
            )  # fmt: skip
            value.append(losses.student_loss(student[:size], teachers[:, :size], weights, target, kind, "batch").item())
        assert value[1] == pytest.approx(value[0] / 2)


def test_kl_is_a_divergence_in_the_order_that_its_name_says() -> None:
    left, right = torch.tensor([0.0, 0.0]), torch.tensor([math.log(9.0), 0.0])
    assert float(losses.kl(left, right)) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert float(losses.kl(right, left)) == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert float(losses.kl(right, right + 5)) == pytest.approx(0, abs=1e-6)


def test_only_the_released_mining_leaves_the_teachers_out() -> None:
    shares, labels, student, teachers = shares_and_logits()
    teachers.requires_grad_()
    weights = sample_weights(shares, labels, "label")
    for kind in ("kl-student-teacher", "kl-teacher-student", "l1-logits", "mse"):
        target = mixture(teachers, shares, labels, "label")
        md = losses.discrepancy(student, teachers, weights, target, kind).sum()
        by_student, by_teachers = torch.autograd.grad(md, [student, teachers], materialize_grads=True)
        assert by_student.any()
        assert bool(by_teachers.any()) == (kind != "l1-logits")


def test_the_two_ways_to_weigh_the_classification_loss() -> None:
    logits = torch.zeros(1, 2, 2, dtype=torch.float64)
    logits[0, 1, 1] = math.log(3)  # CE log 2 for label 0, log 4 for label 0
    labels, weights = torch.tensor([0, 0]), torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    paper = losses.classification(logits, labels, weights, per_sample=True)
    assert paper.tolist() == pytest.approx([(math.log(2) + 0.5 * math.log(4)) / 2])
    code = losses.classification(logits, labels, weights, per_sample=False)
    assert code.tolist() == pytest.approx([(math.log(2) + math.log(4)) / 2 * 0.75])


def test_diversity_is_one_for_equal_images_and_falls_as_they_spread() -> None:
    x, z = random(6, 1, 4, 4), random(6, 5)
    values = [float(losses.diversity(scale * x, z)) for scale in (0, 0.1, 0.5, 1, 2)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert all(0 < value <= 1 for value in values)
    assert len(set(values)) == 5


# Whose word counts


def test_class_shares_sum_to_one_for_the_classes_that_somebody_holds() -> None:
    shares = class_shares(COUNTS)
    torch.testing.assert_close(shares.sum(0), torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    assert shares[:, 0].tolist() == [0.75, 0.25, 0.0]
    assert class_shares(COUNTS, 1e-6)[0, 0] == 6 / (8 + 1e-6)
    assert not class_shares(COUNTS, 1e-6)[:, 3].any()


def test_the_class_mixture_by_hand() -> None:
    # p_0 = (1/2, 1/4, 1/4, 0), p_1 = (1/4, 1/2, 1/8, 1/8); class 3 is nobody's, class 2 the second teacher's.
    p = torch.tensor([[[0.5, 0.25, 0.25, 1e-300]], [[0.25, 0.5, 0.125, 0.125]]], dtype=torch.float64)
    shares = class_shares(torch.tensor([[3, 1, 0, 0], [1, 1, 2, 0]]))
    q = mixture(p.log(), shares, torch.tensor([3]), "class")
    mass = torch.tensor([0.75 * 0.5 + 0.25 * 0.25, 0.5 * 0.25 + 0.5 * 0.5, 0.125, 0.0], dtype=torch.float64)
    torch.testing.assert_close(q[0], mass / mass.sum())
    assert q[0, 3] == 0


def test_the_label_and_the_uniform_mixture() -> None:
    p = torch.tensor([[[0.5, 0.5]], [[0.9, 0.1]]], dtype=torch.float64)
    shares = class_shares(torch.tensor([[1, 0], [3, 0]]))
    held, absent = torch.tensor([0]), torch.tensor([1])
    assert mixture(p.log(), shares, held, "label")[0].tolist() == pytest.approx([0.8, 0.2])
    assert mixture(p.log(), shares, absent, "label")[0].tolist() == [0.0, 0.0]
    assert mixture(p.log(), shares, absent, "uniform")[0].tolist() == pytest.approx([0.7, 0.3])
    assert sample_weights(shares, absent, "uniform").tolist() == [[0.5], [0.5]]


# Labels


def test_sampled_labels_follow_the_cohort() -> None:
    labels = draw_labels("sampled", COUNTS, 200, 100, stream("labels"))
    assert labels.shape == (200, 100)
    frequency = torch.bincount(labels.flatten(), minlength=4).double() / labels.numel()
    torch.testing.assert_close(frequency, COUNTS.sum(0).double() / COUNTS.sum(), rtol=0, atol=0.015)
    assert frequency[3] == 0


def test_stratified_labels_are_within_one_of_their_share() -> None:
    for number in (6, 50, 500):
        counts = stratified_counts(COUNTS.sum(0), number)
        assert int(counts.sum()) == number
        wanted = COUNTS.sum(0).double() / COUNTS.sum() * number
        assert bool(((counts - wanted).abs() <= 1).all())
    labels = draw_labels("stratified", COUNTS, 5, 10, stream("labels"))
    assert torch.equal(torch.bincount(labels.flatten(), minlength=4), stratified_counts(COUNTS.sum(0), 50))
    assert not torch.equal(labels.flatten(), labels.flatten().sort().values)


def test_uniform_labels_take_every_class_and_streams_repeat() -> None:
    labels = draw_labels("uniform", COUNTS, 40, 100, stream("labels"))
    frequency = torch.bincount(labels.flatten(), minlength=4).double() / labels.numel()
    torch.testing.assert_close(frequency, torch.full((4,), 0.25, dtype=torch.float64), rtol=0, atol=0.03)
    for kind in ("sampled", "stratified", "uniform"):
        first, again = (draw_labels(kind, COUNTS, 3, 7, stream("labels")) for _ in range(2))
        assert torch.equal(first, again)


# The loop


@dataclass(frozen=True)
class Draws:
    """Labels of the classes that somebody holds, and noise by iteration and step, in float64."""

    size: int
    width: int

    def labels(self, iteration: int) -> Tensor:
        return torch.arange(self.size) % 3

    def noise(self, iteration: int, step: int) -> Tensor:
        draw = torch_stream(4, "noise", iteration, step)
        return torch.randn(self.size, self.width, generator=draw, dtype=torch.float64)


def network(number: int, norm: bool = True) -> TinyCNN:
    with initial_weights(stream("network", number)):
        return TinyCNN(1, 3, 48, 6, 4, norm)


def weights_of(module: nn.Module) -> Weights:
    return Weights(*split_state(module))


def scene(norm: bool = True, **keys: object) -> Distillation:
    """Return a refinement of tiny float64 models that has not begun."""
    settings = FedFTGSettings(**{**SMALL, **keys})
    model = Stateless(network(0, norm).double())
    teachers = [weights_of(network(number, norm).double()) for number in (1, 2, 3)]
    with initial_weights(stream("maker")):
        maker = ConditionalGenerator(settings.noise_dim, 4, SHAPE, width=2).double()
    return Distillation(
        settings,
        model,
        weights_of(model.module),
        StackedTeachers.of(model, teachers, COUNTS),
        generated(maker, settings),
        Draws(settings.batch_size, settings.noise_dim),
        maker,
    )


def as_they_are(run: Distillation) -> Pieces:
    return run.pieces(Recorder(False, run.log))


def snapshot(tensors: Tensors) -> Tensors:
    return {name: value.detach().clone() for name, value in tensors.items()}


def changed(before: Tensors, after: Tensors) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@dataclass
class Everything:
    """Copies of all that a refinement holds."""

    student: Tensors
    student_buffers: Tensors
    teachers: Tensors
    maker: Tensors
    maker_buffers: Tensors

    @staticmethod
    def of(run: Distillation) -> Everything:
        assert run.generator is not None
        assert isinstance(run.teachers, StackedTeachers)
        return Everything(
            snapshot(run.student.params),
            snapshot(run.student.buffers),
            snapshot({**run.teachers.params, **run.teachers.buffers}),
            snapshot(dict(run.generator.named_parameters())),
            snapshot(dict(run.generator.named_buffers())),
        )


@pytest.mark.parametrize("mode", MODES)
def test_the_generator_phase_changes_the_generator_alone(mode: str) -> None:
    run = scene(mode=mode, lambda_md=1.0)
    assert run.generator is not None
    before = Everything.of(run)
    run.generator_step(run.draws.noise(0, 0), run.draws.labels(0))
    after = Everything.of(run)
    assert not changed(before.student, after.student)
    assert not changed(before.student_buffers, after.student_buffers)
    assert not changed(before.teachers, after.teachers)
    assert changed(before.maker_buffers, after.maker_buffers) == set(before.maker_buffers)
    idle = set() if mode == "code" else set(run.generator.biases_before_norm())
    assert changed(before.maker, after.maker) == set(before.maker) - idle
    assert len(run.log.trace["generator_md"]) == (3 if mode == "code" else 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("generator_norm", ["eval", "train"])
@pytest.mark.parametrize("student_norm", ["eval", "train"])
def test_the_student_phase_changes_the_student_alone(mode: str, generator_norm: str, student_norm: str) -> None:
    run = scene(mode=mode, generator_norm=generator_norm, student_norm=student_norm)
    before = Everything.of(run)
    run.student_phase(0, run.draws.noise(0, 0), run.draws.labels(0), as_they_are(run))
    after = Everything.of(run)
    assert changed(before.student, after.student) == set(before.student)
    moved = set(before.student_buffers) if student_norm == "train" else set()
    assert changed(before.student_buffers, after.student_buffers) == moved
    assert not changed(before.teachers, after.teachers)
    assert not changed(before.maker, after.maker)
    assert not changed(before.maker_buffers, after.maker_buffers)
    assert len(run.log.trace["student_loss"]) == 2


def test_the_model_that_is_given_is_not_changed() -> None:
    run = scene()
    given = weights_of(run.model.module)
    own = copy.deepcopy(run.model.module.state_dict())
    again = replace(run, student=given)
    kept = given.clone()
    result = again.run()
    assert not changed(kept.params, given.params)
    assert not changed(kept.buffers, given.buffers)
    assert changed(result.params, given.params)
    assert not changed(own, run.model.module.state_dict())
    assert not any(value.requires_grad for value in result.params.values())


def test_the_summed_generator_loss_is_the_sum_over_teachers() -> None:
    run = scene(md_gen="l1-logits", generator_update="per-teacher", lambda_md=0.7, lambda_cls=1.3, lambda_dis=0.4)
    assert run.generator is not None
    z, y = run.draws.noise(0, 0), run.draws.labels(0)
    x = run.generator(z, y)
    summed = run.generator_loss(x, z, y, None)
    parts = sum(run.generator_loss(x, z, y, teacher) for teacher in range(3))
    torch.testing.assert_close(parts, summed)


def test_the_papers_generator_loss_is_its_three_terms() -> None:
    run = scene(lambda_md=0.7, lambda_cls=1.3, lambda_dis=0.4, norm=False)
    assert run.generator is not None
    z, y = run.draws.noise(0, 0), run.draws.labels(0)
    x = run.generator(z, y)
    student = network(0, norm=False).double()(x)
    teachers = torch.stack([network(number, norm=False).double()(x) for number in (1, 2, 3)])
    share = class_shares(COUNTS)[:, y]
    log_s, log_t = student.log_softmax(-1), teachers.log_softmax(-1)
    md = (share * (log_s.exp() * (log_s - log_t)).sum(-1)).sum(0).mean()
    cls = -(share * log_t[:, torch.arange(6), y]).sum(0).mean()
    dis = losses.diversity(x, z)
    torch.testing.assert_close(run.generator_loss(x, z, y, None), -0.7 * md + 1.3 * cls + 0.4 * dis)


def test_the_student_step_is_sgd_with_decay_and_lr_factor() -> None:
    run = scene(norm=False, weight_decay_student=0.5, lr_student=0.2, student_steps=1, md_student="mse")
    run = replace(run, lr_factor=0.25)
    before = snapshot(run.student.params)
    z, y = run.draws.noise(0, 0), run.draws.labels(0)
    x, _ = run.inputs.batch(y, z)
    params = {name: value.clone().requires_grad_() for name, value in before.items()}
    s = run.model(params, {}, x, train=True).softmax(-1)
    t = run.teachers.logits(x).softmax(-1)
    loss = (class_shares(COUNTS)[:, y] * (s - t).square().sum(-1)).sum(0).mean() / 4
    loss.backward()
    run.student_phase(0, z, y, as_they_are(run))
    for name, value in params.items():
        torch.testing.assert_close(run.student.params[name], before[name] - 0.05 * (value.grad + 0.5 * before[name]))


def test_the_learning_rate_factor_reaches_the_generator() -> None:
    run = replace(scene(lr_generator=0.03), lr_factor=0.5)
    assert run.adam is not None
    assert run.adam.param_groups[0]["lr"] == 0.015
    assert run.adam.param_groups[0]["weight_decay"] == 0


def test_a_student_among_equal_teachers_stays_where_it_is() -> None:
    for mode in MODES:
        run = scene(norm=False, mode=mode, weight_decay_student=0.0)
        model, student = run.model, run.student
        run = replace(run, teachers=StackedTeachers.of(model, [student] * 3, COUNTS))
        result = run.run()
        for name, value in student.params.items():
            torch.testing.assert_close(result.params[name], value, rtol=0, atol=1e-8)


def test_the_student_comes_closer_to_its_teachers() -> None:
    keys = {"iterations": 60, "lr_student": 0.5, "reduction": "batch", "weight_decay_student": 0.0}
    for loss in ("kl-student-teacher", "kl-teacher-student", "mse"):
        run = scene(norm=False, inputs="noise", md_student=loss, **keys)
        run = replace(run, generator=None, inputs=Noise())
        run.run()
        trace = torch.stack(run.log.trace["student_loss"])
        assert trace[-20:].mean() < trace[:20].mean()


@dataclass(frozen=True)
class Noise:
    """The same noise images every time."""

    def batch(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return random(len(labels), *SHAPE), labels


@pytest.mark.parametrize(("noise_per", "draws"), [("iteration", [0]), ("step", [0, 1])])
def test_noise_is_drawn_per_iteration_or_per_step(noise_per: str, draws: list[int]) -> None:
    run = scene(noise_per=noise_per)
    seen: list[int] = []

    @dataclass(frozen=True)
    class Counting(Draws):
        def noise(self, iteration: int, step: int) -> Tensor:
            seen.append(step)
            return super().noise(iteration, step)

    run = replace(run, draws=Counting(6, 5))
    run.run()
    assert seen == draws * 3


def test_two_runs_give_the_same_bits() -> None:
    first, second = scene().run(), scene().run()
    assert not changed(first.params, second.params)
    assert not changed(first.buffers, second.buffers)


# Settings


def test_the_modes() -> None:
    paper, code, tuned = (FedFTGSettings(mode=mode) for mode in MODES)
    assert FedFTGSettings() == paper
    assert (paper.md_gen, paper.md_student, paper.labels) == ("kl-student-teacher", "kl-student-teacher", "sampled")
    assert (paper.iterations, paper.generator_steps, paper.student_steps) == (10, 1, 5)
    assert (paper.lambda_md, paper.lambda_cls, paper.lambda_dis, paper.lambda_bn) == (1, 1, 1, 0)
    assert (paper.lr_generator, paper.lr_student, paper.noise_dim, paper.batch_size) == (0.01, 0.1, 100, 50)
    assert (paper.generator_update, paper.cls_weights, paper.share_epsilon) == ("summed", "per-sample", 0)
    assert (code.md_gen, code.md_student, code.labels) == ("l1-logits", "kl-teacher-student", "stratified")
    assert (code.generator_update, code.cls_weights, code.share_epsilon) == ("per-teacher", "batch-mean", 1e-6)
    assert paper.reduction == code.reduction == "batch-classes"
    assert tuned.lambda_md == 0
    assert FedFTGSettings(mode="code", labels="sampled").labels == "sampled"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"teacher": "class"}, "md_student"),
        ({"teacher": "class", "md_student": "mse", "lambda_md": 0.0}, "md_student"),
        ({"teacher": "class", "md_student": "kl-teacher-student"}, "md_gen"),
        ({"teacher": "class", "mode": "code"}, "md_gen"),
        ({"generator_update": "per-teacher", "md_gen": "kl-teacher-student"}, "per-teacher"),
        ({"generator_update": "per-teacher", "lambda_bn": 0.1}, "per-teacher"),
        ({"mode": "code", "lambda_bn": 0.1}, "per-teacher"),
        ({"mode": "published"}, "mode"),
        ({"lambda": 1.0}, "lambda"),
        ({"student_steps": 0}, "student_steps"),
        ({"batch_size": 1}, "batch_size"),
        ({"iterations": -1}, "iterations"),
        ({"lambda_cls": -0.1}, "lambda_cls"),
        ({"inputs": "unknown"}, "inputs"),
        ({"iterations": "10"}, "iterations"),
    ],
)
def test_settings_that_are_refused(keys: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        FedFTGSettings(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"teacher": "class", "md_student": "kl-teacher-student", "lambda_md": 0.0},
        {"teacher": "class", "md_student": "kl-teacher-student", "md_gen": "kl-teacher-student"},
        {"teacher": "class", "md_student": "kl-teacher-student", "inputs": "noise"},
        {"teacher": "class", "mode": "tuned"},
        {"teacher": "uniform"},
        {"md_gen": "mse", "md_student": "mse"},
        {"lambda_bn": 0.1},
        {"labels": "uniform"},
        {"generator_steps": 0},
    ],
)
def test_settings_that_go_together_run(keys: dict[str, object]) -> None:
    run = scene(**keys)
    if run.settings.inputs == "noise":
        run = replace(run, generator=None, inputs=Noise())
    result = run.run()
    assert result.all_finite()
    assert all(math.isfinite(value) for value in run.log.means().values())


# The refinement and its use on any models


def context(round: int = 0, real: Samples | None = None) -> RoundContext:
    info = FederationInfo((7, 5, 8), 4, SHAPE)
    return RoundContext(
        round, info, 0.9**round, lambda purpose: torch_stream(1, purpose, round), torch.device("cpu"), real=real
    )


def stacked(norm: bool = True) -> tuple[Stateless, Weights, StackedTeachers]:
    model = Stateless(network(0, norm))
    return model, weights_of(model.module), StackedTeachers.of(
        model, [weights_of(network(number, norm)) for number in (1, 2, 3)], COUNTS
    )  # fmt: skip


def ftg(**keys: object) -> FedFTG:
    return FedFTG(FedFTGSettings(**{**SMALL, **keys}), seed=2)


def test_without_iterations_nothing_happens() -> None:
    model, student, teachers = stacked()
    refined = ftg(iterations=0).refine(model, student, teachers, {"generator": {}}, context())
    assert not changed(student.params, refined.weights.params)
    assert not changed(student.buffers, refined.weights.buffers)
    assert (refined.state, refined.metrics) == ({"generator": {}}, {})


def test_the_metrics_of_a_refinement() -> None:
    model, student, teachers = stacked()
    metrics = ftg().refine(model, student, teachers, {}, context()).metrics
    assert {"student_loss", "generator_md", "generator_cls", "generator_dis", "label_accuracy"} <= metrics.keys()
    assert 0 <= metrics["label_accuracy"] <= 1
    assert 0 < metrics["generator_dis"] <= 1


@dataclass(frozen=True)
class KeepsItsGenerator(FedFTG):
    """FedFTG that holds one live generator instead of passing its state on."""

    def _generator(self, state: State, context: RoundContext, dtype: torch.dtype) -> ConditionalGenerator:
        return LIVE[self.seed].to(dtype)


LIVE: dict[int, ConditionalGenerator] = {}


def test_the_generator_lives_on_in_the_state() -> None:
    model, student, teachers = stacked()
    LIVE[2] = initial_generator(2, 5, 64, 4, SHAPE, torch.device("cpu"))
    live = KeepsItsGenerator(FedFTGSettings(**SMALL), seed=2)
    passed, state = ftg(), {}
    for round_ in range(3):
        uninterrupted = live.refine(model, student, teachers, {}, context(round_))
        refined = passed.refine(model, student, teachers, copy.deepcopy(state), context(round_))
        assert not changed(uninterrupted.weights.params, refined.weights.params)
        assert not changed(uninterrupted.state["generator"], refined.state["generator"])
        assert round_ == 0 or changed(state["generator"], refined.state["generator"])
        state = refined.state
    fresh = passed.refine(model, student, teachers, {}, context(2))
    assert changed(fresh.state["generator"], state["generator"])


def test_a_returned_state_no_longer_follows_the_generator() -> None:
    model, student, teachers = stacked()
    first = ftg().refine(model, student, teachers, {}, context())
    kept = copy.deepcopy(first.state)
    ftg().refine(model, student, teachers, first.state, context(1))
    assert not changed(kept["generator"], first.state["generator"])


def test_the_batchnorm_term_needs_batchnorm() -> None:
    model, _, _ = stacked(norm=False)
    with pytest.raises(InputError, match="lambda_bn"):
        ftg(lambda_bn=0.1).check(model, context().info)


def test_real_inputs_come_with_their_own_labels_and_only_in_simulation() -> None:
    x = torch.arange(10.0).view(10, 1, 1, 1).expand(10, *SHAPE).contiguous()
    samples = Samples(x, torch.arange(10) % 4)
    images, labels = RealInputs(samples, stream("real")).batch(torch.full((50,), 3), torch.zeros(50, 5))
    assert torch.equal(images[:, 0, 0, 0].long() % 4, labels)
    assert len(set(labels.tolist())) == 4
    model, student, teachers = stacked()
    oracle = ftg(inputs="real")
    assert oracle.simulation_only
    assert not ftg().simulation_only
    with pytest.raises(InputError, match="oracle"):
        oracle.refine(model, student, teachers, {}, context())
    refined = oracle.refine(model, student, teachers, {}, context(real=samples))
    assert changed(student.params, refined.weights.params)
    assert refined.state == {}


def test_noise_inputs_ignore_the_labels() -> None:
    images, labels = NoiseInputs(SHAPE, stream("noise")).batch(torch.tensor([2, 1]), torch.zeros(2, 5))
    assert images.shape == (2, *SHAPE)
    assert labels.tolist() == [2, 1]
    draws = StreamDraws(torch.zeros(2, 3, dtype=torch.int64), stream("draws"), 5)
    assert not torch.equal(draws.noise(0, 0), draws.noise(0, 1))


def mixed() -> tuple[nn.Module, list[nn.Module]]:
    """Return a student and three teachers, no two of one architecture."""
    with initial_weights(stream("mixed")):
        student = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4))
        return student, [
            nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
            nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4)),
            TinyCNN(1, 3, 48, 6, 4, norm=True),
        ]


@pytest.mark.parametrize("keys", [{}, {"mode": "code"}, {"teacher": "class", "mode": "tuned"}, {"inputs": "noise"}])
def test_models_of_different_architectures_teach(keys: dict[str, object]) -> None:
    student, teachers = mixed()
    before = [copy.deepcopy(module.state_dict()) for module in (student, *teachers)]
    returned, state, metrics = ftg(**keys).distil(student, teachers, COUNTS, SHAPE)
    assert returned is student
    assert changed(before[0], student.state_dict()) == set(before[0])
    for kept, teacher in zip(before[1:], teachers):
        assert not changed(kept, teacher.state_dict())
        assert not teacher.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(math.isfinite(value) for value in metrics.values())
    assert state.keys() == (set() if keys.get("inputs") == "noise" else {"generator"})


def test_distilling_twice_gives_the_same_and_rounds_differ() -> None:
    results = []
    for round_ in (0, 0, 1):
        student, teachers = mixed()
        ftg().distil(student, teachers, COUNTS.tolist(), SHAPE, round=round_)
        results.append(student.state_dict())
    assert not changed(results[0], results[1])
    assert changed(results[0], results[2])


def test_the_student_may_be_one_of_the_teachers() -> None:
    results = []
    for alone in (True, False):
        _, (_, _, model) = mixed()
        student = copy.deepcopy(model) if alone else model
        ftg().distil(student, [model, mixed()[1][0]], COUNTS[:2], SHAPE)
        results.append(student.state_dict())
    assert not changed(*results)


@pytest.mark.parametrize("norm", [True, False])
def test_modules_and_a_stack_of_their_weights_teach_alike(norm: bool) -> None:
    model, start, teachers = stacked(norm)
    method = ftg()
    student = network(0, norm)
    counts = COUNTS
    method.distil(student, [network(number, norm) for number in (1, 2, 3)], counts, SHAPE)
    same = replace(context(), lr_factor=1.0, stream=lambda purpose: torch_stream(method.seed, purpose, 0))
    refined = method.refine(model, start, teachers, {}, same)
    for name, value in {**refined.weights.params, **refined.weights.buffers}.items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "counts",
    [
        COUNTS[:2],
        COUNTS[0],
        torch.zeros(3, 4, dtype=torch.int64),
        COUNTS[:, :3],
        torch.cat([COUNTS, COUNTS], dim=1),
        COUNTS - 1,
        [[1, 2, 3, 4]] * 4,
    ],
    ids=["too few rows", "one row", "zeros", "too few classes", "too many classes", "negative", "too many rows"],
)
def test_wrong_counts_are_refused(counts: Tensor | Sequence[Sequence[int]]) -> None:
    student, teachers = mixed()
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(InputError):
        ftg().distil(student, teachers, counts, SHAPE)
    assert not changed(before, student.state_dict())


def test_a_finer_generator_is_restored_without_rounding() -> None:
    """In double precision three rounds through the state equal three rounds of one live generator."""
    model, student, teachers = stacked()
    model.module.double()
    student = student.map(lambda value: value.double() if value.is_floating_point() else value)
    doubled = StackedTeachers(
        model,
        {name: value.double() for name, value in teachers.params.items()},
        {name: value.double() if value.is_floating_point() else value for name, value in teachers.buffers.items()},
        teachers.counts,
    )
    first = ftg().refine(model, student, doubled, {}, context())
    again = ftg(iterations=1, generator_steps=0).refine(model, student, doubled, first.state, context(1))
    assert first.state["generator"]["from_noise.weight"].dtype == torch.float64
    assert not changed(first.state["generator"], again.state["generator"])
