"""No federation: every client trains by itself. The floor that any method must beat.

Method card
-----------
Client
    Goes on with its own model, ``w <- w - eta_t (clip(grad CE) + lambda w)``, from the architecture's initial weights
    in its first round. Local settings, learning rates and batches are those of the other methods.
Server
    Does nothing.
Travels
    Nothing.
Measured
    Every client's own model: their mean accuracy, and each one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedstill.methods.base import (
    ClientWeights,
    FederationInfo,
    LocalObjective,
    LocalTask,
    RoundContext,
    ServerState,
    Upload,
)
from fedstill.payload import Payload
from fedstill.training import Trained
from fedstill.weights import State, Weights


class AloneObjective(LocalObjective):
    """Cross-entropy by SGD on a model that stays with the client."""

    personal = True

    def own_model(self, received: Payload, state: State, initial: Weights) -> Weights:
        """Return the client's own model, the initial one before its first round."""
        return Weights(state["params"], state.get("buffers", {})) if "params" in state else initial

    def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
        """Upload nothing, keep the model."""
        return Payload(), {"params": trained.weights.params, "buffers": trained.weights.buffers}


@dataclass(frozen=True)
class AloneFusion:
    """A server that neither sends nor learns anything."""

    needs_label_counts: bool = False
    client_weights: ClientWeights = "samples"
    across_architectures: bool = True

    def start(self, weights: Weights, info: FederationInfo) -> ServerState:
        """Return an empty state."""
        return ServerState(Weights({}, {}))

    def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
        """Send nothing."""
        return Payload()

    def upload_like(self, server: ServerState) -> Payload:
        """Expect nothing."""
        return Payload()

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        """Do nothing."""
        return server
