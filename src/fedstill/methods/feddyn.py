"""FedDyn: a regulariser that moves with every client's past, so that local and pooled optima agree.

Method card
-----------
Paper
    Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama, "Federated Learning Based on Dynamic
    Regularization", ICLR 2021.
Client
    Minimises ``F_k(w) + alpha_k <w, h_k - w_t> + alpha_k/2 ||w||^2`` from ``w_t``, the cloud model:
    ``w <- w - eta_t (clip(grad CE + alpha_k (h_k - w_t)) + (alpha_k + lambda) w)``, then
    ``h_k <- h_k + (w_k - w_t)``, which it keeps. The paper writes ``-grad L_k(w_k) = alpha_k h_k``.
Server
    ``h <- h + (1/K) sum_S (w_k - w_t)``, then ``w_{t+1} = mean_S w_k + h``: the mean is uniform, the difference is
    inside the sum, K counts all clients. Invariant: ``h = (1/K) sum_k h_k``. BatchNorm buffers are averaged over S.
Travels
    Down w_t and the number alpha_k, up w_k: as FedAvg; h_k never leaves its client.
Which optimum
    ``client_weights = "samples"`` (default): alpha_k = alpha / omega_k, omega_k = n_k K / sum n, the fixed point is
    the optimum of the pooled data. ``"uniform"``: alpha_k = alpha, the paper's form, whose fixed point is the optimum
    of mean_k f_k.
Defaults
    ``alpha = 0.01``, the released code's for CIFAR-10, and the FedFTG code's; the paper tunes it for each data set.
    The clip of 10 (``local.clip_norm``) is the released code's too: the linear term is inside it, the quadratic term
    is weight decay outside it. With few clients in a round the linear term can diverge without a clip.
Under a refinement
    w_t is the model that was sent down, the refined one, for the objective, for h_k and for h. The FedFTG code does
    the same, so there is nothing to choose.
Deviation
    The released code never measures the cloud model: it reports ``sel`` and ``all``. Here ``fused`` is the cloud
    model, the one that travels; ``eval.models = ["sel", "all"]`` measures the others, averaged uniformly.
Class-weighted head
    ``fusion.head = "class-weighted"`` averages the head rows in ``mean_S w_k``; rows of classes that nobody in the
    cohort holds stay those of w_t, which hold h already. The fixed point is then no longer promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from fedstill.methods.averaging import FusionSettings, label_counts, merge
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
from fedstill.settings import Settings
from fedstill.training import Trained
from fedstill.weights import State, Tensors, Weights, weighted_sum, zeros_like


class FedDynSettings(Settings):
    """``[feddyn]``."""

    alpha: float = Field(0.01, gt=0)
    """Weight of the dynamic regulariser, alpha."""
    client_weights: ClientWeights = "samples"
    """alpha_k = alpha / omega_k, omega_k = n_k K / sum n (optimum of the pooled data), or alpha (the paper: optimum
    of the clients' mean)."""


class FedDynObjective(LocalObjective):
    """Cross-entropy plus the dynamic regulariser, whose alpha_k the server sends."""

    def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
        """Return ``alpha_k (h_k - w_t)``."""
        alpha, sent = received.scalar("alpha"), received[Kind.WEIGHTS]
        own = state.get("h") or zeros_like(sent)
        return {"linear": {name: alpha * (own[name] - value) for name, value in sent.items()}}

    def adjust(self, grads: list[Tensor], params: Tensors, extras: State) -> list[Tensor]:
        """Add ``alpha_k (h_k - w_t)``."""
        return list(torch._foreach_add(grads, [extras["linear"][name] for name in params]))

    def extra_weight_decay(self, received: Payload, task: LocalTask) -> float:
        """Return alpha_k, for the quadratic term."""
        return received.scalar("alpha")

    def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
        """Return ``w_k``; keep ``h_k + (w_k - w_t)``."""
        moved = _displacement(trained.weights.params, received[Kind.WEIGHTS])
        own = state.get("h") or zeros_like(moved)
        return model_payload(trained.weights), {"h": {name: own[name] + value for name, value in moved.items()}}


@dataclass(frozen=True)
class FedDynFusion:
    """The uniform mean of the cohort, moved by the mean of all clients' h_k."""

    settings: FedDynSettings
    fusion: FusionSettings = field(default_factory=FusionSettings)
    client_weights: ClientWeights = "uniform"
    across_architectures: bool = False

    @property
    def needs_label_counts(self) -> bool:
        """True for the class-weighted head."""
        return self.fusion.head == "class-weighted"

    def start(self, weights: Weights, info: FederationInfo) -> ServerState:
        """Return the initial model and h = 0."""
        return ServerState(weights, {"h": zeros_like(weights.params)})

    def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
        """Send w_t and alpha_k."""
        omega = info.omega(client) if self.settings.client_weights == "samples" else 1.0
        return model_payload(server.weights).also(Kind.SCALARS, scalars(alpha=self.settings.alpha / omega))

    def upload_like(self, server: ServerState) -> Payload:
        """Expect a model."""
        return model_payload(server.weights)

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        """Return ``mean_S w_k + h`` and ``h + (1/K) sum_S (w_k - w_t)``."""
        sent, info = server.weights.params, context.info
        moved = [_displacement(upload.weights.params, sent) for upload in uploads]
        h = {
            name: old + weighted_sum([one[name] for one in moved], [1.0 / info.size] * len(moved))
            for name, old in server.method["h"].items()
        }
        mean = merge(uploads, "uniform", self.fusion.head, server.weights, info)
        cloud = {name: value + h[name] for name, value in mean.params.items()}
        if self.needs_label_counts:
            held = label_counts(uploads).sum(0) > 0
            for name in (f"{info.head}.weight", f"{info.head}.bias"):
                if name in cloud:
                    cloud[name][~held] = sent[name][~held]
        return ServerState(Weights(cloud, mean.buffers), {"h": h})


def _displacement(params: Tensors, sent: Tensors) -> Tensors:
    return {name: params[name] - value for name, value in sent.items()}
