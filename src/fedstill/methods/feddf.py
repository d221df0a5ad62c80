"""FedDF: the clients' models, as an ensemble, teach the fused one on unlabelled samples.

Method card
-----------
Paper
    Lin, Kong, Stich, Jaggi, "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020.
Client, travels
    As the base method; nothing more (the label counts, once, where a generator draws labels from them).
Server, after any fusion
    For at most N = ``steps`` steps on batches x of an unlabelled set (``[public]``; its labels are not used):
    ``KL(softmax(mean_k t_k(x)) || softmax(s(x)))``, the mean over the batch, teachers in eval mode, the student in
    train mode; Adam 1e-3, annealed to 0 by a cosine over N steps, the gradient clipped at 5. Every ``validate_every``
    steps the student is measured on samples that the server holds out (``data.server_validation``). Distillation ends
    after ``patience`` steps without a gain; the best student is the result, the fused model not among the candidates.
State
    Nothing; with ``inputs = "generator"`` the generator, over all rounds.
Several architectures
    Each architecture's fused model is taught by all teachers.
Without validation samples
    ``patience = 0`` takes exactly ``steps`` steps, measures nothing and returns the last student.
Which mode
    ``paper``: the above. ``fedftg``: the data-free form in which FedFTG's authors compare with it (their released
    code): 50 steps of a conditional generator on ``L_dis + mean_k CE(t_k, y)`` (Adam 0.01 d^t), then 20 student steps
    on ``KL(mean_k softmax t_k || softmax s)`` (SGD 0.1 d^t, not clipped), fresh z and labels in every step, weight
    decay 1e-3 on both, no validation.
Deviations of the authors' code, each with its key
    ====================== ========================= ====================================================
    topic                  paper                     released code
    ====================== ========================= ====================================================
    teachers' average      ``average`` logits        losses, unless a flag asks for logits
    batch                  ``batch_size`` 128        64, the clients' own
    augmentation           ``augment``: the clients'  flips and crops of CIFAR: flip-crop
    ====================== ========================= ====================================================
    Not a key: the released student starts from the uniform mean of the cohort's parameters and from the BatchNorm
    buffers of the *last* client. Here it starts from what the fusion gave, buffers averaged too;
    ``fusion.client_weights = "uniform"`` gives the same parameters.
    Batches are drawn with replacement here, in shuffled epochs there.
drop-worst
    ``drop_below = 1.2`` leaves out teachers below 1.2 times chance on the validation samples, which the paper needs
    for VGG-9 without normalisation. It drops them from the ensemble; the fusion, which comes before, still has them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from fedstill.adam import Adam
from fedstill.data.augment import list_augmentations
from fedstill.data.dataset import Samples
from fedstill.distill import losses
from fedstill.distill.inputs import (
    AnyGenerator,
    AugmentedInputs,
    Draws,
    GeneratedInputs,
    Inputs,
    RealInputs,
    StreamDraws,
)
from fedstill.distill.labels import LabelSampling, draw_labels
from fedstill.distill.log import Log
from fedstill.distill.loop import Distillation, DistillationSettings, learning, module_state
from fedstill.distill.teachers import SomeTeachers, Teachers, teacher_accuracies
from fedstill.errors import InputError
from fedstill.evaluation import evaluate
from fedstill.methods.base import ClientWeights, FederationInfo, Refined, RoundContext
from fedstill.methods.refining import (
    Distilled,
    check_generator,
    check_settings,
    generator_of_round,
    inputs_without_generator,
    refine_modules,
)
from fedstill.models.layout import channels_innermost, channels_outermost, layout_of
from fedstill.models.stateless import Stateless
from fedstill.names import unknown
from fedstill.settings import ModedSettings, none_as
from fedstill.training import SGD, gradients
from fedstill.weights import State, Weights

Average = Literal["logits", "probabilities", "losses"]

MODES: dict[str, dict[str, object]] = {
    "paper": {},
    "fedftg": {
        "inputs": "generator",
        "average": "probabilities",
        "steps": 20,
        "batch_size": 50,
        "optimiser": "sgd",
        "lr_student": 0.1,
        "lr_schedule": "rounds",
        "clip_norm": 0.0,
        "weight_decay_student": 1e-3,
        "weight_decay_generator": 1e-3,
        "patience": 0,
        "labels": "stratified",
        "generator_forwards": "per-teacher",
        "freeze_unused_biases": False,
    },
}
"""What each mode sets where the key is not given; the settings' own defaults are the paper's."""


class FedDFSettings(ModedSettings):
    """``[feddf]``."""

    MODES: ClassVar[dict[str, dict[str, object]]] = MODES

    mode: Literal["paper", "fedftg"] = "paper"
    """The paper's distillation on an unlabelled set, or the data-free form that FedFTG's authors compare with; sets
    every key not given."""
    inputs: Literal["unlabelled", "generator", "noise", "real"] = "unlabelled"
    """Where inputs come from: the public set, a generator that learns, standard normal noise, or the cohort's own data
    (an oracle, in simulation only)."""
    augment: str | None = None
    """Augmentation of the public set: none, flip-crop-half, flip-crop; by default the clients' (data.augment)."""
    average: Average = "logits"
    """What is averaged over teachers: their logits (paper), their probabilities, or the student's losses."""
    client_weights: ClientWeights = "uniform"
    """Weights of that average: the same for all (paper), or n_k."""
    steps: int = Field(10_000, ge=0)
    """Student steps per round at most, N."""
    batch_size: int = Field(128, ge=2)
    """Samples per step; 64 in the released code."""
    optimiser: Literal["adam", "sgd"] = "adam"
    """The student's optimiser, new in every round."""
    lr_student: float = Field(1e-3, gt=0)
    """Student's learning rate."""
    lr_schedule: Literal["cosine", "rounds"] = "cosine"
    """Annealed to 0 over `steps` and the same in every round; or constant in a round, decayed with the clients'."""
    weight_decay_student: float = Field(0.0, ge=0)
    """Weight decay of the student, after the clip."""
    clip_norm: float = Field(5.0, ge=0)
    """Largest norm of the student's gradient; 0 (or "none") switches the clip off."""
    validate_every: int = Field(100, ge=1)
    """Steps between measurements on the server's validation samples; the last step always."""
    patience: int = Field(1000, ge=0)
    """Steps without a gain after which distillation ends with the best student; 0 needs no validation samples, takes
    all steps and returns the last student."""
    initial_is_candidate: bool = False
    """Whether the fused model itself may be the best one."""
    drop_below: float = Field(0.0, ge=0)
    """Leave out teachers whose validation accuracy is below this many times chance; 1.2 is the paper's drop-worst, 0
    keeps all."""
    labels: LabelSampling = "sampled"
    """How a generator's labels are drawn: y ~ p_t, in the released stratified counts, or uniformly over classes."""
    generator_steps: int = Field(50, ge=0)
    """Generator steps per round, before the student's."""
    lr_generator: float = Field(0.01, gt=0)
    """Generator's Adam learning rate in round 0, decayed with the clients'."""
    weight_decay_generator: float = Field(0.0, ge=0)
    """Weight decay of the generator's Adam, added to the gradient."""
    noise_dim: int = Field(100, ge=1)
    """Dimensions of the generator's z."""
    generator_width: int = Field(64, ge=1)
    """Channels before the generator's last layer."""
    generator_forwards: Literal["once", "per-teacher"] = "once"
    """How often its BatchNorm statistics follow in a step: once, or also for every teacher as in the released code."""
    freeze_unused_biases: bool = True
    """Keep the generator's biases that a BatchNorm takes away still (reproducibility)."""

    _none_switches_off = field_validator("clip_norm", mode="before")(none_as(0.0))

    def generator_phase(self) -> DistillationSettings:
        """Return the generator's keys as the distillation loop has them: no mining, all teachers alike."""
        return DistillationSettings(
            teacher="uniform",
            lambda_md=0.0,
            batch_size=self.batch_size,
            noise_dim=self.noise_dim,
            generator_width=self.generator_width,
            lr_generator=self.lr_generator,
            weight_decay_generator=self.weight_decay_generator,
            freeze_unused_biases=self.freeze_unused_biases,
        )


