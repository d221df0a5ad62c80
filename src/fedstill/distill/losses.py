"""The losses of distillation; every one is a function of logits, weights and batches."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

StudentLoss = Literal["kl-student-teacher", "kl-teacher-student", "mse"]
Discrepancy = Literal["kl-student-teacher", "kl-teacher-student", "l1-logits", "mse"]
Reduction = Literal["batch", "batch-classes"]


def kl(left_logits: Tensor, right_logits: Tensor) -> Tensor:
    """Return ``KL(softmax left || softmax right)`` over the last dimension; the others broadcast."""
    log_left = left_logits.log_softmax(-1)
    return (log_left.exp() * (log_left - right_logits.log_softmax(-1))).sum(-1)


def soft_cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    """Return ``-sum_c q_c log softmax(s)_c`` per sample: KL(q || s) up to the entropy of q."""
    return -(target * student.log_softmax(-1)).sum(-1)


def student_loss(
    student: Tensor, teachers: Tensor, weights: Tensor, target: Tensor, kind: StudentLoss, reduction: Reduction
) -> Tensor:
    """Return what the student minimises: L_md of FedFTG (Eq. 4) and its exchanges.

    Parameters
    ----------
    student : Tensor
        (batch, classes) logits.
    teachers : Tensor
        (teachers, batch, classes) logits.
    weights : Tensor
        (teachers, batch).
    target : Tensor
        (batch, classes), the teachers' mixture q.
    kind : str
        ``kl-student-teacher`` (the paper): ``sum_k a_k KL(s || t_k)``. ``kl-teacher-student`` (the released
        code): cross-entropy against q. ``mse``: ``sum_k a_k ||softmax s - softmax t_k||^2``.
    reduction : {"batch", "batch-classes"}
        Mean over the batch, or also over the classes (1/M).
    """
    if kind == "kl-teacher-student":
        per_sample = soft_cross_entropy(student, target)
    elif kind == "kl-student-teacher":
        per_sample = (weights * kl(student, teachers)).sum(0)
    else:
        per_sample = (weights * (student.softmax(-1) - teachers.softmax(-1)).square().sum(-1)).sum(0)
    return per_sample.mean() / (student.shape[-1] if reduction == "batch-classes" else 1)


def discrepancy(student: Tensor, teachers: Tensor, weights: Tensor, target: Tensor, kind: Discrepancy) -> Tensor:
    """Return how far the student is from each teacher, weighted, (teachers,), which hard-sample mining raises.

    ``l1-logits`` is the released code's: mean over classes, no gradient to the teachers. For
    ``kl-teacher-student`` there is one term, against the mixture ``target``.
    """
    if kind == "kl-teacher-student":
        log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log()
        return (target * (log_target - student.log_softmax(-1))).sum(-1).mean()[None]
    if kind == "kl-student-teacher":
        per_sample = kl(student, teachers)
    elif kind == "l1-logits":
        per_sample = (student - teachers.detach()).abs().mean(-1)
    else:
        per_sample = (student.softmax(-1) - teachers.softmax(-1)).square().sum(-1)
    return (weights * per_sample).mean(-1)


def classification(teachers: Tensor, labels: Tensor, weights: Tensor, per_sample: bool) -> Tensor:
    """Return L_cls for each teacher, (teachers,): do the teachers see the label in what was generated for it?

    ``per_sample``: ``mean_b a_k^{y_b} CE(t_k(x_b), y_b)`` (the paper). Otherwise the released code's product
    of two means, ``mean_b CE * mean_b a_k^{y_b}``, in which the weights no longer act on their samples.
    """
    count = teachers.shape[0]
    flat = F.cross_entropy(teachers.flatten(0, 1), labels.repeat(count), reduction="none").view(count, -1)
    return (weights * flat).mean(-1) if per_sample else flat.mean(-1) * weights.mean(-1)


def diversity(x: Tensor, z: Tensor) -> Tensor:
    """Return L_dis, in (0, 1]: 1 when all generated samples are equal, less the more they spread.

    ``exp(-mean_ij( mean_d |x_i - x_j| * mean_d (z_i - z_j)^2 ))`` over all ordered pairs, i = j included: the
    released code's normalised distances, since the paper's Eq. 7 underflows to 0 for images.
    """
    flat = x.flatten(1)
    apart = torch.cdist(flat, flat, p=1) / flat.shape[1]
    noise = (z[:, None] - z[None]).square().mean(-1)
    return torch.exp(-(apart * noise).mean())
