"""FedFTG with a mistake: in its steps, or in what any refinement can do wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedstill.config import Config
from fedstill.conformance.wrong.registry import wrong
from fedstill.distill.teachers import Teachers
from fedstill.methods.base import (
    Refined,
    RoundContext,
)
from fedstill.methods.fedftg import FedFTG
from fedstill.models.stateless import Stateless
from fedstill.weights import State, Weights


@dataclass(frozen=True)
class Everybody:
    """The cohort's teachers, and one that stands for all absent clients and agrees with the student."""

    cohort: Teachers
    counts: Tensor
    model: Stateless
    student: Weights

    def __len__(self) -> int:
        return len(self.counts)

    def logits(self, x: Tensor) -> Tensor:
        """Return (teachers, batch, classes)."""
        return torch.cat([self.cohort.logits(x), self.logits_of(len(self) - 1, x)[None]])

    def logits_of(self, teacher: int, x: Tensor) -> Tensor:
        """Return (batch, classes)."""
        if teacher < len(self.cohort):
            return self.cohort.logits_of(teacher, x)
        return self.model(self.student.params, self.student.buffers, x, train=False)

    def statistics_gap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cohort's."""
        return self.cohort.statistics_gap(x)


def fedftg(config: Config, **keys: Any) -> FedFTG:
    """Return FedFTG with keys exchanged."""
    return FedFTG(config.fedftg.model_copy(update=keys))


@wrong("fedftg", "fedftg-shares-over-the-cohort", "fedftg-student-step-by-hand")
def fedftg_shares_over_all(config: Config) -> Any:
    """FedFTG whose alpha is each client's share of all clients' samples instead of the cohort's."""

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            held = teachers.counts.sum()
            absent = teachers.counts.sum(0) * (sum(context.info.samples) - held) // held
            everybody = Everybody(teachers, torch.cat([teachers.counts, absent[None]]), model, student.clone())
            return super().refine(model, student, everybody, state, context)

    return Refinement(config.fedftg)


@wrong("fedftg", "fedftg-student-step-by-hand")
def fedftg_teacher_first(config: Config) -> Any:
    """FedFTG whose student lowers KL(teachers || student), as in the released code."""
    return fedftg(config, md_student="kl-teacher-student")


@wrong("fedftg", "fedftg-shares-sum-to-one")
def fedftg_shares_with_a_large_epsilon(config: Config) -> Any:
    """FedFTG that guards its denominators with 1, which counts among small numbers of samples."""
    return fedftg(config, share_epsilon=1.0)


@wrong("fedftg", "fedftg-labels-follow-the-cohort", "refinement-agrees-with-reference-cases")
def fedftg_uniform_labels(config: Config) -> Any:
    """FedFTG that generates all classes alike, held or not."""
    return fedftg(config, labels="uniform")


@wrong("fedftg", "fedftg-class-weights-per-sample")
def fedftg_weights_as_a_mean(config: Config) -> Any:
    """FedFTG whose L_cls is a product of two means, as in the released code."""
    return fedftg(config, cls_weights="batch-mean")


@wrong("fedftg", "fedftg-generator-loss-by-hand", "refinement-agrees-with-reference-cases")
def fedftg_generator_helps(config: Config) -> Any:
    """FedFTG whose generator lowers L_md instead of raising it."""
    return fedftg(config, lambda_md=-config.fedftg.lambda_md)


@wrong("fedftg", "fedftg-student-rests-in-the-generator-phase")
def fedftg_student_moves_along(config: Config) -> Any:
    """FedFTG whose student takes a step of its own, at a rate of its own, before the student phase."""

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            along = replace(student, params={name: 0.999 * value for name, value in student.params.items()})
            return super().refine(model, along, teachers, state, context)

    return Refinement(config.fedftg)


@wrong("fedftg", "fedftg-generator-rests-in-the-student-phase")
def fedftg_generator_moves_along(config: Config) -> Any:
    """FedFTG whose generator takes a step with every step of the student."""
    return fedftg(config, generator_steps=config.fedftg.student_steps)


@wrong("fedftg", "fedftg-without-iterations-is-its-base")
def fedftg_at_least_once(config: Config) -> Any:
    """FedFTG that does one iteration where none is asked for."""
    return fedftg(config, iterations=max(1, config.fedftg.iterations))


@wrong("fedftg", "refinement-leaves-its-inputs")
def fedftg_in_place(config: Config) -> Any:
    """FedFTG that writes the refined weights into the fused model's tensors."""

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            done = super().refine(model, student, teachers, state, context)
            for name, value in student.params.items():
                value.copy_(done.weights.params[name])
            return done

    return Refinement(config.fedftg)


@wrong("fedftg", "refinement-same-bits-twice")
def fedftg_global_noise(config: Config) -> Any:
    """FedFTG whose streams are seeded from PyTorch's global one."""

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            seed = int(torch.randint(1000, ()))
            fresh = replace(context, stream=lambda purpose: torch.Generator().manual_seed(seed))
            return super().refine(model, student, teachers, state, fresh)

    return Refinement(config.fedftg)


@wrong("fedftg", "refinement-survives-a-checkpoint")
def fedftg_generator_on_the_object(config: Config) -> Any:
    """FedFTG whose generator lives on in the object, and not in the state that a checkpoint holds."""
    memory: State = {}

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            done = super().refine(model, student, teachers, memory, context)
            memory.update(done.state)
            return replace(done, state={})

    return Refinement(config.fedftg)


@wrong("fedftg", "refinement-returns-the-models-shape")
def fedftg_single_precision(config: Config) -> Any:
    """FedFTG that returns its student in float32 whatever the model's type."""

    class Refinement(FedFTG):
        def refine(
            self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
        ) -> Refined:
            done = super().refine(model, student, teachers, state, context)
            return replace(done, weights=done.weights.map(lambda value: value.float()))

    return Refinement(config.fedftg)
