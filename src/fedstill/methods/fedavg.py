"""FedAvg: local SGD and the sample-weighted average.

Method card
-----------
Paper
    McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks
    from Decentralized Data", AISTATS 2017.
Client
    ``w <- w - eta_t * (clip(grad CE) + lambda * w)`` for E epochs from the broadcast model.
Server
    ``w_{t+1} = sum_k n_k w_k / sum_k n_k`` over the cohort. Integer buffers are truncated.
Travels
    Down w, up w. With ``fusion.head = "class-weighted"`` also the M label counts, once.
Defaults
    Those of the FedFTG paper's experiments (clip 10, weight decay 1e-3 after the clip, lr 0.1 * 0.998^t).
Server momentum
    ``fusion.server_momentum`` is FedAvgM's beta (Hsu, Qi, Brown, arXiv 1909.06335, 2019): with W the average above,
    ``v <- beta v + (w_t - W)``, ``w_{t+1} = w_t - v``. ``w_t`` is the model that was sent down, after any refinement;
    v starts at 0 and stays on the server. Buffers are averaged without momentum.
Class-weighted head
    ``fusion.head = "class-weighted"`` is not McMahan's: row c of the last layer is averaged with the clients'
    shares of class c. Its pieces are known: HeteroFL (ICLR 2021) averages output rows over the clients that
    hold the class, FedNH (AAAI 2023) moves head rows by count-weighted class means, cwFedAvg (ICCV 2025)
    averages heads per class for personalised models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedstill.methods.averaging import FusionSettings, merge
from fedstill.methods.base import ClientWeights, FederationInfo, LocalObjective, RoundContext, ServerState, Upload
from fedstill.payload import Payload, model_payload
from fedstill.weights import Weights, zeros_like


class FedAvgObjective(LocalObjective):
    """Cross-entropy by SGD, nothing kept, the model uploaded."""


@dataclass(frozen=True)
class FedAvgFusion:
    """The weighted average; its only state is the server's velocity, where there is momentum."""

    settings: FusionSettings = field(default_factory=FusionSettings)
    across_architectures: bool = False

    @property
    def client_weights(self) -> ClientWeights:
        """n_k, or the same for all."""
        return self.settings.client_weights

    @property
    def needs_label_counts(self) -> bool:
        """True for the class-weighted head."""
        return self.settings.head == "class-weighted"

    def start(self, weights: Weights, info: FederationInfo) -> ServerState:
        """Return the initial model, at rest."""
        return ServerState(weights, {"velocity": zeros_like(weights.params)} if self.settings.server_momentum else {})

    def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
        """Send the global model."""
        return model_payload(server.weights)

    def upload_like(self, server: ServerState) -> Payload:
        """Expect a model."""
        return model_payload(server.weights)

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        """Return ``sum_k n_k w_k / sum_k n_k``, or the step towards it that momentum makes of it."""
        keys, old = self.settings, server.weights
        mean = merge(uploads, keys.client_weights, keys.head, old, context.info)
        if not keys.server_momentum:
            return ServerState(mean)
        velocity = {
            name: keys.server_momentum * value + (old.params[name] - mean.params[name])
            for name, value in server.method["velocity"].items()
        }
        moved = {name: old.params[name] - value for name, value in velocity.items()}
        return ServerState(Weights(moved, mean.buffers), {"velocity": velocity})
