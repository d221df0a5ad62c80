"""What holds for every refinement, whatever it is."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedstill.conformance.bench import Problem, context, images, network
from fedstill.conformance.findings import Verdict, agree, all_of, check, copied, leaves, only_tensors
from fedstill.conformance.generic import positions, streams_at
from fedstill.conformance.subject import Subject
from fedstill.data.dataset import Samples
from fedstill.distill.teachers import StackedTeachers, Teachers
from fedstill.federation import FederationState, GlobalModel
from fedstill.methods.base import FederationInfo, Refined, Refinement, RoundContext, ServerState
from fedstill.runs.checkpoint import CheckpointStore
from fedstill.weights import State, Weights

COUNTS = torch.tensor([[6, 0, 1], [2, 3, 0], [0, 5, 3]])
"""n_k^y of a cohort of three, out of five clients."""
SIZES = (7, 5, 8, 9, 4)


@dataclass(frozen=True)
class Scene:
    """A refinement, its student, its teachers, and what the server may use."""

    part: Refinement
    problem: Problem
    teachers: Teachers
    public: Samples
    sizes: tuple[int, ...] = SIZES

    def refine(self, state: State | None = None, round: int = 0) -> Refined:
        """Refine the student."""
        student = self.problem.initial
        return self.part.refine(self.problem.model, student, self.teachers, state or {}, self.context(round))

    def context(self, round: int) -> RoundContext:
        """Return what the server may use in a round."""
        info = FederationInfo(self.sizes, self.problem.classes, (1, 4, 4), self.problem.model.head_name, public=8)
        own = context(info, round, 0.9, self.public)
        return replace(own, real=self.public if self.part.simulation_only else None)


def scene(subject: Subject) -> Scene:
    """Return a small student with teachers near it."""
    problem = network()
    teachers = StackedTeachers.of(problem.model, near(problem.initial, len(COUNTS)), COUNTS)
    return Scene(subject.refinement(), problem, teachers, images(12, 3, torch.float64, "public"))


def near(initial: Weights, number: int) -> Sequence[Weights]:
    """Return models at some distance, each another, buffers too."""
    draw = torch.Generator().manual_seed(11)

    def moved(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value + 3
        return value + 0.3 * torch.rand(value.shape, generator=draw, dtype=torch.float64).to(value)

    return [initial.map(moved) for _ in range(number)]


def outcome(refined: Refined) -> dict[str, Tensor]:
    """Return the student and the state as one set of tensors."""
    return leaves({"weights": leaves(refined.weights), "state": leaves(refined.state)})


@check(
    refines=True,
    without="The fused model that a refinement is measured against, or the uploads, are no longer what they were.",
)
def refinement_leaves_its_inputs(subject: Subject) -> Verdict:
    """Neither the student that was given, nor the teachers, their counts, the state or the samples are changed."""
    at = scene(subject)
    teachers = at.teachers
    assert isinstance(teachers, StackedTeachers)
    state = at.refine().state
    given = {
        "student": leaves(at.problem.initial),
        "teachers": leaves({"params": teachers.params, "buffers": teachers.buffers, "counts": teachers.counts}),
        "state": leaves(state),
        "public": {"x": at.public.x, "y": at.public.y},
        "module": dict(at.problem.model.module.state_dict()),
    }
    before = copied(given)
    at.refine(state, round=1)
    return agree(given, before, 0, "student, teachers, state, samples")


@check(
    refines=True,
    without="Two runs of one seed differ: a refinement that draws from a global stream changes with its neighbours.",
)
def refinement_same_bits_twice(subject: Subject) -> Verdict:
    """Two calls give the same bits, under different seeds of the global streams, which stand as they stood."""
    at, found = scene(subject), []
    for seed in (1, 2):
        with streams_at(seed):
            before = positions()
            found.append(outcome(at.refine()))
            moved = [name for name, place in positions().items() if place != before[name]]
        if moved:
            return Verdict(False, f"the global stream of {', '.join(moved)} has moved")
    return agree(found[0], found[1], 0, "student and state")


@check(refines=True, without="A run that was stopped goes on with another generator than the one it had.")
def refinement_survives_a_checkpoint(subject: Subject) -> Verdict:
    """Its state is tensors, and the next round after saving and loading gives the bits of an uninterrupted one."""
    at = scene(subject)
    first = at.refine()
    typed = only_tensors(first.state, "state")
    if not typed.held:
        return typed
    with tempfile.TemporaryDirectory() as folder:
        server = ServerState(first.weights)
        store = CheckpointStore(Path(folder), 1, "conformance")
        store.save(FederationState(1, (GlobalModel(server, (first.state,)),)))
        loaded = CheckpointStore(Path(folder), 1, "conformance").load()
    assert loaded is not None
    on = replace(at, problem=replace(at.problem, initial=first.weights))
    again = replace(at, part=subject.refinement(), problem=replace(at.problem, initial=loaded.server.weights))
    return agree(outcome(again.refine(loaded.refinements[0], 1)), outcome(on.refine(first.state, 1)), 0, "next round")


@check(refines=True, without="A refinement returns something that is not the model: it cannot be sent, or evaluated.")
def refinement_returns_the_models_shape(subject: Subject) -> Verdict:
    """The refined model has the student's names, shapes and types, is finite, and is not the student."""
    at = scene(subject)
    refined, student = at.refine().weights, at.problem.initial
    got, wanted = leaves(refined), leaves(student)
    same = got.keys() == wanted.keys() and all(
        value.shape == wanted[name].shape and value.dtype == wanted[name].dtype for name, value in got.items()
    )
    moved = any(not torch.equal(value, student.params[name]) for name, value in refined.params.items())
    problems = [
        text
        for right, text in (
            (same, "names, shapes or types differ"),
            (refined.all_finite(), "not finite"),
            (moved, "nothing has changed"),
        )
        if not right
    ]
    return all_of(Verdict(not problems, "; ".join(problems) or "names, shapes, types; finite; changed"))
