"""SCAFFOLD with a mistake: in its rounds, or in what any method with a state can do wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedstill.config import Config
from fedstill.conformance.wrong.registry import wrong
from fedstill.methods.base import (
    FederationInfo,
    LocalTask,
    RoundContext,
    ServerState,
    Upload,
)
from fedstill.methods.scaffold import ScaffoldFusion, ScaffoldObjective
from fedstill.payload import Kind, Payload
from fedstill.training import Trained
from fedstill.weights import State, Tensors, Weights


def scaffold(
    config: Config,
    objective: type[ScaffoldObjective] = ScaffoldObjective,
    fusion: type[ScaffoldFusion] = ScaffoldFusion,
    **keys: Any,
) -> Any:
    """Return SCAFFOLD with a half or with keys exchanged."""
    own = config.scaffold.model_copy(update=keys)
    return objective(own), fusion(own, config.fusion, refined=False)


@wrong("scaffold", "scaffold-reaches-the-pooled-optimum", "scaffold-rounds-by-hand", "agrees-with-reference-cases")
def scaffold_wrong_sign(config: Config) -> Any:
    """SCAFFOLD whose correction is ``c_k - c`` instead of ``c - c_k``."""

    class Objective(ScaffoldObjective):
        def adjust(self, grads: list[Tensor], params: Tensors, extras: State) -> list[Tensor]:
            return [grad - extras["correction"][name] for grad, name in zip(grads, params)]

    return scaffold(config, Objective)


@wrong("scaffold", "scaffold-c-is-the-mean-of-the-variates", "scaffold-rounds-by-hand", "agrees-with-reference-cases")
def scaffold_sum_of_changes(config: Config) -> Any:
    """SCAFFOLD whose server adds the clients' changes to c without the factor 1/K."""

    class Fusion(ScaffoldFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done, old = super().fuse(server, uploads, context), server.method["control"]
            control = {k: old[k] + context.info.size * (v - old[k]) for k, v in done.method["control"].items()}
            return ServerState(done.weights, {"control": control})

    return scaffold(config, fusion=Fusion)


@wrong("scaffold", "scaffold-c-is-the-mean-of-the-variates", "scaffold-rounds-by-hand")
def scaffold_mean_over_the_cohort(config: Config) -> Any:
    """SCAFFOLD whose server divides the clients' changes by the cohort's size instead of by K."""

    class Fusion(ScaffoldFusion):
        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done, old = super().fuse(server, uploads, context), server.method["control"]
            factor = context.info.size / len(uploads)
            control = {k: old[k] + factor * (v - old[k]) for k, v in done.method["control"].items()}
            return ServerState(done.weights, {"control": control})

    return scaffold(config, fusion=Fusion)


@wrong("scaffold", "scaffold-current-rate", "rate-of-the-round")
def scaffold_undecayed_rate(config: Config) -> Any:
    """SCAFFOLD whose c_k divides by the learning rate of round 0, as the released code of FedDyn and FedFTG does."""
    return scaffold(config, denominator_lr="initial")


@wrong("scaffold", "scaffold-rounds-by-hand")
def scaffold_overwritten_variate(config: Config) -> Any:
    """SCAFFOLD whose client keeps the change of c_k in place of c_k."""

    class Objective(ScaffoldObjective):
        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, _ = super().finish(received, state, trained, task)
            return payload, {"control": payload[Kind.CONTROL_VARIATE]}

    return scaffold(config, Objective)


@wrong("scaffold", "scaffold-reaches-the-mean-optimum")
def scaffold_always_by_samples(config: Config) -> Any:
    """SCAFFOLD whose omega_k is n_k K / sum n even where all clients should count the same."""
    return scaffold(config, client_weights="samples")


@wrong("scaffold", "scaffold-first-round-is-fedavg")
def scaffold_random_start(config: Config) -> Any:
    """SCAFFOLD whose c does not start at zero."""

    class Fusion(ScaffoldFusion):
        def start(self, weights: Weights, info: FederationInfo) -> ServerState:
            control = {name: 0.01 * torch.ones_like(value) for name, value in weights.params.items()}
            return ServerState(weights, {"control": control})

    return scaffold(config, fusion=Fusion)


@wrong("scaffold", "state-outlives-absence")
def scaffold_forgets_absentees(config: Config) -> Any:
    """SCAFFOLD whose client starts again at c_k = 0 when it was away in the round before."""

    def fresh(state: State, task: LocalTask) -> State:
        return state if state and int(state["seen"]["round"]) == task.round - 1 else {}

    class Objective(ScaffoldObjective):
        def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
            return super().prepare(received, fresh(state, task), task)

        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, kept = super().finish(received, fresh(state, task), trained, task)
            return payload, {**kept, "seen": {"round": torch.tensor(task.round)}}

    return scaffold(config, Objective)


@wrong("scaffold", "state-is-the-clients-own")
def scaffold_one_variate_for_all(config: Config) -> Any:
    """SCAFFOLD whose c_k is kept on the object, so that each client goes on with the last one's."""
    last: State = {}

    class Objective(ScaffoldObjective):
        def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
            return super().prepare(received, last, task)

        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, kept = super().finish(received, dict(last), trained, task)
            last.update(kept)
            return payload, kept

    return scaffold(config, Objective)


@wrong("scaffold", "uploads-are-as-declared")
def scaffold_double_precision_variates(config: Config) -> Any:
    """SCAFFOLD that uploads its variates in float64 whatever the model's type."""

    class Objective(ScaffoldObjective):
        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            payload, kept = super().finish(received, state, trained, task)
            doubled = {name: value.double() for name, value in payload[Kind.CONTROL_VARIATE].items()}
            return payload.also(Kind.CONTROL_VARIATE, doubled), kept

    return scaffold(config, Objective)


@wrong("scaffold", "survives-a-checkpoint")
def scaffold_variate_on_the_object(config: Config) -> Any:
    """SCAFFOLD whose server keeps c on the object, and not in the state that a checkpoint holds."""
    memory: State = {}

    class Fusion(ScaffoldFusion):
        def start(self, weights: Weights, info: FederationInfo) -> ServerState:
            server = super().start(weights, info)
            memory.update(server.method)
            return ServerState(server.weights)

        def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
            return super().broadcast(replace(server, method=dict(memory)), client, info)

        def upload_like(self, server: ServerState) -> Payload:
            return super().upload_like(replace(server, method=dict(memory)))

        def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
            done = super().fuse(replace(server, method=dict(memory)), uploads, context)
            memory.update(done.method)
            return ServerState(done.weights)

    return scaffold(config, fusion=Fusion)
