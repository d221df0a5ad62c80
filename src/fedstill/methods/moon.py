"""MOON: a contrastive term pulls the features to the global model's and away from the client's own old ones.

Method card
-----------
Paper
    Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021.
Client
    Minimises ``CE + mu l_con``, ``l_con = -log(e_glob / (e_glob + sum_prev e_prev))`` averaged over the batch, with
    ``e_m = exp(cos(z, z_m) / tau)``. z are the features of the model being trained, z_glob those of the model it
    received, z_prev those of its own last uploads; the last two are frozen and in eval mode. It keeps its last
    ``previous_models`` uploads, BatchNorm buffers too; those of a client that was absent are as old as they are.
    At the first participation there is none, and l_con is exactly 0.
Server, travels
    As FedAvg.
Features
    The input of the model's last linear layer. With ``model.projection = 256`` that is the paper's projection head;
    without it, the features themselves, as in the FedFTG code. The projection is a part of the model: in a
    comparison every method gets the same model, with it or without.
Defaults
    ``mu = 5``, the paper's and the released code's for CIFAR-10 (1 for CIFAR-100 and Tiny-ImageNet), ``tau = 0.5``.
    They train with lr 0.01, momentum 0.9, weight decay 1e-5, no clip, no decay, batch 64 and 10 epochs, and drop the
    last smaller batch; those are keys of ``[local]``.
Deviation of the FedFTG code
    ``mode = "code"``: mu 0.5 and tau 5, which look exchanged.
Cost
    A step runs each frozen model once on its batch, beside the model being trained: augmentation changes the images
    from epoch to epoch, so that nothing can be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedstill.methods.base import LocalObjective, LocalTask
from fedstill.models.stateless import Stateless
from fedstill.payload import Payload, model_payload
from fedstill.settings import ModedSettings
from fedstill.training import Trained
from fedstill.weights import State, Tensors

MODES: dict[str, dict[str, object]] = {"paper": {"mu": 5.0, "tau": 0.5}, "code": {"mu": 0.5, "tau": 5.0}}

ZERO_NORM = 1e-8
"""Features shorter than this count as this long: those of a sample whose units are all dead have no direction."""


class MoonSettings(ModedSettings):
    """``[moon]``."""

    MODES: ClassVar[dict[str, dict[str, object]]] = MODES

    mode: Literal["paper", "code"] = "paper"
    """Sets the two keys below that are not given: the paper's values for CIFAR-10 or the FedFTG code's."""
    mu: float = Field(5.0, ge=0)
    """Weight of the contrastive term, mu."""
    tau: float = Field(0.5, gt=0)
    """Temperature, tau."""
    previous_models: int = Field(1, ge=1)
    """How many of its last uploads a client keeps as negatives; the paper has 1."""


@dataclass(frozen=True)
class MoonObjective(LocalObjective):
    """Cross-entropy plus ``mu l_con``."""

    settings: MoonSettings
    needs_head = True

    def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
        """Stack the frozen models, the global one first; nothing where l_con is 0 in any case."""
        if "previous" not in state or not self.settings.mu:
            return {}
        sent = received.weights()
        return {
            "frozen": _stacked(sent.params, state["previous"]),
            "frozen-buffers": _stacked(sent.buffers, state["previous-buffers"]),
        }

    def loss(self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State) -> Tensor:
        """Return ``CE + mu l_con``, means over the batch."""
        if "frozen" not in extras:
            return super().loss(model, params, buffers, x, y, extras)
        logits, z = model.with_features(params, buffers, x, train=True)
        with torch.no_grad():
            frozen = [frozen_features(model, extras, place, x) for place in range(_models_in(extras["frozen"]))]
        return F.cross_entropy(logits, y) + self.settings.mu * contrastive(z, frozen, self.settings.tau)

    def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
        """Return ``w_k``; keep it on top of those before it, ``previous_models`` in all."""
        own, older = trained.weights, self.settings.previous_models - 1
        return model_payload(own), {
            "previous": _stacked(own.params, _newest(state.get("previous", {}), older)),
            "previous-buffers": _stacked(own.buffers, _newest(state.get("previous-buffers", {}), older)),
        }


def contrastive(z: Tensor, frozen: Sequence[Tensor], tau: float) -> Tensor:
    """Return l_con for features (B, D) and those of the frozen models, of which the first is the global one."""
    z = F.normalize(z, dim=-1, eps=ZERO_NORM)
    cosines = [(z * F.normalize(other, dim=-1, eps=ZERO_NORM)).sum(-1) for other in frozen]
    return -(torch.stack(cosines, -1) / tau).log_softmax(-1)[..., 0].mean()


def frozen_features(model: Stateless, extras: State, place: int, x: Tensor) -> Tensor:
    """Return the features (B, D) of one of the frozen models, in eval mode."""
    params = {name: value[place] for name, value in extras["frozen"].items()}
    buffers = {name: value[place] for name, value in extras["frozen-buffers"].items()}
    return model.with_features(params, buffers, x, train=False)[1]


def _stacked(model: Tensors, others: Tensors) -> Tensors:
    """Return a model on top of a stack of others (models, ...), which may be empty."""
    return {name: torch.cat([value[None], others.get(name, value[None][:0])]) for name, value in model.items()}


def _newest(stack: Tensors, number: int) -> Tensors:
    return {name: value[:number] for name, value in stack.items()}


def _models_in(stack: Tensors) -> int:
    return len(next(iter(stack.values())))
