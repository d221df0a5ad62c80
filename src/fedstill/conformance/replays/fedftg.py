"""FedFTG's released server step: labels, loss terms, and the whole refinement with its intermediate states."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedstill.conformance.replays.registry import Case, must, replays
from fedstill.conformance.replays.subjects import as_recorded, inside
from fedstill.conformance.replays.tiny import Architecture
from fedstill.conformance.subject import Subject
from fedstill.distill import losses
from fedstill.distill.labels import draw_labels, stratified_counts
from fedstill.distill.loop import Distillation, generated
from fedstill.distill.teachers import StackedTeachers
from fedstill.distill.weighting import class_shares, mixture, sample_weights
from fedstill.methods.fedftg import FedFTG, FedFTGSettings
from fedstill.weights import Weights


def settings_of(subject: Subject, **hyper: object) -> FedFTGSettings:
    """Return the settings of the built-in refinement in the form of the authors' code."""
    inside(subject.refinement(), FedFTG)
    return inside(as_recorded(subject, "code", **hyper).refinement(), FedFTG).settings


@replays("fedftg", "fedftg_labels")
def labels(case: Case, subject: Subject) -> None:
    """FedFTG's code: how many of each class are generated, and the teachers' shares."""
    keys = settings_of(subject)
    for vector in range(case.hyper["n_vectors"]):
        counts, number = case.tensor(f"in/counts_{vector}"), int(case.array(f"in/number_{vector}"))
        case.agrees(f"out/label_counts_{vector}", stratified_counts(counts, number))
        # The order of out/labels is numpy's legacy shuffle; fedstill shuffles with a stream of its own.
        drawn = draw_labels(keys.labels, counts[None], number, 1, torch.Generator().manual_seed(vector))
        case.agrees(f"out/label_counts_{vector}", torch.bincount(drawn.flatten(), minlength=len(counts)))
    case.agrees("out/alpha", class_shares(case.tensor("in/class_counts"), keys.share_epsilon))


@replays("fedftg", "fedftg_loss_terms")
def loss_terms(case: Case, subject: Subject) -> None:
    """FedFTG's code: every loss with its gradients."""
    keys = settings_of(subject, **{name: case.hyper[name] for name in ("lambda_cls", "lambda_dis")})
    x, y = case.tensor("in/x").requires_grad_(), case.tensor("in/labels")
    student = case.tensor("in/student_logits").requires_grad_()
    teachers = case.tensor("in/teacher_logits").requires_grad_()
    shares = class_shares(case.tensor("in/class_counts"), keys.share_epsilon)
    weights = sample_weights(shares, y, keys.teacher)
    target = mixture(teachers, shares, y, keys.teacher).detach()
    case.agrees("out/alpha", shares)
    case.agrees("out/batch_weight", weights.T)

    md = losses.discrepancy(student, teachers, weights, target, keys.md_gen)
    cls = losses.classification(teachers, y, weights, keys.cls_weights == "per-sample")
    dis = compare_diversity(case, x)
    case.agrees("out/l_md", -md)
    case.agrees("out/l_cls", cls)
    case.agrees("out/l_dis", dis.expand(len(teachers)))
    total = keys.lambda_cls * cls - keys.lambda_md * md + keys.lambda_dis * dis / case.hyper["num_clients_divisor"]
    case.agrees("out/g_total", total)
    for one in range(len(teachers)):
        by_x, by_s, by_t = torch.autograd.grad(total[one], [x, student, teachers], retain_graph=True)
        case.agrees("out/grad_x", by_x, one)
        case.agrees("out/grad_s", by_s, one)
        case.agrees("out/grad_t", by_t[one], one)
        others = by_t[[other for other in range(len(teachers)) if other != one]]
        must(not others.any(), f"teacher {one}'s loss reaches another one")

    loss = losses.student_loss(student, teachers.detach(), weights, target, keys.md_student, keys.reduction)
    case.agrees("out/student_loss", loss)
    case.agrees("out/grad_student_loss", torch.autograd.grad(loss, student)[0])


def compare_diversity(case: Case, x: Tensor) -> Tensor:
    """Compare the diversity loss and return it; the code's L2 and cosine forms, which it never uses, are not built."""
    z = case.tensor("in/z")
    found = losses.diversity(x, z)
    case.agrees("out/diversity_l1", found)
    case.agrees("out/diversity_same_x", losses.diversity(x[:1].expand_as(x), z))
    return found


