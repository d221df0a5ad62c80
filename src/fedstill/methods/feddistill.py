"""FedDistill and FedDistill+: clients share their mean logits by label.

Method card
-----------
Paper
    Jeong, Oh, Kim, Park, Bennis, Kim, "Communication-Efficient On-Device Machine Learning: Federated Distillation and
    Augmentation under Non-IID Private Data", 2018 (federated distillation), in the form that FedGen's authors
    compare with (Zhu, Hong, Zhou, ICML 2021); FedDistill+ is theirs.
Client
    ``min_w F_k(w) + lambda_kl E_{(x, y)} KL(softmax(t_y) || p_w(x))`` by SGD, t_y the global mean logits of label y.
    Every step's logits are added to running sums by label; uploads ``s_k^y / c_k^y``, their means.
    Round 0 has no t and is plain training.
Server
    ``t_y = mean_k s_k^y / c_k^y`` over the cohort.
Travels
    M x M logits each way (down from round 1 on). ``share = "weights"``, FedDistill+, also averages the models and
    sends them both ways, as FedAvg.
State
    Each client keeps its sums over all its rounds and, where the model does not travel, its model: then models may be
    of any architectures.
Deviation
    Jeong et al. count anew each round and leave a client's own logits out of the mean that it learns from; this is
    the later code: counts start at 1 and are never reset, all clients learn from one mean, and one that has never
    seen a label counts with zeros. The code's FedDistill+ keeps BatchNorm statistics personal; here they are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedstill.distill.losses import kl
from fedstill.methods.averaging import FusionSettings
from fedstill.methods.base import (
    ClientWeights,
    FederationInfo,
    LocalObjective,
    LocalTask,
    RoundContext,
    ServerState,
    Upload,
)
from fedstill.methods.fedavg import FedAvgFusion
from fedstill.models.stateless import Stateless
from fedstill.payload import Kind, Payload, model_payload
from fedstill.settings import Settings
from fedstill.training import Trained
from fedstill.weights import State, Tensors, Weights, weighted_sum


class FedDistillSettings(Settings):
    """``[feddistill]``."""

    share: Literal["logits", "weights"] = "logits"
    """What travels: mean logits by label alone, every client's model its own; or the models too (FedDistill+)."""
    lambda_kl: float = Field(1.0, ge=0)
    """Weight of the distillation from the global logits."""


@dataclass(frozen=True)
class FedDistillObjective(LocalObjective):
    """Cross-entropy and distillation from the global logits of the sample's label."""

    settings: FedDistillSettings

    @property
    def personal(self) -> bool:
        """Whether models stay with their clients."""
        return self.settings.share == "logits"

    def own_model(self, received: Payload, state: State, initial: Weights) -> Weights:
        """Return the received model or, where none travels, the client's own; at first the initial one."""
        if not self.personal:
            return received.weights()
        if "params" not in state:
            return initial
        # In the model's own order, which a file does not keep.
        params = {name: state["params"][name] for name in initial.params}
        return Weights(params, {name: state["buffers"][name] for name in initial.buffers})

    def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
        """Keep the global logits for the steps, where there are any yet."""
        return {"targets": received[Kind.LOGITS]} if Kind.LOGITS in received else {}

    def loss(self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State) -> Tensor:
        """Return ``CE + lambda_kl KL(softmax(t_y) || p(x))``."""
        return self.loss_and_sums(model, params, buffers, x, y, extras)[0]

    def loss_and_sums(
        self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
    ) -> tuple[Tensor, Tensors]:
        """Return the loss, and the batch's logits and samples by label."""
        logits = model(params, buffers, x, train=True)
        loss = F.cross_entropy(logits, y)
        if "targets" in extras:
            targets = extras["targets"]["mean"].to(logits.dtype)
            loss = loss + self.settings.lambda_kl * kl(targets[y], logits).mean()
        by_label = torch.eye(logits.shape[1], dtype=torch.float64, device=logits.device)[y]
        return loss, {"logits": by_label.T @ logits.detach().double(), "counts": by_label.sum(0)}

    def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
        """Add to the running sums and upload their means; counts start at 1."""
        new = trained.sums
        old = state.get("seen") or {"logits": torch.zeros_like(new["logits"]), "counts": torch.ones_like(new["counts"])}
        seen = {name: old[name] + value for name, value in new.items()}
        means = {"mean": (seen["logits"] / seen["counts"][:, None]).float()}
        if self.personal:
            own = {"params": trained.weights.params, "buffers": trained.weights.buffers}
            return Payload({Kind.LOGITS: means}), {"seen": seen, **own}
        return model_payload(trained.weights).also(Kind.LOGITS, means), {"seen": seen}


@dataclass(frozen=True)
class FedDistillFusion:
    """The mean of the clients' mean logits and, for FedDistill+, FedAvg's average."""

    settings: FedDistillSettings
    fusion: FusionSettings = field(default_factory=FusionSettings)

    @property
    def across_architectures(self) -> bool:
        """True where logits alone travel."""
        return self.settings.share == "logits"

    @property
    def average(self) -> FedAvgFusion:
        """FedDistill+'s average of the models."""
        return FedAvgFusion(self.fusion)

    @property
    def client_weights(self) -> ClientWeights:
        """n_k, or the same for all."""
        return self.fusion.client_weights

    @property
    def needs_label_counts(self) -> bool:
        """True for the class-weighted head of an average."""
        return not self.across_architectures and self.average.needs_label_counts

    def start(self, weights: Weights, info: FederationInfo) -> ServerState:
        """Return the initial model, where it is shared, and no logits yet."""
        mean = torch.zeros(info.num_classes, info.num_classes)
        return ServerState(weights, {"logits": {"mean": mean}, "rounds": {"fused": torch.tensor(0)}})

    def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
        """Send the global logits, where there are any yet; for FedDistill+ also the model."""
        payload = self._model(server)
        known = int(server.method["rounds"]["fused"]) > 0
        return payload.also(Kind.LOGITS, server.method["logits"]) if known else payload

    def upload_like(self, server: ServerState) -> Payload:
        """Expect mean logits by label; for FedDistill+ also a model."""
        return self._model(server).also(Kind.LOGITS, server.method["logits"])

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        """Return the cohort's mean logits; for FedDistill+ also the averaged model."""
        found = [upload.payload[Kind.LOGITS]["mean"] for upload in uploads]
        mean = weighted_sum(found, [1 / len(found)] * len(found))
        method = {"logits": {"mean": mean}, "rounds": {"fused": server.method["rounds"]["fused"] + 1}}
        weights = server.weights if self.across_architectures else self.average.fuse(server, uploads, context).weights
        return ServerState(weights, method)

    def _model(self, server: ServerState) -> Payload:
        return Payload() if self.across_architectures else model_payload(server.weights)
