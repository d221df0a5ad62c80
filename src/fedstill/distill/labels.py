"""Labels for generated samples."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

LabelSampling = Literal["sampled", "stratified", "uniform"]


def draw_labels(
    kind: LabelSampling, counts: Tensor, iterations: int, batch_size: int, generator: torch.Generator
) -> Tensor:
    """Return the labels of every iteration, int64 (iterations, batch_size), on the generator's device.

    Parameters
    ----------
    kind : {"sampled", "stratified", "uniform"}
        ``sampled``: y ~ p_t, proportional to ``sum_k n_k^y`` (FedFTG Eq. 9). ``stratified``: the released
        code's fixed counts, shuffled. ``uniform``: over all classes.
    counts : Tensor
        n_k^y of the cohort, (clients, classes).
    """
    total = counts.sum(0)
    number = iterations * batch_size
    device = generator.device
    if kind == "uniform":
        labels = torch.randint(len(total), (number,), generator=generator, device=device)
    elif kind == "sampled":
        shares = (total.double() / total.sum()).to(device)
        labels = torch.multinomial(shares, number, replacement=True, generator=generator)
    else:
        ordered = torch.repeat_interleave(torch.arange(len(total)), stratified_counts(total, number))
        labels = ordered.to(device)[torch.randperm(number, generator=generator, device=device)]
    return labels.view(iterations, batch_size)


def stratified_counts(total: Tensor, number: int) -> Tensor:
    """Return how many of ``number`` labels each class gets in the released code.

    Class boundaries are ``floor(cumsum(N / sum N) * number)`` in float64 and the last class takes the rest, so an
    absent last class can get one label by rounding.
    """
    shares = total.numpy() / total.sum().item()
    ends = np.floor(np.cumsum(shares) * number).astype(np.int64)
    ends[-1] = number
    return torch.from_numpy(np.diff(ends, prepend=0))
