"""FedDF: the authors' distillation and its start, and the data-free form in FedFTG's code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from fedstill.conformance.replays.fedftg import RecordedDraws
from fedstill.conformance.replays.registry import Case, must, replays
from fedstill.conformance.replays.subjects import as_recorded, inside
from fedstill.conformance.replays.tiny import Architecture
from fedstill.conformance.subject import Subject
from fedstill.distill.inputs import GeneratedInputs
from fedstill.distill.loop import Distillation
from fedstill.distill.teachers import StackedTeachers
from fedstill.methods.averaging import merge
from fedstill.methods.base import FederationInfo, Upload
from fedstill.methods.feddf import FedDF, FedDFSettings, StudentPhase, generator_phase
from fedstill.payload import model_payload
from fedstill.weights import Weights

AVERAGES = {"avg_logits": "logits", "avg_probs": "probabilities", "avg_losses": "losses"}


def settings_of(subject: Subject, mode: str, **hyper: object) -> FedDFSettings:
    """Return the settings of the built-in refinement in the form of a case."""
    inside(subject.refinement(), FedDF)
    return inside(as_recorded(subject, mode, **hyper).refinement(), FedDF).settings


@replays("feddf", "feddf_average")
def start(case: Case, subject: Subject) -> None:
    """The authors' start: the uniform mean, and the BatchNorm buffers of the last client.

    Ours averages the buffers too (the method card says so), so only the parameters are compared with the merge.
    """
    inside(subject.refinement(), FedDF)
    net = Architecture.of(case)
    models = [net.weights(row) for row in case.tensor("in/clients")]
    uploads = [Upload(client, model_payload(model), 1 + client, 1) for client, model in enumerate(models)]
    merged = merge(uploads, "uniform", "mean", models[0], FederationInfo((1, 2, 3), 5, (3, 8, 8)))
    case.agrees("out/average", net.flat(Weights(merged.params, models[-1].buffers)))
    for name, value in merged.buffers.items():
        must(not torch.equal(value, models[-1].buffers[name]), f"{name} is the last client's")


@dataclass(frozen=True)
class RecordedInputs:
    """The batches of a case, in their order."""

    batches: list[Tensor]

    def batch(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next batch."""
        return self.batches.pop(0), labels


@dataclass
class Watched(StudentPhase):
    """A student phase that keeps the state after each step, and each learning rate."""

    net: Architecture = field(kw_only=True)
    students: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def step(self) -> None:
        """Take a step and keep what came of it."""
        self.rates.append(self.lr())
        super().step()
        self.students.append(self.net.flat(self.student))


@replays(
    "feddf",
    "feddf_distill",
    "feddf_distill_avg_losses",
    "feddf_distill_avg_probs",
    "feddf_distill_bn",
    "feddf_distill_weighted",
)
def distillation(case: Case, subject: Subject) -> None:
    """FedDF's code: every student step, in the forms of its averages."""
    hyper = case.hyper
    even = hyper["teacher_weights"] == "uniform"
    keys = settings_of(
        subject,
        "paper",
        average=AVERAGES[hyper["scheme"]],
        client_weights="uniform" if even else "samples",
        steps=hyper["steps"],
        lr_student=hyper["lr"],
        clip_norm=float(hyper["clip_norm"]),
        patience=0,
    )
    counts = torch.ones(hyper["teachers"], hyper["classes"], dtype=torch.int64)
    if not even:
        # n_k in the proportion of the recorded weights, which have four digits.
        counts = torch.zeros_like(counts)
        counts[:, 0] = (case.tensor("in/weights") * 10_000).round().long()
    for batched in (False, True):
        compare_steps(case, keys, counts, batched)


def compare_steps(case: Case, keys: FedDFSettings, counts: Tensor, batched: bool) -> None:
    """Distil on the recorded batches and compare every step."""
    net = Architecture.of(case)
    models = [net.weights(row) for row in case.tensor("in/teachers")]
    nothing = torch.zeros(keys.steps, case.hyper["batch"])
    run = Watched(
        keys,
        net.stateless,
        net.weights(case.tensor("in/student")),
        replace(StackedTeachers.of(net.stateless, models, counts), batched=batched),
        RecordedInputs(list(case.tensor("in/x"))),
        RecordedDraws(nothing.long(), nothing),
        net=net,
    )
    result = run.run()
    case.agrees("out/lr", torch.tensor(run.rates, dtype=torch.float64))
    case.agrees("out/loss", torch.stack(run.log.trace["student_loss"]))
    case.agrees("out/grad_norm", torch.stack(run.log.trace["grad_norm"]))
    case.agrees("out/w_after_step", torch.stack(run.students))
    case.agrees("out/w_after_step", net.flat(result), -1)


@replays("feddf", "feddf_ftg_server")
def data_free(case: Case, subject: Subject) -> None:
    """FedFTG's code for FedDF without data: the generator's steps, then the student's."""
    hyper, net, maker = case.hyper, Architecture.of(case), Architecture.of(case, "generator")
    keys = settings_of(
        subject,
        "fedftg",
        batch_size=hyper["batch"],
        generator_steps=hyper["iterations_g"],
        steps=hyper["iterations_d"],
        weight_decay_student=hyper["weight_decay_student"],
        weight_decay_generator=hyper["weight_decay_generator"],
    )
    factor = hyper["lr_student"] / keys.lr_student
    case.recorded_with(lr_generator=keys.lr_generator * factor)
    models = [net.weights(row) for row in case.tensor("in/teachers")]
    teachers = StackedTeachers.of(net.stateless, models, case.tensor("in/class_counts"))
    student = net.weights(case.tensor("in/student"))
    compare_generator(case, keys, maker, partial(generator_phase, model=net.stateless, student=student,
                                                 teachers=teachers, lr_factor=factor))  # fmt: skip
    run = Watched(
        keys,
        net.stateless,
        student,
        teachers,
        GeneratedInputs(maker.conditional, train_mode=False),
        RecordedDraws(case.tensor("in/labels_d"), case.tensor("in/z_d")),
        factor,
        net=net,
    )
    run.run()
    case.agrees("out/student_loss", torch.stack(run.log.trace["student_loss"]))
    for steps in (1, 2, 20):
        case.agrees(f"out/student_after_{steps}", run.students[steps - 1])


def compare_generator(case: Case, keys: FedDFSettings, maker: Architecture, phase: Callable[..., Distillation]) -> None:
    """Compare the generator after some of its steps, and its losses; it ends as it is after all of them."""
    draws = RecordedDraws(case.tensor("in/labels_g"), case.tensor("in/z_g"))
    for steps in (1, 2, keys.generator_steps):
        maker.module.load_state_dict(maker.state(case.tensor("in/generator")))
        shorter = keys.model_copy(update={"generator_steps": steps})
        run = phase(settings=shorter, generator=maker.conditional, draws=draws)
        case.agrees(f"out/generator_after_{steps}", maker.flat_module())
    case.agrees("out/l_dis", torch.stack(run.log.trace["generator_dis"]))
    recorded = case.tensor("out/l_cls_over_k").sum(1)
    case.equals("out/l_cls_over_k", torch.stack(run.log.trace["generator_cls"]), recorded)
