"""The three parts of a method: local objective, server fusion, refinements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedstill.data.dataset import Samples
from fedstill.models.stateless import Stateless
from fedstill.payload import Payload, model_payload
from fedstill.training import Trained
from fedstill.weights import State, Tensors, Weights

if TYPE_CHECKING:
    from fedstill.distill.teachers import Teachers


@dataclass(frozen=True)
class FederationInfo:
    """What the server knows of the federation before round 0.

    Parameters
    ----------
    samples : tuple of int
        n_k, the training samples of each client.
    num_classes : int
        M.
    input_shape : tuple of int
        Shape of one sample.
    head : str or None
        Dotted name of the linear layer that gives the logits, where the model has one.
    """

    samples: tuple[int, ...]
    num_classes: int
    input_shape: tuple[int, ...]
    head: str | None = None

    def omega(self, client: int) -> float:
        """Return omega_k = n_k K / sum n, 1 in a balanced federation."""
        return self.samples[client] * len(self.samples) / sum(self.samples)


@dataclass(frozen=True)
class LocalTask:
    """What a client knows of the round it works in: eta_t, eta_0, its own n_k and the steps it will take."""

    round: int
    client: int
    samples: int
    lr: float
    initial_lr: float
    steps: int


class LocalObjective:
    """The client's half of a method. As it stands, this is FedAvg's: cross-entropy by SGD, no state.

    ``loss`` and ``adjust`` run in every step and must be functions of their arguments alone, so that they
    can be batched over clients; ``prepare`` and ``finish`` run once per client and round.
    """

    def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
        """Return the tensors that the steps need beside the weights (the *extras*)."""
        return {}

    def loss(self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State) -> Tensor:
        """Return the scalar to differentiate: mean cross-entropy over the batch."""
        return F.cross_entropy(model(params, buffers, x, train=True), y)

    def adjust(self, grads: list[Tensor], params: Tensors, extras: State) -> list[Tensor]:
        """Return the gradients with the method's correction added, before the clip."""
        return grads

    def extra_weight_decay(self, task: LocalTask) -> float:
        """Return what the method adds to the optimiser's weight decay, outside the clip."""
        return 0.0

    def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
        """Return the upload and the client's state for its next round."""
        return model_payload(trained.weights), state


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round: the global model and the method's own tensors."""

    weights: Weights
    method: State = field(default_factory=dict)


@dataclass(frozen=True)
class Upload:
    """A client's answer, checked: its payload, n_k, steps taken, and n_k^y where the method asked for it."""

    client: int
    payload: Payload
    samples: int
    steps: int
    label_counts: Tensor | None = None

    @property
    def weights(self) -> Weights:
        """The client's model."""
        return self.payload.weights()


class ServerFusion(Protocol):
    """The server's half of a method."""

    needs_label_counts: bool

    def start(self, weights: Weights, info: FederationInfo) -> ServerState:
        """Return the state before round 0."""

    def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
        """Return what is sent to one client of the cohort."""

    def upload_like(self, server: ServerState) -> Payload:
        """Return a payload with the kinds, names, shapes and dtypes that an upload must have."""

    def fuse(self, server: ServerState, uploads: Sequence[Upload], info: FederationInfo) -> ServerState:
        """Return the next state from the cohort's uploads, which come in client-id order."""


@dataclass(frozen=True)
class RefineContext:
    """What a refinement may use beside the student and the teachers.

    Parameters
    ----------
    round : int
        t, from 0.
    info : FederationInfo
    lr_factor : float
        d^t, the decay of the learning rates at this round.
    stream : callable
        ``stream(purpose)`` gives the random stream of this round and purpose, on the device.
    device : torch.device
    real : Samples or None
        The cohort's own data, in simulation only: the oracle's inputs.
    """

    round: int
    info: FederationInfo
    lr_factor: float
    stream: Callable[[str], torch.Generator]
    device: torch.device
    real: Samples | None = None


@dataclass(frozen=True)
class Refined:
    """A refinement's result: the student's weights, its state for the next round, what it measured."""

    weights: Weights
    state: State
    metrics: dict[str, float]


class Refinement(Protocol):
    """Improves the fused model on the server."""

    name: str
    needs_label_counts: bool
    simulation_only: bool

    def check(self, model: Stateless, info: FederationInfo) -> None:
        """Raise InputError, before round 0, where the settings do not fit the model or the data."""

    def refine(
        self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RefineContext
    ) -> Refined:
        """Return the improved student; ``student`` itself is not changed."""


@dataclass(frozen=True)
class Method:
    """A composed method, such as ``scaffold+fedftg``."""

    name: str
    objective: LocalObjective
    fusion: ServerFusion
    refinements: tuple[Refinement, ...] = ()

    @property
    def needs_label_counts(self) -> bool:
        """Whether any part uses the clients' class counts n_k^y."""
        return self.fusion.needs_label_counts or any(part.needs_label_counts for part in self.refinements)
