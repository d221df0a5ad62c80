"""The server step of distillation: inputs x teacher x student loop.

FedFTG and its exchanges are settings of the one loop in this file. An iteration has two phases. In the
generator phase (only where a generator makes the inputs) the generator learns against the frozen student and
teachers; in the student phase the student learns from the teachers' mixture on what the inputs give. The
teachers' outputs are computed once per batch, never per student step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from fedstill.distill import losses
from fedstill.distill.graphs import Piece, Recorder
from fedstill.distill.inputs import AnyGenerator, Draws, GeneratedInputs, Inputs
from fedstill.distill.labels import LabelSampling
from fedstill.distill.log import Log
from fedstill.distill.teachers import Teachers
from fedstill.distill.weighting import TeacherWeights, class_shares, mixture, sample_weights
from fedstill.models.layout import channels_innermost, channels_outermost, layout_of
from fedstill.models.randomness import draws_random_numbers
from fedstill.models.stateless import Stateless
from fedstill.settings import ModedSettings
from fedstill.training import SGD, gradients
from fedstill.weights import Weights


class DistillationSettings(ModedSettings):
    """The keys of one server step."""

    inputs: Literal["generator", "noise", "real"] = "generator"
    """Where inputs come from: a generator that learns, standard normal noise, or the cohort's own data (an oracle,
    in simulation only)."""
    teacher: TeacherWeights = "label"
    """How teachers are weighted: by their share of the sample's label (paper), class by class, or uniformly, their
    probabilities or their logits."""
    labels: LabelSampling = "sampled"
    """How labels are drawn: y ~ p_t (paper), the released code's stratified counts, or uniformly over classes."""
    iterations: int = Field(10, ge=0)
    """Outer iterations per round, I."""
    generator_steps: int = Field(1, ge=0)
    """Generator steps per iteration, I_g."""
    student_steps: int = Field(5, ge=1)
    """Student steps per iteration, I_d."""
    batch_size: int = Field(50, ge=2)
    """Generated samples per iteration, B."""
    noise_dim: int = Field(100, ge=1)
    """Dimensions of z: 100 for CIFAR-10, 256 for CIFAR-100 in the paper."""
    generator_width: int = Field(64, ge=1)
    """Channels before the generator's last layer; 64 in the paper, twice as many inside. Of a feature generator, a
    quarter of its hidden units."""
    noise_per: Literal["iteration", "step"] = "iteration"
    """One z per iteration, or a fresh one for every student step."""
    lr_generator: float = Field(0.01, gt=0)
    """Generator's Adam learning rate in round 0, decayed with the clients'."""
    lr_student: float = Field(0.1, gt=0)
    """Student's SGD learning rate in round 0, decayed with the clients'."""
    weight_decay_student: float = Field(1e-3, ge=0)
    """Weight decay of the student's SGD."""
    weight_decay_generator: float = Field(0.0, ge=0)
    """Weight decay of the generator's Adam, added to the gradient (not in the paper)."""
    lambda_md: float = Field(1.0, ge=0)
    """Weight of hard-sample mining in the generator's loss (the paper has 1; 0 switches it off)."""
    lambda_cls: float = Field(1.0, ge=0)
    """Weight of the generator's classification loss, lambda_cls."""
    lambda_dis: float = Field(1.0, ge=0)
    """Weight of the generator's diversity loss, lambda_dis."""
    lambda_bn: float = Field(0.0, ge=0)
    """Weight of the distance to the teachers' BatchNorm statistics (not in the paper; models with BatchNorm only)."""
    md_gen: losses.Discrepancy = "kl-student-teacher"
    """Discrepancy that the generator raises: reverse KL (paper), forward KL, L1 of logits (released code), mse."""
    md_student: losses.StudentLoss = "kl-student-teacher"
    """Loss that the student lowers: reverse KL (paper), forward KL against the mixture (released code), mse."""
    reduction: losses.Reduction = "batch-classes"
    """Student's loss: mean over the batch, or also over the classes (1/M)."""
    generator_update: Literal["summed", "per-teacher"] = "summed"
    """One generator step on the sum over teachers (paper), or one step per teacher (released code)."""
    cls_weights: Literal["per-sample", "batch-mean"] = "per-sample"
    """Class weights inside L_cls, or the released code's product of two means."""
    share_epsilon: float = Field(0.0, ge=0)
    """Added to the denominator of the class shares; 1e-6 in the released code."""
    generator_norm: Literal["eval", "train"] = "eval"
    """Generator's BatchNorm in the student phase: running statistics (released code), or the batch's."""
    student_norm: Literal["train", "eval"] = "train"
    """Student's mode while it learns; matters for BatchNorm models alone."""
    freeze_unused_biases: bool = True
    """Keep the generator's biases whose true gradient is zero from following rounding noise (reproducibility)."""


