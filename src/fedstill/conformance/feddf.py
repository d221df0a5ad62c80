"""FedDF: what the teachers' answers are averaged into."""

from __future__ import annotations

import torch

from fedstill.conformance.bench import Problem, images
from fedstill.conformance.fedftg import ANSWERS, STUDENT, Constant, Watched
from fedstill.conformance.findings import DoesNotApply, Verdict, agree, check
from fedstill.conformance.refinements import Scene, scene
from fedstill.conformance.subject import Subject
from fedstill.models import Stateless, split_state
from fedstill.weights import Weights


@check(
    "feddf",
    refines=True,
    without="A sure teacher counts as much as an unsure one; the ensemble is another one than the paper's.",
)
def feddf_average_of_logits(subject: Subject) -> Verdict:
    """A student step by hand, by SGD: towards ``softmax(mean_k t_k)``, all teachers alike, whatever they hold."""
    subject = subject.near(optimiser="sgd", lr_schedule="rounds").where(
        steps=1, lr_student=0.5, clip_norm=0.0, weight_decay_student=0.0, generator_steps=0, patience=0, drop_below=0.0
    )
    keys = subject.config.feddf
    if keys.optimiser != "sgd" or keys.lr_schedule != "rounds":
        raise DoesNotApply("its optimiser is fixed")
    counts = torch.tensor([[6, 0, 1], [2, 3, 0], [0, 5, 3]])
    module = Constant(STUDENT.clone())
    problem = Problem(Stateless(module), Weights(*split_state(module)), (images(4, 3, torch.float64, "none", 0),), 3)
    at = Scene(subject.refinement(), problem, Watched(ANSWERS, counts), images(12, 3, torch.float64, "public"))
    slope = STUDENT.softmax(0) - ANSWERS.mean(0).softmax(0)
    wanted = STUDENT - keys.lr_student * slope
    return agree(at.refine().weights.params["bias"], wanted, 1e-9, "the student after one step")


@check(
    "feddf",
    refines=True,
    without="A comparison with the unrefined method shows a difference that is not the refinement's.",
)
def feddf_without_steps_is_its_base(subject: Subject) -> Verdict:
    """With no steps the fused model comes back, to the bit."""
    at = scene(subject.where(steps=0))
    return agree(at.refine().weights, at.problem.initial, 0, "without steps")
