"""FedAvg, FedProx and training alone with a mistake: in their rounds, or in what any method can do wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedstill.client import Site
from fedstill.config import Config
from fedstill.conformance.wrong.registry import wrong
from fedstill.methods.alone import AloneFusion, AloneObjective
from fedstill.methods.base import (
    FederationInfo,
    LocalTask,
    RoundContext,
    ServerState,
    Turn,
    Upload,
)
from fedstill.methods.fedavg import FedAvgFusion, FedAvgObjective
from fedstill.methods.fedprox import FedProxObjective
from fedstill.models.stateless import Stateless
from fedstill.payload import Kind, Payload
from fedstill.training import Trained
from fedstill.weights import State, Tensors, Weights

# FedAvg, and what any method can do wrong


class InPlace(FedAvgFusion):
    """Adds up in the first upload's memory."""

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        """Return the right average, at the cost of an upload."""
        done = super().fuse(server, uploads, context)
        for name, value in uploads[0].weights.params.items():
            value.copy_(done.weights.params[name])
        return done


@wrong("fedavg", "inputs-not-changed")
def fedavg_in_place(config: Config) -> Any:
    """FedAvg that adds up in the memory of the first upload."""
    return FedAvgObjective(), InPlace(config.fusion)


@wrong("fedavg", "fedavg-rounds-by-hand", "agrees-with-reference-cases")
def fedavg_uniform(config: Config) -> Any:
    """FedAvg that averages uniformly instead of by n_k."""

    class Fusion(FedAvgFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            return super().fuse(server, [replace(upload, samples=1) for upload in uploads], context)

    return FedAvgObjective(), Fusion(config.fusion)


@wrong("fedavg", "order-of-uploads", "fedavg-rounds-by-hand")
def fedavg_weights_by_place(config: Config) -> Any:
    """FedAvg that weighs the i-th upload with the size of client i, whoever sent it."""

    class Fusion(FedAvgFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            sizes = context.info.samples
            moved = [replace(upload, samples=sizes[place]) for place, upload in enumerate(uploads)]
            return super().fuse(server, moved, context)

    return FedAvgObjective(), Fusion(config.fusion)


@wrong("fedavg", "fedavg-drifts")
def fedavg_one_step(config: Config) -> Any:
    """FedAvg whose clients take one step, whatever they are told: distributed SGD."""

    class Objective(FedAvgObjective):
        def run(self, site: Site) -> Turn:
            return super().run(replace(site, task=replace(site.task, steps=1)))

    return Objective(), FedAvgFusion(config.fusion)


@wrong("fedavg", "batchnorm-buffers")
def fedavg_drops_buffers(config: Config) -> Any:
    """FedAvg that averages parameters and leaves BatchNorm's statistics as they were at first."""

    class Fusion(FedAvgFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done = super().fuse(server, uploads, context)
            return replace(done, weights=Weights(done.weights.params, server.weights.buffers))

    return FedAvgObjective(), Fusion(config.fusion)


@wrong("fedavg", "batchnorm-buffers", "agrees-with-reference-cases")
def fedavg_last_clients_buffers(config: Config) -> Any:
    """FedAvg that takes BatchNorm's statistics from the last client."""

    class Fusion(FedAvgFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done = super().fuse(server, uploads, context)
            return replace(done, weights=Weights(done.weights.params, uploads[-1].weights.buffers))

    return FedAvgObjective(), Fusion(config.fusion)


@wrong("fedavg", "batchnorm-buffers")
def fedavg_float_counter(config: Config) -> Any:
    """FedAvg that makes a float of BatchNorm's batch counter."""

    class Fusion(FedAvgFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done = super().fuse(server, uploads, context)
            buffers = {name: value.double() for name, value in done.weights.buffers.items()}
            return replace(done, weights=Weights(done.weights.params, buffers))

    return FedAvgObjective(), Fusion(config.fusion)


@wrong("fedavg", "global-stream-untouched")
def fedavg_global_noise(config: Config) -> Any:
    """FedAvg that adds noise to its batches from PyTorch's global stream."""

    class Objective(FedAvgObjective):
        def loss(
            self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
        ) -> Tensor:
            return super().loss(model, params, buffers, x + 0.01 * torch.randn_like(x), y, extras)

    return Objective(), FedAvgFusion(config.fusion)


@wrong("fedavg", "same-bits-twice")
def fedavg_own_noise(config: Config) -> Any:
    """FedAvg with noise from a generator of its own that goes on from client to client."""
    stream = random.Random(0)

    class Objective(FedAvgObjective):
        def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
            return {"noise": {"size": torch.tensor(stream.random())}}

        def loss(
            self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
        ) -> Tensor:
            return super().loss(model, params, buffers, x * (1 + 0.01 * extras["noise"]["size"]), y, extras)

    return Objective(), FedAvgFusion(config.fusion)


@wrong("fedavg", "steps-batch-over-clients")
def fedavg_looks_at_values(config: Config) -> Any:
    """FedAvg whose loss decides by the value of a tensor, which cannot be batched."""

    class Objective(FedAvgObjective):
        def loss(
            self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
        ) -> Tensor:
            loss = super().loss(model, params, buffers, x, y, extras)
            return loss if loss.item() < 100 else loss * 0

    return Objective(), FedAvgFusion(config.fusion)


@wrong("fedavg", "survives-a-checkpoint")
def fedavg_counts_in_python(config: Config) -> Any:
    """FedAvg whose clients keep the number of their rounds as a Python number."""

    class Objective(FedAvgObjective):
        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, _ = super().finish(received, {}, trained, task)
            kept: Any = {"rounds": {"done": state["rounds"]["done"] + 1 if state else 1}}
            return payload, kept

    return Objective(), FedAvgFusion(config.fusion)


# FedProx


def fedprox(config: Config, objective: type[FedProxObjective] = FedProxObjective, **keys: Any) -> Any:
    """Return FedProx with its client's half or with keys exchanged."""
    return objective(config.fedprox.model_copy(update=keys)), FedAvgFusion(config.fusion)


@wrong("fedprox", "fedprox-pulls-to-what-was-sent", "fedprox-rounds-by-hand")
def fedprox_to_zero(config: Config) -> Any:
    """FedProx that pulls to zero instead of to w_t: weight decay."""

    class Objective(FedProxObjective):
        def adjust(self, grads: list[Tensor], params: Tensors, extras: State) -> list[Tensor]:
            return [grad + self.settings.mu * value for grad, value in zip(grads, params.values())]

    return fedprox(config, Objective)


@wrong("fedprox", "fedprox-rounds-by-hand")
def fedprox_twice_mu(config: Config) -> Any:
    """FedProx that forgets the 1/2 of ``mu/2 ||w - w_t||^2``."""
    return fedprox(config, mu=2 * config.fedprox.mu)


@wrong("fedprox", "fedprox-without-mu-is-fedavg")
def fedprox_mu_or_default(config: Config) -> Any:
    """FedProx that takes mu = 0 for a mu that was not given."""
    return fedprox(config, mu=config.fedprox.mu or 1e-4)


@wrong("fedprox", "traffic-as-in-the-papers")
def fedprox_sends_the_anchor(config: Config) -> Any:
    """FedProx that sends w_t a second time, as the anchor."""

    class Fusion(FedAvgFusion):
        def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
            return super().broadcast(server, client, info).also(Kind.REFERENCE, server.weights.params)

    return FedProxObjective(config.fedprox), Fusion(config.fusion)


@wrong("fedprox", "survives-the-wire")
def fedprox_lossy_mu(config: Config) -> Any:
    """FedProx whose server sends mu as a Python number."""

    class Fusion(FedAvgFusion):
        def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
            number: Any = {"mu": config.fedprox.mu}
            return super().broadcast(server, client, info).also(Kind.SCALARS, number)

    return FedProxObjective(config.fedprox), Fusion(config.fusion)


# Training alone


@wrong("alone", "alone-by-hand")
def alone_starts_anew(config: Config) -> Any:
    """Training alone that starts from the initial weights in every round."""

    class Objective(AloneObjective):
        def run(self, site: Site) -> Turn:
            return super().run(replace(site, state={}))

    return Objective(), AloneFusion()