class Pieces(NamedTuple):
    """The parts of an iteration, each as it is or recorded."""

    generator_step: Piece
    batch: Piece
    answers: Piece
    student_step: Piece


@dataclass
class Distillation:
    """One refinement under way: student, teachers, inputs and optimisers.

    With ``cuda_graphs`` :meth:`run` records what draws no random numbers, and replays it. With ``channels_last`` images
    and kernels hold their channels innermost until the student is returned.
    """

    settings: DistillationSettings
    model: Stateless
    student: Weights
    teachers: Teachers
    inputs: Inputs
    draws: Draws
    generator: AnyGenerator | None
    lr_factor: float = 1.0
    cuda_graphs: bool = False
    channels_last: bool = False
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        keys = self.settings
        self.student = self.student.map(layout_of(self.channels_last))
        like = next(iter(self.student.params.values()))
        self.shares = class_shares(self.teachers.counts, keys.share_epsilon).to(like.device)
        self.sgd = SGD(lr=keys.lr_student * self.lr_factor, weight_decay=keys.weight_decay_student)
        self.adam: torch.optim.Adam | None = None
        if self.generator is not None:
            if self.channels_last:
                self.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            idle = set(self.generator.biases_before_norm()) if keys.freeze_unused_biases else set()
            learnt = [value for name, value in self.generator.named_parameters() if name not in idle]
            rate, decay = keys.lr_generator * self.lr_factor, keys.weight_decay_generator
            self.adam = torch.optim.Adam(learnt, lr=rate, weight_decay=decay, capturable=self.cuda_graphs)

    def run(self) -> Weights:
        """Run all iterations and return the student."""
        recorder = Recorder(self.cuda_graphs, self.log)
        with recorder.running():
            pieces = self.pieces(recorder)
            for iteration in range(self.settings.iterations):
                labels = self.draws.labels(iteration)
                noise = self.draws.noise(iteration, 0)
                if self.generator is not None:
                    for _ in range(self.settings.generator_steps):
                        pieces.generator_step(noise, labels)
                self.student_phase(iteration, noise, labels, pieces)
        return self.student.map(channels_outermost) if self.channels_last else self.student

    def pieces(self, recorder: Recorder) -> Pieces:
        """Return the parts of an iteration, recorded where they draw no random numbers.

        Not kept here: they refer to this object, and what they record holds a GPU's memory until they are gone.
        """
        generated = isinstance(self.inputs, GeneratedInputs)
        draws = self.settings.student_norm == "train" and draws_random_numbers(self.model.module)
        return Pieces(
            recorder.of(self.generator_step),
            recorder.of(self.inputs.batch) if generated else self.inputs.batch,
            recorder.of(self.answers),
            self.student_step if draws else recorder.of(self.student_step),
        )

    def generator_step(self, noise: Tensor, labels: Tensor) -> tuple[()]:
        """Let the generator take one step, or one for each teacher in turn."""
        assert self.generator is not None
        self.generator.train()
        turns = range(len(self.teachers)) if self.settings.generator_update == "per-teacher" else [None]
        for teacher in turns:
            x = self.laid_out(self.generator(noise, labels))
            self._adam_step(self.generator_loss(x, noise, labels, teacher))
        return ()

    def generator_loss(self, x: Tensor, noise: Tensor, labels: Tensor, teacher: int | None) -> Tensor:
        """Return ``- lambda_md L_md + lambda_cls L_cls + lambda_dis L_dis + lambda_bn L_bn``.

        For one ``teacher`` only that teacher's part, with the diversity term divided by their number.
        """
        keys = self.settings
        gap = x.new_zeros(())
        if teacher is not None:
            logits, rows = self.teachers.logits_of(teacher, x)[None], slice(teacher, teacher + 1)
        elif keys.lambda_bn:
            (logits, gaps), rows = self.teachers.statistics_gap(x), slice(None)
            gap = gaps.mean()
        else:
            logits, rows = self.teachers.logits(x), slice(None)
        weights = sample_weights(self.shares, labels, keys.teacher).to(logits)[rows]
        cls = losses.classification(logits, labels, weights, keys.cls_weights == "per-sample").sum()
        dis = losses.diversity(x, noise)
        md = x.new_zeros(())
        if keys.lambda_md:
            student = self.model(self.student.params, self.student.buffers, x, train=False)
            target = mixture(logits, self.shares[rows], labels, keys.teacher)
            md = losses.discrepancy(student, logits, weights, target, keys.md_gen).sum()
        self.log.add(generator_md=md, generator_cls=cls, generator_dis=dis, generator_bn=gap)
        spread = dis / len(self.teachers) if teacher is not None else dis
        return -keys.lambda_md * md + keys.lambda_cls * cls + keys.lambda_dis * spread + keys.lambda_bn * gap

    def _adam_step(self, loss: Tensor) -> None:
        assert self.adam is not None
        self.adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.adam.step()

    def student_phase(self, iteration: int, noise: Tensor, labels: Tensor, pieces: Pieces) -> None:
        """Let the student take its steps; one batch for all of them, or a new one each."""
        keys = self.settings
        for step in range(keys.student_steps):
            if step == 0 or keys.noise_per == "step":
                fresh = noise if step == 0 else self.draws.noise(iteration, step)
                x, y = pieces.batch(labels, fresh)
                x = self.laid_out(x)
                answers = pieces.answers(x, y)
            pieces.student_step(x, *answers)

    def laid_out(self, x: Tensor) -> Tensor:
        """Return inputs as the models are to read them from memory."""
        return channels_innermost(x) if self.channels_last else x

    @torch.no_grad()
    def answers(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the teachers' logits on a batch, their weights in each sample, and their mixture."""
        keys = self.settings
        logits = self.teachers.logits(x)
        weights = sample_weights(self.shares, y, keys.teacher).to(logits)
        target = mixture(logits, self.shares, y, keys.teacher)
        seen = (target.argmax(-1) == y) & (target.sum(-1) > 0)  # a label nobody holds has no target
        self.log.add(label_accuracy=seen.double().mean())
        return logits, weights, target

    def student_step(self, x: Tensor, logits: Tensor, weights: Tensor, target: Tensor) -> tuple[()]:
        """Take one SGD step on the distillation loss."""
        keys = self.settings
        with learning(self.student) as params:
            output = self.model(params, self.student.buffers, x, train=keys.student_norm == "train")
            loss = losses.student_loss(output, logits, weights, target, keys.md_student, keys.reduction)
            grads = gradients(loss, list(params.values()))
        self.sgd.update(list(self.student.params.values()), grads, [])
        self.log.add(student_loss=loss)
        return ()


@contextmanager
def learning(student: Weights) -> Iterator[dict[str, Tensor]]:
    """Let gradients flow to the student's parameters, and to nobody's else, for the time of one step."""
    for value in student.params.values():
        value.requires_grad_()
    try:
        yield student.params
    finally:
        for value in student.params.values():
            value.requires_grad_(False)


def generated(generator: AnyGenerator, settings: DistillationSettings) -> GeneratedInputs:
    """Return the generator's samples as a distillation's inputs."""
    return GeneratedInputs(generator, train_mode=settings.generator_norm == "train")


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state as tensors that no longer follow it."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
