"""FedFTG: data-free distillation fine-tunes the fused model on the server.

Method card
-----------
Paper
    Zhang, Shen, Ding, Tao, Duan, "Fine-tuning Global Model via Data-Free Knowledge Distillation for Non-IID
    Federated Learning", CVPR 2022.
Server, after any fusion
    ``min_w max_theta E_{z, y ~ p_t} [L_md - lambda_cls L_cls - lambda_dis L_dis]``: a conditional generator mines
    samples on which the fused model (the student) and the clients' models (the teachers) disagree, and the student
    learns to agree. ``L_md = sum_k a_k^y KL(student || teacher_k)`` (Eq. 4), ``L_cls = sum_k a_k^y CE(teacher_k, y)``,
    ``p_t(y)`` proportional to ``sum_k n_k^y`` (Eq. 9), ``a_k^y = n_k^y / sum_i n_i^y`` (Eq. 10).
Client, travels
    As the base method; the M label counts go up once.
State
    The generator lives on over all rounds; optimisers start anew each round.
Feature level
    ``level = "feature"`` (Table 5; not released, so this is our reading): the pseudo data are features, the input of
    the last linear layer. Student and teachers are their heads, L_dis is taken on features, only the head learns and
    everything before it stays as it was fused. The generator is a small one for features (``FeatureGenerator``).
Which mode
    ``paper``: the equations, with the released code's normalised distances in L_dis (Eq. 7 underflows to 0 for
    images) and its 1/M in the student's loss (a student step without it, at the paper's learning rate, damages the
    model). ``code``: what the released code does in rows 1-8 of the table below. ``tuned``: what measurements
    favour; chosen on server validation data.
Deviations of the released code, each with its key
    ======================= ================================ ==========================================
    topic                   paper                            released code
    ======================= ================================ ==========================================
    generator's L_md        ``md_gen`` kl-student-teacher    l1-logits, teachers detached
    student's L_md          ``md_student`` kl-student-teacher  kl-teacher-student against the mixture
    weights in L_cls        ``cls_weights`` per-sample       batch-mean: product of two means
    generator's update      ``generator_update`` summed      per-teacher, L_dis / S in each
    labels                  ``labels`` sampled               stratified
    class shares            ``share_epsilon`` 0              1e-6
    ======================= ================================ ==========================================
    On SCAFFOLD, ``mode = "code"`` also brings back the released control variates (``scaffold.mode = "code"``).
Related
    The class-by-class teacher is FedKD's (AAAI 2022, on logits) and the weighted-averaging baseline of FENS
    (NeurIPS 2024). The BatchNorm term is that of DeepInversion (CVPR 2020) and DENSE (NeurIPS 2022).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from fedstill.distill.inputs import AnyGenerator, Inputs, StreamDraws
from fedstill.distill.labels import draw_labels
from fedstill.distill.loop import Distillation, DistillationSettings, generated, module_state
from fedstill.distill.teachers import StackedTeachers, Teachers
from fedstill.errors import InputError
from fedstill.methods.base import FederationInfo, Refined, RoundContext
from fedstill.methods.refining import (
    Distilled,
    check_generator,
    check_settings,
    generator_of_round,
    inputs_without_generator,
    refine_modules,
)
from fedstill.models.anatomy import batch_norms
from fedstill.models.stateless import Stateless
from fedstill.rng import seed_of
from fedstill.weights import State, Tensors, Weights

MODES: dict[str, dict[str, object]] = {
    "paper": {},
    "code": {
        "md_gen": "l1-logits",
        "md_student": "kl-teacher-student",
        "cls_weights": "batch-mean",
        "generator_update": "per-teacher",
        "labels": "stratified",
        "share_epsilon": 1e-6,
        "freeze_unused_biases": False,
    },
    "tuned": {
        "md_gen": "l1-logits",
        "md_student": "kl-teacher-student",
        "reduction": "batch",
        "lambda_md": 0.0,
        "iterations": 100,
        "noise_dim": 64,
        "lr_student": 0.02,
        "generator_norm": "train",
    },
}
"""What each mode sets where the key is not given; the settings' own defaults are the paper's."""


class FedFTGSettings(DistillationSettings):
    """``[fedftg]``."""

    MODES: ClassVar[dict[str, dict[str, object]]] = MODES

    mode: Literal["paper", "code", "tuned"] = "paper"
    """The paper's equations, the released code's, or what measurements favour; sets every key not given."""
    level: Literal["input", "feature"] = "input"
    """Whether pseudo data are inputs and the whole model learns, or features and the last linear layer alone
    (Table 5)."""

    @model_validator(mode="after")
    def _rules(self) -> FedFTGSettings:
        one_target = self.teacher in ("class", "logits")
        if one_target and self.md_student != "kl-teacher-student":
            raise ValueError(
                f"teacher = {self.teacher!r} makes one target of all teachers and goes with "
                f"md_student = 'kl-teacher-student' only, not {self.md_student!r}"
            )
        mines = self.inputs == "generator" and self.lambda_md > 0
        if one_target and mines and self.md_gen != "kl-teacher-student":
            raise ValueError(
                f"teacher = {self.teacher!r} goes with md_gen = 'kl-teacher-student' (or lambda_md = 0), "
                f"not {self.md_gen!r}"
            )
        if self.lambda_bn and self.inputs != "generator":
            raise ValueError(f"lambda_bn teaches a generator, and inputs = {self.inputs!r} has none")
        if self.level == "feature" and self.inputs == "real":
            raise ValueError("level = 'feature' goes with inputs = 'generator' or 'noise': real data are no features")
        if self.level == "feature" and self.lambda_bn:
            raise ValueError("lambda_bn looks at BatchNorm layers, and level = 'feature' leaves them out; set it to 0")
        if self.generator_update == "per-teacher" and (self.md_gen == "kl-teacher-student" or self.lambda_bn):
            raise ValueError(
                "generator_update = 'per-teacher' takes one teacher at a time; it does not go with "
                "md_gen = 'kl-teacher-student', which needs the mixture of all, nor with lambda_bn"
            )
        return self


@dataclass(frozen=True)
class FedFTG:
    """The refinement; usable in a federation and on any list of trained models.

    Parameters
    ----------
    settings : FedFTGSettings
    seed : int
        Seed of the generator's initial weights.
    """

    settings: FedFTGSettings = field(default_factory=FedFTGSettings)
    seed: int = 0
    name: str = "fedftg"
    needs_label_counts: bool = True
    needs_public: bool = False
    needs_validation: bool = False

    def __post_init__(self) -> None:
        check_settings(self.settings, FedFTGSettings)

    @property
    def simulation_only(self) -> bool:
        """True for ``inputs = "real"``: no real server has the clients' data."""
        return self.settings.inputs == "real"

    def check(self, model: Stateless, info: FederationInfo) -> None:
        """Refuse settings that do not fit the model or the data, before round 0.

        Raises
        ------
        InputError
            ``lambda_bn`` without BatchNorm, inputs of which the generator cannot make any, or feature level where
            no head stands by itself or architectures differ.
        """
        keys = self.settings
        if keys.lambda_bn and not batch_norms(model.module):
            raise InputError("fedftg.lambda_bn needs a model with BatchNorm: set model.norm = 'bn' or lambda_bn = 0")
        if keys.level == "feature":
            Head.check(model, info)
        elif keys.inputs == "generator":
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
            The cohort's models and their label counts.
        state : dict
            ``{"generator": ...}`` from the round before, or empty.

        Returns
        -------
        Refined
            The metrics are means over the refinement: ``student_loss``, ``generator_md``, ``generator_cls``,
            ``generator_dis``, and ``label_accuracy``, the share of inputs whose label the teachers see.
        """
        if self.settings.iterations == 0:
            return Refined(student, state, {})
        if self.settings.level == "input":
            return self._refine(model, student, teachers, state, context)
        head = Head.of(model, context.info)
        features = replace(context, info=replace(context.info, input_shape=(head.width,)))
        refined = self._refine(head.model, head.cut(student), head.teachers(teachers), state, features)
        return replace(refined, weights=head.put_back(student, refined.weights))

    def _refine(
        self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
    ) -> Refined:
        keys = self.settings
        dtype = next(iter(student.params.values())).dtype
        generator: AnyGenerator | None = None
        inputs: Inputs
        if keys.inputs == "generator":
            generator = self._generator(state, context, dtype)
            inputs = generated(generator, keys)
        else:
            stream = context.stream("distillation-inputs")
            inputs = inputs_without_generator(self.name, keys.inputs, stream, context, dtype)
        labels = draw_labels(
            keys.labels, teachers.counts, keys.iterations, keys.batch_size, context.stream("distillation-labels")
        )
        draws = StreamDraws(labels, context.stream("distillation-noise"), keys.noise_dim, dtype)
        run = Distillation(
            keys, model, student, teachers, inputs, draws, generator,
            context.lr_factor, context.cuda_graphs, context.channels_last,
        )  # fmt: skip
        weights = run.run()
        kept = {"generator": module_state(generator)} if generator is not None else {}
        return Refined(weights, kept, run.log.means())

    def _generator(self, state: State, context: RoundContext, dtype: torch.dtype) -> AnyGenerator:
        keys = self.settings
        return generator_of_round(self.seed, keys.noise_dim, keys.generator_width, state, context, dtype)

    def distil(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        class_counts: Tensor | Sequence[Sequence[int]],
        input_shape: Sequence[int],
        *,
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
            n_k^y, (teachers, classes): how many samples of each class each teacher has learnt from.
        input_shape : sequence of int
            (channels, height, width).
        state : dict, optional
            What the call before returned, to keep the generator.
        round : int
            Chooses the random streams, so that several calls differ.

        Returns
        -------
        student, state, metrics
        """
        return refine_modules(self, self.seed, student, teachers, class_counts, input_shape, state=state, round=round)


