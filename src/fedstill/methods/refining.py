"""What FedFTG and FedDF share: a kept generator, inputs that need none, and the call on any list of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from fedstill.data.dataset import Samples
from fedstill.distill.inputs import AnyGenerator, Inputs, NoiseInputs, RealInputs, initial_generator, kept_generator
from fedstill.distill.teachers import ModuleTeachers, Teachers
from fedstill.errors import InputError, RunError
from fedstill.methods.base import FederationInfo, Refined, RoundContext
from fedstill.models.anatomy import check_width, split_state
from fedstill.models.randomness import layers_draw_from
from fedstill.models.stateless import Stateless
from fedstill.rng import seed_of, torch_stream
from fedstill.settings import Settings
from fedstill.weights import State, Weights, finite

Distilled = tuple[nn.Module, State, dict[str, float]]
"""The student, what the refinement keeps for its next call, and what it measured."""


def check_generator(info: FederationInfo) -> None:
    """Raise InputError where a generator cannot make inputs of this shape."""
    initial_generator(0, 1, 1, info.num_classes, info.input_shape, torch.device("cpu"))


def generator_of_round(
    seed: int, noise_dim: int, width: int, state: State, context: RoundContext, dtype: torch.dtype
) -> AnyGenerator:
    """Return a refinement's generator: new, or as ``state`` has it from the round before."""
    info = context.info
    made = initial_generator(seed, noise_dim, width, info.num_classes, info.input_shape, context.device)
    return kept_generator(made, state, dtype)


def inputs_without_generator(
    method: str, kind: Literal["noise", "real"], stream: torch.Generator, context: RoundContext, dtype: torch.dtype
) -> Inputs:
    """Return noise, or the cohort's own data.

    Raises
    ------
    InputError
        For the latter outside a simulation.
    """
    if kind == "noise":
        return NoiseInputs(context.info.input_shape, stream, dtype)
    if context.real is None:
        raise InputError(f"{method}.inputs = 'real' is an oracle for simulation: no server has the clients' data")
    return RealInputs(context.real, stream)


class Refines(Protocol):
    """A method that checks a student and refines it."""

    @property
    def name(self) -> str:
        """Its name, that of its table in the configuration."""

    def check(self, model: Stateless, info: FederationInfo) -> None:
        """Raise InputError where the settings do not fit."""

    def refine(
        self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
    ) -> Refined:
        """Return the improved student."""


def refine_modules(
    method: Refines,
    seed: int,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    class_counts: Tensor | Sequence[Sequence[int]],
    input_shape: Sequence[int],
    *,
    state: State | None,
    round: int,
    unlabelled: Tensor | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
) -> Distilled:
    """Refine ``student`` in place from any trained models, outside any federation.

    The arguments are those of the methods' ``distil``; ``seed`` is that of the random streams.

    Raises
    ------
    InputError
        For counts, samples or models that do not go together, or weights that are not finite; the student is as it
        was.
    RunError
        If the student's weights turned non-finite; it is as it was.
    """
    models = {"student": student, **{f"teacher {place}": teacher for place, teacher in enumerate(teachers)}}
    _check_modules(models)
    counts = _counts(class_counts, len(teachers))
    shape, classes = tuple(input_shape), counts.shape[1]
    for module in models.values():
        check_width(module, shape, classes)
    params, buffers = split_state(student)
    like = next(iter(params.values()))
    context = RoundContext(
        round,
        FederationInfo(tuple(counts.sum(1).tolist()), classes, shape),
        stream=lambda purpose: torch_stream(seed, purpose, round, device=like.device),
        device=like.device,
        public=None if unlabelled is None else _samples("unlabelled", unlabelled, None, shape, classes, like),
        validation=None if validation is None else _samples("validation", *validation, shape, classes, like),
    )
    method.check(Stateless(student), context.info)
    model = Stateless(student).clone()  # the student may itself be one of the teachers
    with layers_draw_from(model.module, like.device, seed_of(seed, "layers", round)):
        ensemble = ModuleTeachers(teachers, counts)
        refined = method.refine(model, Weights(params, buffers), ensemble, state or {}, context)
    if not refined.weights.all_finite():
        raise RunError(
            f"{method.name} made the student non-finite; a smaller lr_student or lr_generator usually helps; "
            f"the student is as it was"
        )
    student.load_state_dict({**refined.weights.params, **refined.weights.buffers}, strict=False)
    return student, refined.state, refined.metrics


def check_settings(given: object, kind: type[Settings]) -> None:
    """Raise InputError where a method is made with anything else than its settings."""
    if not isinstance(given, kind):
        raise InputError(f"settings: expected {kind.__name__}(...), not {type(given).__name__}")


def _check_modules(models: Mapping[str, object]) -> None:
    """Raise InputError where a model is no module, or has weights that are not finite."""
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise InputError(f"{name} is no torch.nn.Module, it is of type {type(model).__name__}")
        if not finite(model.state_dict().values()):
            raise InputError(f"{name} has weights that are not finite; leave it out, or train it anew")


def _counts(given: Tensor | Sequence[Sequence[int]], teachers: int) -> Tensor:
    """Return n_k^y, int64 (teachers, classes)."""
    try:
        given = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"class_counts cannot be read as a table of numbers ({error})") from error
    if given.dim() != 2 or len(given) != teachers:
        raise InputError(
            f"class_counts is {tuple(given.shape)}, expected one row of class counts for each of {teachers} teachers"
        )
    counts = given.to(torch.int64)
    if not torch.equal(counts.to(given.dtype), given):
        raise InputError("class_counts holds a number that is not whole: it says how many samples each class has")
    if int(counts.min()) < 0:
        raise InputError("class_counts holds a negative number")
    if int(counts.sum()) == 0:
        raise InputError("class_counts is zero everywhere: no label can be drawn from it")
    return counts


def _samples(name: str, x: Tensor, y: Tensor | None, shape: tuple[int, ...], classes: int, like: Tensor) -> Samples:
    """Return samples as the student reads them; labels of zero where there are none."""
    if not x.is_floating_point() or tuple(x.shape[1:]) != shape or len(x) == 0:
        raise InputError(
            f"{name}: samples are {x.dtype} {tuple(x.shape)}, expected normalised floating-point images of shape "
            f"(N, {', '.join(map(str, shape))}), one at least"
        )
    labels = torch.zeros(len(x), dtype=torch.int64) if y is None else y
    if labels.is_floating_point() or labels.shape != x.shape[:1] or int(labels.min()) < 0 or labels.max() >= classes:
        raise InputError(f"{name}: expected one whole label from 0 to {classes - 1} for each of {len(x)} samples")
    return Samples(x.detach().to(like.device, like.dtype), labels.to(like.device, torch.int64))
