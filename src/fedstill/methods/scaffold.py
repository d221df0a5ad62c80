"""SCAFFOLD: control variates correct the clients' drift.

Method card
-----------
Paper
    Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, "SCAFFOLD: Stochastic Controlled Averaging for Federated
    Learning", ICML 2020 (option II).
Client
    ``w <- w - eta_t (clip(grad f_k(w) - c_k + c / omega_k) + lambda w)`` for K_s steps, then
    ``c_k+ = c_k - c + (w_t - w_k) / (K_s eta_t)``; uploads ``w_k`` and ``c_k+ - c_k``, keeps ``c_k+``.
Server
    ``w <- w + eta_g (mean_S w_k - w)``, ``c <- c + (1/K) sum_S omega_k (c_k+ - c_k)``.
    Invariant: ``c = (1/K) sum_k omega_k c_k``.
Travels
    Down w and c, up w_k and the change of c_k: twice FedAvg each way.
Which optimum
    ``client_weights = "samples"`` (default): omega_k = n_k K / sum n, the fixed point is the optimum of the pooled
    data. ``"uniform"``: omega_k = 1, the paper's form, whose fixed point is the optimum of mean_k f_k.
Deviations of the FedDyn and FedFTG code, each with its switch
    * the denominator of c_k+ uses the undecayed eta_0: ``denominator_lr = "initial"``;
    * every client takes the same fixed number of steps: ``steps = "fixed"``;
    * with FedFTG on top, clients start from the refined model but measure their displacement from the model
      before refinement: ``displacement_from = "fused"``. The fused model then travels too, and is billed.
    ``mode = "code"`` sets all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedstill.methods.averaging import FusionSettings, merge
from fedstill.methods.base import (
    ClientWeights,
    FederationInfo,
    LocalObjective,
    LocalTask,
    RoundContext,
    ServerState,
    Upload,
)
from fedstill.payload import Kind, Payload, model_payload, scalars
from fedstill.settings import ModedSettings
from fedstill.training import Trained
from fedstill.weights import State, Tensors, Weights, weighted_sum, zeros_like

MODES: dict[str, dict[str, object]] = {
    "paper": {"denominator_lr": "current", "steps": "own", "displacement_from": "broadcast"},
    "code": {"denominator_lr": "initial", "steps": "fixed", "displacement_from": "fused"},
}


class ScaffoldSettings(ModedSettings):
    """``[scaffold]``."""

    MODES: ClassVar[dict[str, dict[str, object]]] = MODES

    mode: Literal["paper", "code"] = "paper"
    """Sets the three keys below that are not given: the paper's form or the FedFTG code's."""
    server_lr: float = Field(1.0, gt=0)
    """Global learning rate, eta_g."""
    client_weights: ClientWeights = "samples"
    """omega_k = n_k K / sum n (optimum of the pooled data), or 1 (the paper: optimum of the clients' mean)."""
    denominator_lr: Literal["current", "initial"] = "current"
    """Learning rate in the update of c_k: eta_t, or eta_0 as in the released code."""
    steps: Literal["own", "fixed"] = "own"
    """Local steps: each client's own epochs, or the same number for all as in the released code."""
    displacement_from: Literal["broadcast", "fused"] = "broadcast"
    """Model from which a client's displacement is measured: the one it started from, or the one before refinement."""


@dataclass(frozen=True)
class ScaffoldObjective(LocalObjective):
    """The corrected local steps and the update of c_k."""

    settings: ScaffoldSettings

    def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
        """Return ``c / omega_k - c_k``."""
        server, omega = received[Kind.CONTROL_VARIATE], received.scalar("omega")
        own = state.get("control") or zeros_like(server)
        return {"correction": {name: value / omega - own[name] for name, value in server.items()}}

    def adjust(self, grads: list[Tensor], params: Tensors, extras: State) -> list[Tensor]:
        """Add ``c / omega_k - c_k``."""
        return list(torch._foreach_add(grads, [extras["correction"][name] for name in params]))

    def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
        """Return ``w_k`` and ``c_k+ - c_k``; keep ``c_k+``."""
        server = received[Kind.CONTROL_VARIATE]
        own = state.get("control") or zeros_like(server)
        origin = received[Kind.REFERENCE] if Kind.REFERENCE in received else received[Kind.WEIGHTS]
        lr = task.lr if self.settings.denominator_lr == "current" else task.initial_lr
        scale = 1.0 / (max(trained.steps, 1) * lr)
        change = {name: (origin[name] - trained.weights.params[name]) * scale - value for name, value in server.items()}
        upload = model_payload(trained.weights).also(Kind.CONTROL_VARIATE, change)
        return upload, {"control": {name: value + change[name] for name, value in own.items()}}


@dataclass(frozen=True)
class ScaffoldFusion:
    """The averages of models and of control variates."""

    settings: ScaffoldSettings
    fusion: FusionSettings = field(default_factory=FusionSettings)
    refined: bool = True
    """Whether refinements follow; without any, the fused model is the one that is sent down anyway."""
    client_weights: ClientWeights = "uniform"
    across_architectures: bool = False

    @property
    def needs_label_counts(self) -> bool:
        """True for the class-weighted head."""
        return self.fusion.head == "class-weighted"

    def start(self, weights: Weights, info: FederationInfo) -> ServerState:
        """Return the initial model and c = 0."""
        return self._state(weights, zeros_like(weights.params))

    def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
        """Send w, c and omega_k; with ``displacement_from = "fused"`` also the model before refinement."""
        payload = model_payload(server.weights).also(Kind.CONTROL_VARIATE, server.method["control"])
        payload = payload.also(Kind.SCALARS, scalars(omega=self._omega(client, info)))
        return payload.also(Kind.REFERENCE, server.method["fused"]) if "fused" in server.method else payload

    def upload_like(self, server: ServerState) -> Payload:
        """Expect a model and the change of a control variate."""
        return model_payload(server.weights).also(Kind.CONTROL_VARIATE, server.method["control"])

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        """Return ``w + eta_g (W - w)`` and ``c + (1/K) sum_S omega_k (c_k+ - c_k)``, W the uniform mean."""
        info = context.info
        mean = merge(uploads, "uniform", self.fusion.head, server.weights, info)
        rate = self.settings.server_lr
        if rate != 1:
            params = {name: old + rate * (mean.params[name] - old) for name, old in server.weights.params.items()}
            mean = Weights(params, mean.buffers)
        shares = [self._omega(upload.client, info) / info.size for upload in uploads]
        control = {
            name: old + weighted_sum([upload.payload[Kind.CONTROL_VARIATE][name] for upload in uploads], shares)
            for name, old in server.method["control"].items()
        }
        return self._state(mean, control)

    def _state(self, weights: Weights, control: Tensors) -> ServerState:
        apart = self.refined and self.settings.displacement_from == "fused"
        fused = {"fused": weights.params} if apart else {}
        return ServerState(weights, {"control": control, **fused})

    def _omega(self, client: int, info: FederationInfo) -> float:
        return info.omega(client) if self.settings.client_weights == "samples" else 1.0


def fixed_steps(info: FederationInfo, batch_size: int, epochs: int) -> int:
    """Return the released code's steps per client: epochs times the batches of a client of average size."""
    return epochs * -(-sum(info.samples) // (len(info.samples) * batch_size))
