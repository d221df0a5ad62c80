"""FedFTG: class shares over the cohort, labels, the losses of both phases, what rests in which phase."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedstill.conformance.bench import Problem, images
from fedstill.conformance.findings import DoesNotApply, Verdict, agree, all_of, check, differ, mismatch
from fedstill.conformance.refinements import Scene, scene
from fedstill.conformance.subject import Subject
from fedstill.models import Stateless, split_state
from fedstill.weights import Weights


class Constant(nn.Module):
    """The same logits whatever the input: what is generated then does not matter, only its labels do."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(logits)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, classes)."""
        return self.bias + 0.0 * x.flatten(1).sum(1, keepdim=True)


@dataclass
class Watched:
    """Teachers with constant logits that note the gradient which reaches each of them in the generator phase."""

    answers: Tensor
    counts: Tensor
    slopes: dict[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.answers)

    def logits(self, x: Tensor) -> Tensor:
        """Return (teachers, batch, classes)."""
        return torch.stack([self.logits_of(teacher, x) for teacher in range(len(self))])

    def logits_of(self, teacher: int, x: Tensor) -> Tensor:
        """Return (batch, classes)."""
        out = self.answers[teacher] + 0.0 * x.flatten(1).sum(1, keepdim=True)
        if out.requires_grad:
            out.register_hook(lambda slope: self.note(teacher, slope))  # type: ignore[no-untyped-call]
        return out

    def note(self, teacher: int, slope: Tensor) -> None:
        """Keep the gradient that came back to one teacher."""
        self.slopes[teacher] = slope.detach().clone()

    def statistics_gap(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and no gap."""
        return self.logits(x), torch.zeros(len(self), dtype=x.dtype)


STUDENT = torch.tensor([0.2, -0.4, 0.7], dtype=torch.float64)
ANSWERS = torch.tensor([[1.0, 0.0, -0.5], [-0.3, 0.8, 0.1], [0.4, 0.4, -1.2]], dtype=torch.float64)


def constants(subject: Subject, counts: Tensor, answers: Tensor = ANSWERS) -> tuple[Scene, Watched]:
    """Return a student and teachers that answer the same to everything."""
    module = Constant(STUDENT.clone())
    problem = Problem(Stateless(module), Weights(*split_state(module)), (images(4, 3, torch.float64, "none", 0),), 3)
    teachers = Watched(answers[: len(counts)], counts)
    part = input_level(subject).refinement()
    return Scene(part, problem, teachers, images(12, 3, torch.float64, "public")), teachers


def input_level(subject: Subject) -> Subject:
    """Return the refinement where its pseudo data are inputs, made by its generator."""
    return subject.where(level="input", inputs="generator")


def once(subject: Subject, **keys: object) -> Subject:
    """Return the refinement with one iteration of one step each."""
    return subject.where(**{"iterations": 1, "generator_steps": 1, "student_steps": 1, **keys})


def shares(counts: Tensor) -> Tensor:
    """Return alpha_k^y = n_k^y / sum_i n_i^y, 0 for a class that nobody holds."""
    return counts.double() / counts.sum(0).clamp_min(1).double()


@check(
    "fedftg",
    refines=True,
    without="The student learns from other teachers than it should, or at another pace than the learning rate says.",
)
def fedftg_student_step_by_hand(subject: Subject) -> Verdict:
    """A student step written out: ``(1/M) sum_k alpha_k^y KL(s || t_k)``, with alpha 3/4 and 1/4 for all labels."""
    subject = once(subject, generator_steps=0, lr_student=0.5, weight_decay_student=0.02)
    at, _ = constants(subject, torch.tensor([[6, 0, 0], [2, 0, 0]]))
    s, log_t = STUDENT.softmax(0), ANSWERS[:2].log_softmax(1)
    d = s.log() - (0.75 * log_t[0] + 0.25 * log_t[1])
    slope = s * (d - (s * d).sum()) / 3
    wanted = STUDENT - 0.5 * (slope + 0.02 * STUDENT)
    return agree(at.refine().weights.params["bias"], wanted, 1e-9, "the student after one step")


@check(
    "fedftg",
    refines=True,
    without="Absent clients take part of the weight: the student learns too little, or from nobody.",
)
def fedftg_shares_over_the_cohort(subject: Subject) -> Verdict:
    """``alpha = n_k^y / sum_S n_i^y``: the student does not depend on how much the absent clients hold."""
    ends = []
    for absent in ((), (8, 9, 4), (800, 9, 4)):
        at, _ = constants(once(subject, generator_steps=0), torch.tensor([[6, 0, 0], [2, 0, 0]]))
        ends.append(replace(at, sizes=(6, 2, *absent)).refine().weights)
    return all_of(*[agree(end, ends[0], 1e-12, "the student, from the one without absent clients") for end in ends[1:]])


@check(
    "fedftg",
    refines=True,
    without="The more the clients' holdings differ, the weaker or the stronger the student's steps.",
)
def fedftg_shares_sum_to_one(subject: Subject) -> Verdict:
    """Teachers that agree teach the same, however many samples there are and however they are divided among them."""
    ends = []
    for counts in ([[6, 0, 1], [2, 3, 0], [0, 5, 3]], [[3, 24, 0], [21, 0, 6], [0, 0, 6]]):
        agreeing = ANSWERS[:1].expand(3, 3).clone()
        at, _ = constants(once(subject, generator_steps=0), torch.tensor(counts), agreeing)
        ends.append(at.refine().weights)
    return agree(ends[0], ends[1], 1e-6, "the student, from two cohorts of the same label shares")


@check(
    "fedftg",
    refines=True,
    without="Data are generated for classes that no teacher knows, and classes that everybody holds are rare.",
)
def fedftg_labels_follow_the_cohort(subject: Subject) -> Verdict:
    """Labels of generated samples come as p_t(y), proportional to ``sum_S n_k^y``; a class nobody holds never does."""
    number = 600
    counts = torch.tensor([[6, 0, 1], [2, 0, 0], [0, 0, 3]])
    subject = once(subject, batch_size=number, lambda_md=0.0, lambda_dis=0.0)
    if subject.config.fedftg.lambda_cls == 0:
        raise DoesNotApply("labels cannot be seen without L_cls")
    at, teachers = constants(subject, counts)
    at.refine()
    slopes = sum(teachers.slopes.values(), torch.zeros(1, 3).double())
    held = slopes.abs().amax(1) > 0  # a label that nobody holds has weight 0 and reaches no teacher
    found = torch.bincount(slopes.argmin(1)[held], minlength=3).double() / len(slopes)
    p = counts.sum(0).double() / counts.sum()
    far = (found - p).abs() > 4 * (p * (1 - p) / len(slopes)).sqrt() + 1 / len(slopes)
    shown = ", ".join(f"{one:.3f} of {wanted:.3f}" for one, wanted in zip(found.tolist(), p.tolist()))
    right = not bool(far.any()) and float(found[1]) == 0 and bool(held.all())
    return Verdict(right, f"shares of the labels: {shown}; {int((~held).sum())} that nobody holds")


def generator_slopes(subject: Subject, **keys: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients that reach the teachers' logits (S, B, M), the class shares, and the student's answer."""
    counts = torch.tensor([[5, 0, 1], [1, 4, 0]])
    at, teachers = constants(once(subject, lambda_dis=0.0, batch_size=12, **keys), counts)
    at.refine()
    if len(teachers.slopes) != 2:
        return torch.zeros(2, 12, 3, dtype=torch.float64), shares(counts), STUDENT.softmax(0)
    return torch.stack([teachers.slopes[0], teachers.slopes[1]]), shares(counts), STUDENT.softmax(0)


def explained(slopes: Tensor, alpha: Tensor, s: Tensor, cls: float, md: float) -> float:
    """Return the distance from ``alpha_k^y / B (cls (t - e_y) - md (t - s))``, with the best label y of each sample."""
    t = ANSWERS[: len(slopes)].softmax(1)
    one_hot = torch.eye(t.shape[1], dtype=torch.float64)
    terms = cls * (t[:, None] - one_hot) - md * (t - s)[:, None]  # (S, labels, M)
    wanted = alpha[:, :, None] * terms / slopes.shape[1]
    apart = (slopes[:, :, None] - wanted[:, None]).abs().amax((0, 3))  # (B, labels)
    return float(apart.min(1).values.max())


@check("fedftg", refines=True, without="A teacher that has never seen a class decides what its samples look like.")
def fedftg_class_weights_per_sample(subject: Subject) -> Verdict:
    """L_cls = ``sum_k mean_b alpha_k^{y_b} CE(t_k, y_b)``: the weights act sample by sample, not as a mean."""
    subject = subject.where(lambda_md=0.0, lambda_cls=1.0)
    apart = explained(*generator_slopes(subject), cls=1.0, md=0.0)
    return Verdict(apart < 1e-9, f"gradients at the teachers' logits: largest difference {apart:.2g}")


@check(
    "fedftg",
    refines=True,
    without="The generator mines something else than hard samples, or the terms are weighted otherwise than said.",
)
def fedftg_generator_loss_by_hand(subject: Subject) -> Verdict:
    """The gradient of ``lambda_cls L_cls - lambda_md sum_k alpha_k^y KL(s || t_k)`` at the teachers' logits."""
    subject = subject.where(lambda_md=0.7, lambda_cls=1.3)
    apart = explained(*generator_slopes(subject), cls=1.3, md=0.7)
    return Verdict(apart < 1e-9, f"gradients at the teachers' logits: largest difference {apart:.2g}")


@check("fedftg", refines=True, without="The student learns from the loss that is there to find what it does not know.")
def fedftg_student_rests_in_the_generator_phase(subject: Subject) -> Verdict:
    """With a student's rate of 1e-300 its weights are what they were after the round; with a usual one they are not."""
    subject = input_level(subject)
    still = scene(subject.where(lr_student=1e-300, weight_decay_student=0.0).near(generator_steps=3))
    moving = scene(subject.near(lr_student=0.1))
    student = still.problem.initial.params
    return all_of(
        agree(still.refine().weights.params, student, 1e-250, "weights at rate 1e-300"),
        differ(moving.refine().weights.params, student, "weights at the usual rate", 1e-6),
    )


@check(
    "fedftg", refines=True, without="The generator, or the statistics of its BatchNorm, follow the student's batches."
)
def fedftg_generator_rests_in_the_student_phase(subject: Subject) -> Verdict:
    """After one iteration the generator, BatchNorm included, is the same bits for 1 and for 4 student steps."""
    subject = input_level(subject)
    ends = [scene(subject.where(iterations=1, student_steps=steps)).refine().state for steps in (1, 4)]
    idle = scene(subject.where(iterations=1, generator_steps=0)).refine().state
    if not ends[0]:
        raise DoesNotApply("it keeps no generator")
    return all_of(
        agree(ends[0], ends[1], 0, "generator"), differ(ends[0], idle, "generators with and without a step of its own")
    )


@check(
    "fedftg",
    refines=True,
    without="A comparison with the unrefined method shows a difference that is not the refinement's.",
)
def fedftg_without_iterations_is_its_base(subject: Subject) -> Verdict:
    """With no iterations the fused model comes back, to the bit; with one it does not."""
    idle, working = scene(subject.where(iterations=0)), scene(subject.near(iterations=1))
    student = idle.problem.initial
    changed = mismatch(working.refine().weights, student)[1]
    return all_of(
        agree(idle.refine().weights, student, 0, "without iterations"),
        Verdict(changed > 0, f"with one iteration it differs by {changed:.2g}"),
    )
