"""A refinement that cannot hurt: the refined model is kept only where it wins on held-out samples.

With ``accept = "clients"`` the fused and the refined model both go to the round's cohort, every client counts the
right answers of both on its own held-out part, and the server keeps the refined model only where it wins by more than
``accept_margin``; with ``"server"`` the same on the server's validation samples. That clients accept or reject an
update of the global model is BaFFLe's idea (Andreina et al., ICDCS 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from fedstill.data.dataset import Samples
from fedstill.models.stateless import Stateless
from fedstill.payload import Kind, Payload, model_payload
from fedstill.settings import Settings
from fedstill.weights import Weights


class RefinementSettings(Settings):
    """``[refinement]``: when a refined model is kept."""

    accept: Literal["always", "clients", "server"] = "always"
    """always; or only where it beats the fused model on the cohort's held-out samples (clients; needs
    data.client_validation), or on the server's (server; needs data.server_validation)."""
    accept_margin: float | None = Field(None, ge=0, le=1)
    """By how much accuracy it must win; by default one standard error of the paired difference."""


@dataclass(frozen=True)
class Verdict:
    """How a paired comparison ended: samples that only the refined, or only the fused model gets right."""

    gained: int
    lost: int
    samples: int
    margin: float | None

    @property
    def gain(self) -> float:
        """Difference of the accuracies."""
        return (self.gained - self.lost) / max(self.samples, 1)

    @property
    def standard_error(self) -> float:
        """Standard error of the paired difference, whose values are -1, 0 and 1."""
        spread = (self.gained + self.lost) / max(self.samples, 1) - self.gain**2
        return math.sqrt(max(spread, 0.0) / max(self.samples, 1))

    @property
    def accepted(self) -> bool:
        """Whether the refined model wins by more than the margin."""
        return self.gain > (self.standard_error if self.margin is None else self.margin)

    def record(self) -> dict[str, float]:
        """Return the verdict for the metrics file."""
        return {
            "accepted": float(self.accepted),
            "accept_gain": self.gain,
            "accept_standard_error": self.standard_error,
            "accept_samples": float(self.samples),
        }


@dataclass(frozen=True)
class Hearing:
    """Fused against refined, on the same samples."""

    model: Stateless
    fused: Weights
    refined: Weights
    batch_size: int

    def verdict(self, parts: Sequence[Samples], margin: float | None) -> Verdict:
        """Compare the two models on some sets of samples; nobody asked means not accepted."""
        counted = torch.stack([self.count(part) for part in parts]) if parts else torch.zeros(1, 3, dtype=torch.int64)
        gained, lost, samples = (int(value) for value in counted.sum(0))
        return Verdict(gained, lost, samples, margin)

    @torch.no_grad()
    def count(self, samples: Samples) -> Tensor:
        """Return what one client answers: right for the refined model only, for the fused only, samples (3,)."""
        gained = lost = 0
        for x, y in zip(torch.split(samples.x, self.batch_size), torch.split(samples.y, self.batch_size), strict=True):
            before, after = (
                self.model(weights.params, weights.buffers, x, train=False).argmax(-1) == y
                for weights in (self.fused, self.refined)
            )
            gained += int((after & ~before).sum())
            lost += int((before & ~after).sum())
        return torch.tensor([gained, lost, len(samples)], dtype=torch.int64)

    def traffic(self, clients: int) -> tuple[list[Payload], list[Payload]]:
        """Return what goes down to, and comes up from, the clients that are asked: both models, and three counts."""
        down = [model_payload(self.fused), model_payload(self.refined)] * clients
        up = [Payload({Kind.SCALARS: {"verdict": torch.zeros(3, dtype=torch.int64)}})] * clients
        return down, up
