"""FedProx: FedAvg with a proximal term.

Method card
-----------
Paper
    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020.
Client
    Minimises ``F_k(w) + mu/2 ||w - w_t||^2``: the gradient gets ``mu (w - w_t)``, inside the clip.
Server, travels
    As FedAvg.
Defaults
    ``mu = 1e-4``, the FedDyn code's.
Deviation
    The FedFTG code only adds mu to the weight decay, which pulls to zero instead of to ``w_t``:
    ``fedprox.kind = "weight_decay_bug"`` does the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedstill.methods.base import LocalObjective, LocalTask
from fedstill.payload import Payload
from fedstill.settings import Settings
from fedstill.weights import State, Tensors


class FedProxSettings(Settings):
    """``[fedprox]``."""

    mu: float = Field(1e-4, ge=0)
    """Weight of the proximal term, mu."""
    kind: Literal["proximal", "weight_decay_bug"] = "proximal"
    """The paper's term, or the FedFTG code's larger weight decay."""


@dataclass(frozen=True)
class FedProxObjective(LocalObjective):
    """Cross-entropy plus ``mu/2 ||w - w_t||^2``."""

    settings: FedProxSettings

    def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
        """Keep w_t for the steps."""
        return {"anchor": received.weights().params} if self.settings.kind == "proximal" else {}

    def adjust(self, grads: list[Tensor], params: Tensors, extras: State) -> list[Tensor]:
        """Add ``mu (w - w_t)``."""
        if not extras or not self.settings.mu:
            return grads
        anchor = [extras["anchor"][name] for name in params]
        drift = torch._foreach_sub(list(params.values()), anchor)
        return list(torch._foreach_add(grads, drift, alpha=self.settings.mu))

    def extra_weight_decay(self, received: Payload, task: LocalTask) -> float:
        """Return mu for the bug's form."""
        return self.settings.mu if self.settings.kind == "weight_decay_bug" else 0.0
