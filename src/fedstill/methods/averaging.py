"""The average of the clients' models that every weight-sharing method builds on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedstill.distill.weighting import class_shares
from fedstill.errors import InputError
from fedstill.methods.base import ClientWeights, FederationInfo, Upload
from fedstill.settings import Settings
from fedstill.weights import Weights, weighted_mean


class FusionSettings(Settings):
    """``[fusion]``: how the clients' models are averaged."""

    head: Literal["mean", "class-weighted"] = "mean"
    """How the rows of the last linear layer are averaged: like every other weight, or row c by the clients'
    shares of class c (needs the clients' label counts)."""
    client_weights: ClientWeights = "samples"
    """Weights of FedAvg's, FedProx's and MOON's average: n_k, or the same for all."""
    server_momentum: float = Field(0.0, ge=0, lt=1)
    """FedAvgM's beta, for the methods that average as FedAvg does; 0 is the plain average."""


def merge(
    uploads: Sequence[Upload], client_weights: ClientWeights, head: str, received: Weights, info: FederationInfo
) -> Weights:
    """Return the weighted mean of the uploads, with the head averaged as ``head`` says.

    The *class-weighted head* replaces row c of the last linear layer, weight and bias, by
    ``sum_k a_k^c`` times the clients' rows, ``a_k^c = n_k^c / sum_j n_j^c`` over the cohort; a class that
    nobody in the cohort holds keeps the row of ``received``, the model that was sent down.
    """
    weights = [float(upload.samples) if client_weights == "samples" else 1.0 for upload in uploads]
    mean = weighted_mean([upload.weights for upload in uploads], weights)
    if head == "mean":
        return mean
    if info.head is None:
        raise InputError("fusion.head = 'class-weighted' needs a model with a linear head: name it with model.head")
    shares = class_shares(label_counts(uploads))
    params = dict(mean.params)
    for part in ("weight", "bias"):
        name = f"{info.head}.{part}"
        if name in params:
            params[name] = _rows_by_class(
                [upload.weights.params[name] for upload in uploads], shares, received.params[name]
            )
    return Weights(params, mean.buffers)


def label_counts(uploads: Sequence[Upload]) -> Tensor:
    """Return n_k^y of the cohort as an int64 tensor (clients, classes)."""
    missing = [upload.client for upload in uploads if upload.label_counts is None]
    if missing:
        raise InputError(f"client {missing[0]} has not sent its label counts, which the method needs")
    return torch.stack([upload.label_counts for upload in uploads if upload.label_counts is not None])


def _rows_by_class(rows: Sequence[Tensor], shares: Tensor, received: Tensor) -> Tensor:
    stacked = torch.stack([row.double() for row in rows])  # (clients, classes, ...)
    weights = shares.to(stacked).reshape(*shares.shape, *[1] * (stacked.dim() - 2))
    held = shares.sum(0).to(stacked.device) > 0
    merged = (stacked * weights).sum(0).to(received.dtype)
    return torch.where(held.reshape(-1, *[1] * (received.dim() - 1)), merged, received)