def ensemble_loss(student: Tensor, teachers: Tensor, weights: Tensor, average: Average) -> Tensor:
    """Return what the student minimises, the mean over the batch.

    Parameters
    ----------
    student : Tensor
        (batch, classes) logits.
    teachers : Tensor
        (teachers, batch, classes) logits.
    weights : Tensor
        (teachers,), which sum to one.
    average : {"logits", "probabilities", "losses"}
        ``KL(softmax(sum_k w_k t_k) || s)``, ``KL(sum_k w_k softmax(t_k) || s)`` or ``sum_k w_k KL(t_k || s)``.
    """
    shares = weights.to(teachers)[:, None]
    if average == "losses":
        return (shares * losses.kl(teachers, student)).sum(0).mean()
    if average == "logits":
        joint = (shares[..., None] * teachers).sum(0).softmax(-1)
    else:
        joint = (shares[..., None] * teachers.softmax(-1)).sum(0)
    return losses.discrepancy(student, teachers, shares, joint, "kl-teacher-student").sum()


@dataclass
class StudentPhase:
    """The student's steps of one round: student, teachers and their weights, inputs, optimiser, best so far."""

    settings: FedDFSettings
    model: Stateless
    student: Weights
    teachers: Teachers
    inputs: Inputs
    draws: Draws
    lr_factor: float = 1.0
    validation: Samples | None = None
    channels_last: bool = False
    weights: Tensor = field(init=False)
    best: Weights | None = None
    best_step: int = 0
    accuracy: float = -1.0
    done: int = 0
    log: Log = field(default_factory=Log)

    def __post_init__(self) -> None:
        self.student = self.student.map(layout_of(self.channels_last))
        self.moments = Adam.start(self.student.params)
        counts = self.teachers.counts.sum(1).double()
        sizes = counts if self.settings.client_weights == "samples" else torch.ones_like(counts)
        self.weights = (sizes / sizes.sum()).to(next(iter(self.student.params.values())).device)

    def run(self) -> Weights:
        """Take the steps and return the student: the best where it is measured, or else the last."""
        keys = self.settings
        if keys.patience and keys.initial_is_candidate:
            self.validate()
        while self.done < keys.steps:
            self.step()
            if keys.patience and (self.done % keys.validate_every == 0 or self.done == keys.steps):
                self.validate()
                if self.done - self.best_step >= keys.patience:
                    break
        found = self.student if self.best is None else self.best
        return found.map(channels_outermost) if self.channels_last else found

    def step(self) -> None:
        """Let the student take one step on a new batch."""
        x, _ = self.inputs.batch(self.draws.labels(self.done), self.draws.noise(self.done, 0))
        x = channels_innermost(x) if self.channels_last else x
        with torch.no_grad():
            logits = self.teachers.logits(x)
        with learning(self.student) as params:
            output = self.model(params, self.student.buffers, x, train=True)
            loss = ensemble_loss(output, logits, self.weights, self.settings.average)
            grads = gradients(loss, list(params.values()))
        self.update(grads)
        self.log.add(student_loss=loss)
        self.done += 1

    def update(self, grads: list[Tensor]) -> None:
        """Clip the gradient and follow it."""
        keys, params = self.settings, self.student.params
        sgd = SGD(self.lr(), weight_decay=keys.weight_decay_student, clip_norm=keys.clip_norm or None)
        grads, norm = sgd.clip(grads)
        if norm is not None:
            self.log.add(grad_norm=norm)
        if keys.optimiser == "sgd":
            sgd.update(list(params.values()), grads, [])
        else:
            adam = Adam(sgd.lr, weight_decay=keys.weight_decay_student)
            adam.step(params, dict(zip(params, grads, strict=True)), self.moments)

    def lr(self) -> float:
        """Return the learning rate of the next step."""
        keys = self.settings
        if keys.lr_schedule == "rounds":
            return keys.lr_student * self.lr_factor
        return keys.lr_student * (1 + math.cos(math.pi * self.done / keys.steps)) / 2

    def validate(self) -> None:
        """Measure the student; keep it where it is better than the best so far."""
        assert self.validation is not None
        score = evaluate(
            self.model,
            self.student,
            self.validation,
            self.teachers.counts.shape[1],
            self.settings.batch_size,
            channels_last=self.channels_last,
        )
        if score.accuracy > self.accuracy:
            self.best, self.best_step, self.accuracy = self.student.clone(), self.done, score.accuracy

    def metrics(self) -> dict[str, float]:
        """Return what was measured."""
        measured = {**self.log.means(), "steps": float(self.done)}
        if self.best is None:
            return measured
        return {**measured, "best_step": float(self.best_step), "validation_accuracy": self.accuracy}


