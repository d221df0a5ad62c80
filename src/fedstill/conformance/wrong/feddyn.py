"""FedDyn with a mistake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedstill.config import Config
from fedstill.conformance.wrong.registry import wrong
from fedstill.methods.base import (
    LocalTask,
    RoundContext,
    ServerState,
    Upload,
)
from fedstill.methods.feddyn import FedDynFusion, FedDynObjective
from fedstill.payload import Payload
from fedstill.weights import Weights


@wrong(
    "feddyn",
    "feddyn-cloud-is-the-mean-plus-h",
    "feddyn-rounds-by-hand",
    "feddyn-first-round-overshoots",
    "agrees-with-reference-cases",
)
def feddyn_misplaced_parenthesis(config: Config) -> Any:
    """FedDyn whose h takes w_t off once: ``(1/K) (sum_S w_k - w_t)`` instead of ``(1/K) sum_S (w_k - w_t)``."""

    class Fusion(FedDynFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done, missing = super().fuse(server, uploads, context), (len(uploads) - 1) / context.info.size
            sent = server.weights.params
            h = {name: value + missing * sent[name] for name, value in done.method["h"].items()}
            cloud = {name: value + missing * sent[name] for name, value in done.weights.params.items()}
            return ServerState(Weights(cloud, done.weights.buffers), {"h": h})

    return FedDynObjective(), Fusion(config.feddyn, config.fusion)


@wrong("feddyn", "feddyn-first-round-overshoots", "feddyn-cloud-is-the-mean-plus-h")
def feddyn_mean_over_the_cohort(config: Config) -> Any:
    """FedDyn whose h divides by the cohort's size instead of by K."""

    class Fusion(FedDynFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            few = replace(context.info, clients=tuple(upload.client for upload in uploads))
            return super().fuse(server, uploads, replace(context, info=few))

    return FedDynObjective(), Fusion(config.feddyn, config.fusion)


@wrong("feddyn", "feddyn-rounds-by-hand")
def feddyn_without_the_quadratic_term(config: Config) -> Any:
    """FedDyn without ``alpha/2 ||w||^2``."""

    class Objective(FedDynObjective):
        def extra_weight_decay(self, received: Payload, task: LocalTask) -> float:
            return 0.0

    return Objective(), FedDynFusion(config.feddyn, config.fusion)


@wrong("feddyn", "feddyn-reaches-the-pooled-optimum")
def feddyn_equal_alphas(config: Config) -> Any:
    """FedDyn with the same alpha for clients of any size, where the optimum of the pooled data is asked for."""
    return FedDynObjective(), FedDynFusion(config.feddyn.model_copy(update={"client_weights": "uniform"}))
