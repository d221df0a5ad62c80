"""FedDF: the authors' distillation and its start, and the data-free form in FedFTG's code."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from registry import Case, checks
from tiny import Architecture
from torch import Tensor

from fedstill.distill.inputs import GeneratedInputs
from fedstill.distill.teachers import StackedTeachers
from fedstill.methods.averaging import merge
from fedstill.methods.base import FederationInfo, Upload
from fedstill.methods.feddf import FedDFSettings, StudentPhase, generator_phase
from fedstill.payload import model_payload
from fedstill.weights import Weights

AVERAGES = {"avg_logits": "logits", "avg_probs": "probabilities", "avg_losses": "losses"}


@checks("feddf_average")
def start(case: Case) -> None:
    """The authors' start: the uniform mean, and the BatchNorm buffers of the last client.

    Ours averages the buffers too (the method card says so), so only the parameters are compared with the merge.
    """
    net = Architecture.of(case)
    models = [net.weights(row) for row in case.tensor("in/clients")]
    uploads = [Upload(client, model_payload(model), 1 + client, 1) for client, model in enumerate(models)]
    merged = merge(uploads, "uniform", "mean", models[0], FederationInfo((1, 2, 3), 5, (3, 8, 8)))
    case.agrees("out/average", net.flat(Weights(merged.params, models[-1].buffers)))
    for name, value in merged.buffers.items():
        assert not torch.equal(value, models[-1].buffers[name])


@dataclass(frozen=True)
class RecordedInputs:
    """The batches of a case, in their order."""

    batches: list[Tensor]

    def batch(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.batches.pop(0), labels


@dataclass(frozen=True)
class RecordedDraws:
    """The labels and the noise of a case; none where its batches are recorded."""

    all_labels: Tensor
    all_noise: Tensor

    def labels(self, iteration: int) -> Tensor:
        return self.all_labels[iteration]

    def noise(self, iteration: int, step: int) -> Tensor:
        assert step == 0
        return self.all_noise[iteration]


@dataclass
class Watched(StudentPhase):
    """A student phase that keeps the state after each step, and each learning rate."""

    net: Architecture = field(kw_only=True)
    students: list[Tensor] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def step(self) -> None:
        self.rates.append(self.lr())
        super().step()
        self.students.append(self.net.flat(self.student))


@checks(
    "feddf_distill",
    "feddf_distill_avg_losses",
    "feddf_distill_avg_probs",
    "feddf_distill_bn",
    "feddf_distill_weighted",
)
def distillation(case: Case) -> None:
    for batched in (False, True):
        compare_steps(case, batched)


def compare_steps(case: Case, batched: bool) -> None:
    hyper, net = case.hyper, Architecture.of(case)
    settings = FedDFSettings(average=AVERAGES[hyper["scheme"]], steps=hyper["steps"], patience=0)
    assert (settings.lr_student, settings.clip_norm) == (hyper["lr"], hyper["clip_norm"])
    models = [net.weights(row) for row in case.tensor("in/teachers")]
    counts = torch.ones(hyper["teachers"], hyper["classes"], dtype=torch.int64)
    if hyper["teacher_weights"] != "uniform":
        # n_k in the proportion of the recorded weights, which have four digits.
        settings = settings.model_copy(update={"client_weights": "samples"})
        counts = torch.zeros_like(counts)
        counts[:, 0] = (case.tensor("in/weights") * 10_000).round().long()
    nothing = torch.zeros(hyper["steps"], hyper["batch"])
    run = Watched(
        settings,
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


@checks("feddf_ftg_server")
def data_free(case: Case) -> None:
    hyper, net, maker = case.hyper, Architecture.of(case), Architecture.of(case, "generator")
    settings = FedDFSettings(mode="fedftg", batch_size=hyper["batch"])
    assert (settings.generator_steps, settings.steps) == (hyper["iterations_g"], hyper["iterations_d"])
    assert settings.weight_decay_student == hyper["weight_decay_student"]
    assert settings.weight_decay_generator == hyper["weight_decay_generator"]
    factor = hyper["lr_student"] / settings.lr_student
    assert hyper["lr_generator"] == pytest.approx(settings.lr_generator * factor)
    models = [net.weights(row) for row in case.tensor("in/teachers")]
    teachers = StackedTeachers.of(net.stateless, models, case.tensor("in/class_counts"))
    student = net.weights(case.tensor("in/student"))

    draws = RecordedDraws(case.tensor("in/labels_g"), case.tensor("in/z_g"))
    for steps in (1, 2, 50):  # the longest last: the student learns from that generator
        maker.module.load_state_dict(maker.state(case.tensor("in/generator")))
        shorter = settings.model_copy(update={"generator_steps": steps})
        phase = generator_phase(shorter, net.stateless, student, teachers, maker.module, draws, factor)
        case.agrees(f"out/generator_after_{steps}", maker.flat_module())
    case.agrees("out/l_dis", torch.stack(phase.log.trace["generator_dis"]))
    rtol, atol = case.tolerance("out/l_cls_over_k")
    classification = torch.stack(phase.log.trace["generator_cls"])
    torch.testing.assert_close(classification, case.tensor("out/l_cls_over_k").sum(1), rtol=rtol, atol=atol)

    run = Watched(
        settings,
        net.stateless,
        student,
        teachers,
        GeneratedInputs(maker.module, train_mode=False),
        RecordedDraws(case.tensor("in/labels_d"), case.tensor("in/z_d")),
        factor,
        net=net,
    )
    run.run()
    case.agrees("out/student_loss", torch.stack(run.log.trace["student_loss"]))
    for steps in (1, 2, 20):
        case.agrees(f"out/student_after_{steps}", run.students[steps - 1])