def generator_phase(
    settings: FedDFSettings,
    model: Stateless,
    student: Weights,
    teachers: Teachers,
    generator: AnyGenerator,
    draws: Draws,
    lr_factor: float,
    channels_last: bool = False,
) -> Distillation:
    """Let the generator take its steps on ``L_dis + mean_k CE(t_k, y)``; return what has run, with its log."""
    inputs = GeneratedInputs(generator, train_mode=False)
    run = Distillation(
        settings.generator_phase(), model, student, teachers, inputs, draws, generator, lr_factor,
        channels_last=channels_last,
    )  # fmt: skip
    extra = len(teachers) if settings.generator_forwards == "per-teacher" else 0
    for step in range(settings.generator_steps):
        labels, noise = draws.labels(step), draws.noise(step, 0)
        generator.train()
        with torch.no_grad():
            for _ in range(extra):  # equal batches; only the running statistics follow
                generator(noise, labels)
        run.generator_step(noise, labels)
    return run


@dataclass(frozen=True)
class FedDF:
    """The refinement; usable in a federation and on any list of trained models.

    Parameters
    ----------
    settings : FedDFSettings
    seed : int
        Seed of the generator's initial weights.
    augmentation : str
        How the public set is augmented where ``settings.augment`` does not say.
    """

    settings: FedDFSettings = field(default_factory=FedDFSettings)
    seed: int = 0
    augmentation: str = "none"
    name: str = "feddf"

    def __post_init__(self) -> None:
        check_settings(self.settings, FedDFSettings)

    @property
    def needs_label_counts(self) -> bool:
        """True where a generator's labels are drawn from the clients' counts."""
        return self.settings.inputs == "generator" and self.settings.labels != "uniform"

    @property
    def simulation_only(self) -> bool:
        """True for ``inputs = "real"``: no real server has the clients' data."""
        return self.settings.inputs == "real"

    @property
    def needs_public(self) -> bool:
        """True for the unlabelled set."""
        return self.settings.inputs == "unlabelled"

    @property
    def needs_validation(self) -> bool:
        """True where the best student is looked for, or teachers are dropped."""
        return self.settings.patience > 0 or self.settings.drop_below > 0

    @property
    def augment(self) -> str:
        """How the public set is augmented."""
        return self.settings.augment or self.augmentation

    def check(self, model: Stateless, info: FederationInfo) -> None:
        """Refuse settings that do not fit the data, before round 0.

        Raises
        ------
        InputError
            An unknown augmentation, or inputs of which the generator cannot make any.
        """
        known = dict(list_augmentations())
        if self.augment not in known:
            raise unknown("augmentation (feddf.augment)", self.augment, known)
        if self.settings.inputs == "generator":
            check_generator(info)

    def refine(
        self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
    ) -> Refined:
        """Run the server step of one round.

        Parameters
        ----------
        model : Stateless
            The student's architecture.
        student : Weights
            The fused model; not changed.
        teachers : Teachers
            The cohort's models, of any architectures.
        state : dict
            ``{"generator": ...}`` from the round before, where there is one.

        Returns
        -------
        Refined
            The metrics: ``student_loss`` and ``grad_norm`` (before the clip), means over the steps; ``steps`` taken;
            ``teachers_dropped``; with validation ``validation_accuracy`` of the best student and its ``best_step``;
            with a generator ``generator_cls`` and ``generator_dis``.
        """
        keys = self.settings
        if keys.steps == 0:
            return Refined(student, state, {})
        good = self._good(teachers, context)
        dropped = {"teachers_dropped": float(len(teachers) - len(good))}
        if not good:
            return Refined(student, state, {"steps": 0.0, **dropped})
        taught = teachers if len(good) == len(teachers) else SomeTeachers(teachers, good)
        dtype = next(iter(student.params.values())).dtype
        if keys.inputs == "generator":
            inputs, draws, kept, made = self._generated(model, student, taught, state, context, dtype)
        else:
            inputs, kept, made = self._inputs(context, dtype), {}, {}
            nothing = torch.zeros(keys.batch_size, dtype=torch.int64, device=context.device).expand(keys.steps, -1)
            draws = StreamDraws(nothing, context.stream("feddf-noise"), 0, dtype)
        phase = StudentPhase(
            keys, model, student, taught, inputs, draws, context.lr_factor, context.validation, context.channels_last
        )
        weights = phase.run()
        return Refined(weights, kept, {**phase.metrics(), **made, **dropped})

    def distil(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        class_counts: Tensor | Sequence[Sequence[int]],
        input_shape: Sequence[int],
        *,
        unlabelled: Tensor | None = None,
        validation: tuple[Tensor, Tensor] | None = None,
        state: State | None = None,
        round: int = 0,
    ) -> Distilled:
        """Refine ``student`` in place from any trained models, outside any federation.

        Parameters
        ----------
        student : nn.Module
            The model to improve, for example the teachers' average.
        teachers : sequence of nn.Module
            Trained models, of any architectures that take ``input_shape`` and give the same number of logits.
            They are put into eval mode and their parameters no longer require gradients.
        class_counts : Tensor or nested sequence
            n_k^y, (teachers, classes): how many samples of each class each teacher has learnt from. Only how many
            classes there are matters, unless ``client_weights = "samples"`` or a generator draws labels from them.
        input_shape : sequence of int
            (channels, height, width).
        unlabelled : Tensor, optional
            Samples (N, channels, height, width), normalised as the teachers' own; needed with, and only with,
            ``inputs = "unlabelled"``, the default.
        validation : tuple of Tensor, optional
            Samples like these and their labels (n,), to find the best student and to drop teachers; needed unless
            ``patience = 0`` and ``drop_below = 0``.
        state : dict, optional
            What the call before returned, to keep a generator.
        round : int
            Chooses the random streams, so that several calls differ.

        Returns
        -------
        student, state, metrics

        Raises
        ------
        InputError
            For counts, samples or models that do not go together; the student is as it was.
        """
        if self.needs_public != (unlabelled is not None):
            ask = "needs samples, unlabelled=x" if self.needs_public else "takes no samples; leave unlabelled out"
            raise InputError(f"feddf.inputs = {self.settings.inputs!r} {ask}")
        if self.needs_validation and validation is None:
            raise InputError("feddf needs validation=(x, y), or feddf.patience = 0 and feddf.drop_below = 0")
        return refine_modules(
            self,
            self.seed,
            student,
            teachers,
            class_counts,
            input_shape,
            state=state,
            round=round,
            unlabelled=unlabelled,
            validation=validation,
        )

    def _good(self, teachers: Teachers, context: RoundContext) -> Sequence[int]:
        """Return the places of the teachers that are not dropped."""
        if self.needs_validation and context.validation is None:
            raise InputError(
                "feddf measures on samples that the server holds out: set data.server_validation, "
                "or feddf.patience = 0 and feddf.drop_below = 0"
            )
        if not self.settings.drop_below or context.validation is None:
            return range(len(teachers))
        least = self.settings.drop_below / context.info.num_classes
        found = teacher_accuracies(teachers, context.validation.x, context.validation.y)
        return [place for place, accuracy in enumerate(found) if accuracy >= least]

    def _inputs(self, context: RoundContext, dtype: torch.dtype) -> Inputs:
        stream, kind = context.stream("feddf-inputs"), self.settings.inputs
        if kind == "noise" or kind == "real":
            return inputs_without_generator(self.name, kind, stream, context, dtype)
        if context.public is None:
            raise InputError("feddf.inputs = 'unlabelled' needs a public set: name it with public.name")
        samples = RealInputs(context.public, stream)
        if self.augment == "none":
            return samples
        return AugmentedInputs(samples, self.augment, context.stream("feddf-augmentation"))

    def _generated(
        self,
        model: Stateless,
        student: Weights,
        teachers: Teachers,
        state: State,
        context: RoundContext,
        dtype: torch.dtype,
    ) -> tuple[Inputs, Draws, State, dict[str, float]]:
        """Run the generator phase; return its samples, the student's draws, what is kept and what was measured."""
        keys = self.settings
        generator = generator_of_round(self.seed, keys.noise_dim, keys.generator_width, state, context, dtype)
        labels, noise = context.stream("feddf-labels"), context.stream("feddf-noise")

        def draws(steps: int) -> StreamDraws:
            all_labels = draw_labels(keys.labels, teachers.counts, max(steps, 1), keys.batch_size, labels)
            return StreamDraws(all_labels, noise, keys.noise_dim, dtype)

        drawn = draws(keys.generator_steps)
        run = generator_phase(
            keys, model, student, teachers, generator, drawn, context.lr_factor, context.channels_last
        )
        means = run.log.means()
        measured = {name: value for name, value in means.items() if name in ("generator_cls", "generator_dis")}
        inputs = GeneratedInputs(generator, train_mode=False)
        return inputs, draws(keys.steps), {"generator": module_state(generator)}, measured
