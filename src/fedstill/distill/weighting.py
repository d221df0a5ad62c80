"""Whose word counts how much: class shares and the target that the teachers make together."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

TeacherWeights = Literal["label", "class", "uniform", "logits"]


def class_shares(counts: Tensor, epsilon: float = 0.0) -> Tensor:
    """Return ``a_k^y = n_k^y / sum_i n_i^y`` (FedFTG Eq. 10).

    Parameters
    ----------
    counts : Tensor
        n_k^y, (teachers, classes).
    epsilon : float
        Added to the denominator; the released FedFTG code has 1e-6.

    Returns
    -------
    Tensor
        float64 (teachers, classes); the columns sum to one, those of absent classes to zero.
    """
    total = counts.sum(0, dtype=torch.float64)
    shares = counts.double() / (total + epsilon)
    return torch.where(total > 0, shares, torch.zeros_like(shares))


def sample_weights(shares: Tensor, labels: Tensor, kind: TeacherWeights) -> Tensor:
    """Return the weight of every teacher on every sample, (teachers, batch).

    ``uniform`` and ``logits`` give 1/S. ``label`` and ``class`` give a_k^y of the sample's label; a label that
    nobody in the cohort holds has weight 0.
    """
    if kind in ("uniform", "logits"):
        return shares.new_full((shares.shape[0], labels.shape[0]), 1.0 / shares.shape[0])
    return shares[:, labels]


def mixture(logits: Tensor, shares: Tensor, labels: Tensor, kind: TeacherWeights) -> Tensor:
    """Return the teachers' joint distribution q, (batch, classes).

    Parameters
    ----------
    logits : Tensor
        (teachers, batch, classes).
    shares : Tensor
        a_k^c, (teachers, classes).
    labels : Tensor
        (batch,); used by ``label`` alone.
    kind : {"label", "class", "uniform", "logits"}
        ``label``: ``q = sum_k a_k^y p_k``; ``class``: ``q_c`` proportional to ``sum_k a_k^c p_k(c)``;
        ``uniform``: ``q = mean_k p_k``; ``logits``: ``q = softmax(mean_k t_k)`` (FedDF).
    """
    if kind == "logits":
        return logits.mean(0).softmax(-1)
    probabilities = logits.softmax(-1)
    if kind == "class":
        mass = (shares.to(probabilities)[:, None, :] * probabilities).sum(0)
        return mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    weights = sample_weights(shares, labels, kind).to(probabilities)
    return (weights[..., None] * probabilities).sum(0)