@dataclass(frozen=True)
class RecordedDraws:
    """The labels and the noise of a case."""

    all_labels: Tensor
    all_noise: Tensor

    def labels(self, iteration: int) -> Tensor:
        """Return the labels of an iteration."""
        return self.all_labels[iteration]

    def noise(self, iteration: int, step: int) -> Tensor:
        """Return the noise of an iteration."""
        must(step == 0, "the released code draws once per iteration")
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

    def student_step(self, *given: Tensor) -> tuple[()]:
        """Take a step and keep what came of it."""
        super().student_step(*given)
        self.students.append(self.net.flat(self.student))
        return ()


def prepared(case: Case, keys: FedFTGSettings, batched: bool) -> Watched:
    """Return the refinement of a case, not yet run."""
    # The recorded learning rates are those of some round: the settings' own times the decay.
    factor = case.hyper["lr_student"] / keys.lr_student
    case.recorded_with(
        lr_generator=keys.lr_generator * factor,
        weight_decay_generator=0.0,
        sgd_momentum=0.0,
        adam={"betas": [0.9, 0.999], "eps": 1e-8},
    )
    net, maker = Architecture.of(case), Architecture.of(case, "generator")
    maker.module.load_state_dict(maker.state(case.tensor("in/generator")))
    generator = maker.conditional
    models = [net.weights(row) for row in case.tensor("in/teachers")]
    teachers = StackedTeachers.of(net.stateless, models, case.tensor("in/class_counts"))
    return Watched(
        keys,
        net.stateless,
        net.weights(case.tensor("in/student")),
        replace(teachers, batched=batched),
        generated(generator, keys),
        RecordedDraws(case.tensor("in/labels"), case.tensor("in/z")),
        generator,
        factor,
        net=net,
        maker=maker,
    )


@replays("fedftg", "fedftg_server_nobn", "fedftg_server_bn")
def server_step(case: Case, subject: Subject) -> None:
    """FedFTG's code: the server step of a round, from inside."""
    hyper = case.hyper
    keys = settings_of(
        subject,
        iterations=hyper["outer_iterations"],
        generator_steps=hyper["I_g"],
        student_steps=hyper["I_d"],
        batch_size=hyper["batch"],
        noise_dim=hyper["nz"],
        weight_decay_student=hyper["weight_decay_student"],
        lambda_cls=hyper["lambda_cls"],
        lambda_dis=hyper["lambda_dis"],
    )
    for batched in (False, True):
        run = prepared(case, keys, batched)
        case.agrees("out/alpha", run.shares)
        weights = [sample_weights(run.shares, y, keys.teacher).T for y in case.tensor("in/labels")]
        case.agrees("out/batch_weight", torch.stack(weights))
        compare_models(case, run, run.run())
        compare_losses(case, run)


def compare_models(case: Case, run: Watched, refined: Weights) -> None:
    """Compare the generator and the student on their way, and what the generator made first."""
    iterations, clients, steps = case.hyper["outer_iterations"], case.hyper["clients"], case.hyper["I_d"]
    must(len(run.generators) == iterations * clients, "another number of generator steps")
    must(len(run.students) == iterations * steps, "another number of student steps")
    case.agrees("out/fake_first_g", run.made[True][0])
    case.agrees("out/generator_after_first_adam", run.generators[0])
    case.agrees("out/fake_first_d", run.made[False][0])
    case.agrees("out/student_after_first_sgd", run.students[0])
    for iteration in (1, 2, 10):
        case.agrees(f"out/generator_after_iter{iteration}", run.generators[iteration * clients - 1])
        case.agrees(f"out/student_after_iter{iteration}", run.students[iteration * steps - 1])
    case.agrees("out/generator_after_iter10", run.maker.flat_module())
    case.agrees("out/student_after_iter10", run.net.flat(refined))


def compare_losses(case: Case, run: Watched) -> None:
    """Compare the losses of every step."""
    keys, iterations, clients = run.settings, case.hyper["outer_iterations"], case.hyper["clients"]
    traced = {name: torch.stack(values) for name, values in run.log.trace.items()}
    md, cls, dis = (traced[f"generator_{name}"].view(iterations, clients) for name in ("md", "cls", "dis"))
    case.agrees("out/l_md", -md)
    case.agrees("out/l_cls", cls)
    case.agrees("out/l_dis", dis)
    case.agrees("out/g_total", keys.lambda_cls * cls - keys.lambda_md * md + keys.lambda_dis * dis / clients)
    case.agrees("out/student_loss", traced["student_loss"].view(iterations, case.hyper["I_d"]))