@dataclass(frozen=True)
class Head:
    """The last linear layer of a model as a model of its own, for the feature level.

    Parameters
    ----------
    name : str
        Its dotted name.
    model : Stateless
        A copy of the layer.
    width : int
        The number of features that it reads.
    """

    name: str
    model: Stateless
    width: int

    @staticmethod
    def check(model: Stateless, info: FederationInfo) -> None:
        """Raise InputError where the head is not known, is tied to another layer, or architectures differ."""
        if info.architectures > 1:
            raise InputError(
                "fedftg.level = 'feature': models of different architectures share no features; "
                "use level = 'input', or one [model]"
            )
        if info.head is None:
            raise InputError(
                "fedftg.level = 'feature' needs to know the linear layer that gives the logits: name it with model.head"
            )
        own = dict(model.module.get_submodule(info.head).named_parameters(remove_duplicate=False))
        inside = {id(value) for value in own.values()}
        everywhere = dict(model.module.named_parameters(remove_duplicate=False))
        found = {name for name, value in everywhere.items() if id(value) in inside}
        if found != {f"{info.head}.{name}" for name in own} or "weight" not in own:
            raise InputError(
                f"fedftg.level = 'feature': the weights of {info.head!r} are tied to others, or computed from them; "
                "use level = 'input'"
            )

    @staticmethod
    def of(model: Stateless, info: FederationInfo) -> Head:
        """Return the head of a model."""
        Head.check(model, info)
        assert info.head is not None
        layer = copy.deepcopy(model.module.get_submodule(info.head))
        assert isinstance(layer, nn.Linear)
        return Head(info.head, Stateless(layer), layer.in_features)

    def cut(self, whole: Weights) -> Weights:
        """Return the head's part of a model's weights."""
        return Weights(self._own(whole.params), self._own(whole.buffers))

    def teachers(self, whole: Teachers) -> Teachers:
        """Return the teachers' heads."""
        if not isinstance(whole, StackedTeachers):
            raise InputError(
                "fedftg.level = 'feature' needs teachers of the student's architecture; use level = 'input'"
            )
        return replace(whole, model=self.model, params=self._own(whole.params), buffers=self._own(whole.buffers))

    def put_back(self, whole: Weights, head: Weights) -> Weights:
        """Return a model's weights with another head."""
        params = {f"{self.name}.{name}": value for name, value in head.params.items()}
        buffers = {f"{self.name}.{name}": value for name, value in head.buffers.items()}
        return Weights({**whole.params, **params}, {**whole.buffers, **buffers})

    def _own(self, tensors: Tensors) -> Tensors:
        before = f"{self.name}."
        return {name.removeprefix(before): value for name, value in tensors.items() if name.startswith(before)}


def generator_seed(train_seed: int, method: str = "fedftg") -> int:
    """Return the seed of a federation's generator."""
    return seed_of(train_seed, method)
