"""FedFTG's released server step: labels, loss terms, and the whole refinement with its intermediate states."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from registry import Case, checks
from tiny import Architecture
from torch import Tensor, nn

from fedstill.distill import losses
from fedstill.distill.labels import draw_labels, stratified_counts
from fedstill.distill.loop import Distillation, generated
from fedstill.distill.teachers import StackedTeachers
from fedstill.distill.weighting import class_shares, mixture, sample_weights
from fedstill.methods.fedftg import FedFTGSettings

CODE = FedFTGSettings(mode="code")


@checks("fedftg_labels")
def labels(case: Case) -> None:
    for vector in range(case.hyper["n_vectors"]):
        counts, number = case.tensor(f"in/counts_{vector}"), int(case.array(f"in/number_{vector}"))
        case.agrees(f"out/label_counts_{vector}", stratified_counts(counts, number))
        # The order of out/labels is numpy's legacy shuffle; fedstill shuffles with a stream of its own.
        drawn = draw_labels(CODE.labels, counts[None], number, 1, torch.Generator().manual_seed(vector))
        case.agrees(f"out/label_counts_{vector}", torch.bincount(drawn.flatten(), minlength=len(counts)))
    case.agrees("out/alpha", class_shares(case.tensor("in/class_counts"), CODE.share_epsilon))


@checks("fedftg_loss_terms")
def loss_terms(case: Case) -> None:
    x, z, y = case.tensor("in/x").requires_grad_(), case.tensor("in/z"), case.tensor("in/labels")
    student = case.tensor("in/student_logits").requires_grad_()
    teachers = case.tensor("in/teacher_logits").requires_grad_()
    shares = class_shares(case.tensor("in/class_counts"), CODE.share_epsilon)
    weights = sample_weights(shares, y, CODE.teacher)
    case.agrees("out/alpha", shares)
    case.agrees("out/batch_weight", weights.T)

    target = mixture(teachers, shares, y, CODE.teacher).detach()
    md = losses.discrepancy(student, teachers, weights, target, CODE.md_gen)
    cls = losses.classification(teachers, y, weights, CODE.cls_weights == "per-sample")
    dis = losses.diversity(x, z)
    case.agrees("out/l_md", -md)
    case.agrees("out/l_cls", cls)
    case.agrees("out/l_dis", dis.expand(len(teachers)))
    case.agrees("out/diversity_l1", dis)
    case.agrees("out/diversity_same_x", losses.diversity(x[:1].expand_as(x), z))
    # diversity_l2 and diversity_cosine are distances that the released code has but does not use; not built here.
    hyper = case.hyper
    total = -md + hyper["lambda_cls"] * cls + hyper["lambda_dis"] * dis / hyper["num_clients_divisor"]
    case.agrees("out/g_total", total)
    for one in range(len(teachers)):
        by_x, by_s, by_t = torch.autograd.grad(total[one], [x, student, teachers], retain_graph=True)
        case.agrees("out/grad_x", by_x, one)
        case.agrees("out/grad_s", by_s, one)
        case.agrees("out/grad_t", by_t[one], one)
        assert not by_t[[other for other in range(len(teachers)) if other != one]].any()

    loss = losses.student_loss(student, teachers.detach(), weights, target, CODE.md_student, CODE.reduction)
    case.agrees("out/student_loss", loss)
    case.agrees("out/grad_student_loss", torch.autograd.grad(loss, student)[0])


@dataclass(frozen=True)
class RecordedDraws:
    """The labels and the noise of a case."""

    all_labels: Tensor
    all_noise: Tensor

    def labels(self, iteration: int) -> Tensor:
        return self.all_labels[iteration]

    def noise(self, iteration: int, step: int) -> Tensor:
        assert step == 0, "the released code draws once per iteration"
        return self.all_noise[iteration]


@dataclass
class Watched(Distillation):
    """A refinement that keeps what the cases recorded on the way."""

    net: Architecture = field(kw_only=True)
    maker: Architecture = field(kw_only=True)
    made: dict[bool, list[Tensor]] = field(default_factory=lambda: {True: [], False: []})
    generators: list[Tensor] = field(default_factory=list)
    students: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.adam is not None
        assert self.generator is not None

        def made(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.made[module.training].append(output.detach().clone())

        def stepped(*_: object) -> None:
            self.generators.append(self.maker.flat_module())

        self.generator.register_forward_hook(made)
        self.adam.register_step_post_hook(stepped)

    def student_step(self, *given: Tensor) -> None:
        super().student_step(*given)
        self.students.append(self.net.flat(self.student))


def prepared(case: Case, batched: bool) -> Watched:
    """Return the refinement of a case, not yet run."""
    hyper = case.hyper
    # The recorded learning rates are those of round 1: the settings' defaults times the decay.
    factor = hyper["lr_student"] / CODE.lr_student
    assert hyper["lr_generator"] == pytest.approx(CODE.lr_generator * factor)
    assert hyper["weight_decay_generator"] == hyper["sgd_momentum"] == 0
    assert hyper["adam"] == {"betas": [0.9, 0.999], "eps": 1e-8}
    settings = FedFTGSettings(
        mode="code",
        iterations=hyper["outer_iterations"],
        generator_steps=hyper["I_g"],
        student_steps=hyper["I_d"],
        batch_size=hyper["batch"],
        noise_dim=hyper["nz"],
        weight_decay_student=hyper["weight_decay_student"],
        lambda_cls=hyper["lambda_cls"],
        lambda_dis=hyper["lambda_dis"],
    )
    net, maker = Architecture.of(case), Architecture.of(case, "generator")
    maker.module.load_state_dict(maker.state(case.tensor("in/generator")))
    counts = case.tensor("in/class_counts")
    models = [net.weights(row) for row in case.tensor("in/teachers")]
    teachers = replace(StackedTeachers.of(net.stateless, models, counts), batched=batched)
    return Watched(
        settings,
        net.stateless,
        net.weights(case.tensor("in/student")),
        teachers,
        generated(maker.module, settings),
        RecordedDraws(case.tensor("in/labels"), case.tensor("in/z")),
        maker.module,
        factor,
        net=net,
        maker=maker,
    )


@checks("fedftg_server_nobn", "fedftg_server_bn")
def server_step(case: Case) -> None:
    for batched in (False, True):
        compare_refinement(case, prepared(case, batched))


def compare_refinement(case: Case, run: Watched) -> None:
    case.agrees("out/alpha", run.shares)
    weights = [sample_weights(run.shares, y, CODE.teacher).T for y in case.tensor("in/labels")]
    case.agrees("out/batch_weight", torch.stack(weights))
    given = run.student
    kept = run.net.flat(given)
    refined = run.run()
    assert torch.equal(case.tensor("in/student"), kept)

    iterations, clients, steps = case.hyper["outer_iterations"], case.hyper["clients"], case.hyper["I_d"]
    assert len(run.generators) == iterations * clients
    assert len(run.students) == iterations * steps
    case.agrees("out/fake_first_g", run.made[True][0])
    case.agrees("out/generator_after_first_adam", run.generators[0])
    case.agrees("out/fake_first_d", run.made[False][0])
    case.agrees("out/student_after_first_sgd", run.students[0])
    for iteration in (1, 2, 10):
        case.agrees(f"out/generator_after_iter{iteration}", run.generators[iteration * clients - 1])
        case.agrees(f"out/student_after_iter{iteration}", run.students[iteration * steps - 1])
    case.agrees("out/generator_after_iter10", run.maker.flat_module())
    case.agrees("out/student_after_iter10", run.net.flat(refined))

    traced = {name: torch.stack(values) for name, values in run.log.trace.items()}
    md, cls, dis = (traced[f"generator_{name}"].view(iterations, clients) for name in ("md", "cls", "dis"))
    case.agrees("out/l_md", -md)
    case.agrees("out/l_cls", cls)
    case.agrees("out/l_dis", dis)
    case.agrees("out/g_total", -md + case.hyper["lambda_cls"] * cls + case.hyper["lambda_dis"] * dis / clients)
    case.agrees("out/student_loss", traced["student_loss"].view(iterations, steps))
