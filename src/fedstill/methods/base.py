"""The three parts of a method: local objective, server fusion, refinements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fedstill.data.dataset import Samples
from fedstill.models.stateless import Stateless
from fedstill.payload import Payload, model_payload
from fedstill.rng import torch_stream
from fedstill.training import Trained
from fedstill.weights import State, Tensors, Weights

ClientWeights = Literal["samples", "uniform"]

if TYPE_CHECKING:
    from fedstill.client import Site
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
    clients : tuple of int or None
        The clients that one global model belongs to, where architectures differ; None for all.
    architectures : int
        How many architectures the whole federation has.
    public : int
        Samples of the public set, 0 without one.
    """

    samples: tuple[int, ...]
    num_classes: int
    input_shape: tuple[int, ...]
    head: str | None = None
    clients: tuple[int, ...] | None = None
    architectures: int = 1
    public: int = 0

    @property
    def members(self) -> tuple[int, ...]:
        """The clients whose models are averaged with each other; their number is K."""
        return tuple(range(len(self.samples))) if self.clients is None else self.clients

    @property
    def size(self) -> int:
        """K, the number of those clients."""
        return len(self.samples) if self.clients is None else len(self.clients)

    def omega(self, client: int) -> float:
        """Return omega_k = n_k K / sum n, 1 in a balanced federation."""
        return self.samples[client] * self.size / self._pooled

    @cached_property
    def _pooled(self) -> int:
        """The training samples of all members."""
        return sum(self.samples[member] for member in self.members)


@dataclass(frozen=True)
class LocalTask:
    """What a client knows of the round it works in: eta_t, eta_0, its own n_k and the steps it will take."""

    round: int
    client: int
    samples: int
    lr: float
    initial_lr: float
    steps: int


@dataclass(frozen=True)
class Turn:
    """What a client's round gives: its upload, its state for the next round, its steps and their mean loss.

    ``notes`` are lines for the run's log.
    """

    payload: Payload
    state: State
    steps: int
    loss: float
    notes: tuple[str, ...] = ()


class LocalObjective:
    """The client's half of a method. As it stands, this is FedAvg's: cross-entropy by SGD, no state.

    ``loss_and_sums``, which calls ``loss``, and ``adjust`` run in every step and must be functions of their
    arguments alone, so that they can be batched over clients; the others run once per client and round. A method
    whose clients do something else than SGD on one loss replaces ``run``.
    """

    needs_head: bool = False
    """Whether the steps look at features, the input of the model's last linear layer."""
    needs_public: bool = False
    """Whether the clients learn on the public set too."""

    @property
    def personal(self) -> bool:
        """Whether every client predicts with a model of its own, so that there is no one model to measure or refine."""
        return False

    def run(self, site: Site) -> Turn:
        """Do a client's round: prepare, train by SGD, finish."""
        extras = self.prepare(site.received, site.state, site.task)
        draws = self.draws(site.received, site.task, site.stream("objective"))
        start = self.own_model(site.received, site.state, site.initial)
        trained = site.train(self, start, extras, draws)
        payload, state = self.finish(site.received, site.state, trained, site.task)
        return Turn(payload, state, trained.steps, trained.loss)

    def own_model(self, received: Payload, state: State, initial: Weights) -> Weights:
        """Return the model that a client starts from, and would predict with: the one it received."""
        return received.weights()

    def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
        """Return the tensors that the steps need beside the weights (the *extras*)."""
        return {}

    def draws(self, received: Payload, task: LocalTask, stream: torch.Generator) -> Tensors:
        """Return the random numbers of all steps, each tensor (steps, ...).

        A step finds its row in ``extras["draws"]``. ``stream`` is on the CPU; what is returned is moved to the device.
        """
        return {}

    def loss(self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State) -> Tensor:
        """Return the scalar to differentiate: mean cross-entropy over the batch."""
        return F.cross_entropy(model(params, buffers, x, train=True), y)

    def loss_and_sums(
        self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
    ) -> tuple[Tensor, Tensors]:
        """Return the loss, and what the client wants to know of its steps: tensors that are summed over them."""
        return self.loss(model, params, buffers, x, y, extras), {}

    def adjust(self, grads: list[Tensor], params: Tensors, extras: State) -> list[Tensor]:
        """Return the gradients with the method's correction added, before the clip."""
        return grads

    def extra_weight_decay(self, received: Payload, task: LocalTask) -> float:
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


def _stream_of_no_run(purpose: str) -> torch.Generator:
    return torch_stream(0, purpose)


@dataclass(frozen=True)
class RoundContext:
    """What the server knows, and may use, when it fuses and refines.

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
    public : Samples or None
        The public set, whose labels a method may or may not use.
    validation : Samples or None
        The server's own validation samples.
    real : Samples or None
        The cohort's own data, in simulation only: the oracle's inputs.
    cuda_graphs : bool
        Whether a refinement may record its steps as CUDA graphs.
    channels_last : bool
        Whether it computes with the channels of images and kernels innermost.
    """

    round: int
    info: FederationInfo
    lr_factor: float = 1.0
    stream: Callable[[str], torch.Generator] = _stream_of_no_run
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    public: Samples | None = None
    validation: Samples | None = None
    real: Samples | None = None
    cuda_graphs: bool = False
    channels_last: bool = False


class ServerFusion(Protocol):
    """The server's half of a method."""

    needs_label_counts: bool
    client_weights: ClientWeights
    """How the models measured as ``sel`` and ``all`` are averaged: by n_k or uniformly."""
    across_architectures: bool
    """Whether clients of all architectures are fused together (logits), or each architecture by itself (weights)."""

    def start(self, weights: Weights, info: FederationInfo) -> ServerState:
        """Return the state before round 0."""

    def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
        """Return what is sent to one client of the cohort."""

    def upload_like(self, server: ServerState) -> Payload:
        """Return a payload with the kinds, names, shapes and dtypes that an upload must have."""

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        """Return the next state from the cohort's uploads, which come in client-id order."""


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
    needs_public: bool
    needs_validation: bool

    def check(self, model: Stateless, info: FederationInfo) -> None:
        """Raise InputError, before round 0, where the settings do not fit the model or the data."""

    def refine(
        self, model: Stateless, student: Weights, teachers: Teachers, state: State, context: RoundContext
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

    @property
    def needs_public(self) -> bool:
        """Whether any part learns on the public set."""
        return self.objective.needs_public or any(part.needs_public for part in self.refinements)
