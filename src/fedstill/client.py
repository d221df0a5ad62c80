"""One client's round: from the broadcast to the upload."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedstill.config import LocalSettings
from fedstill.data.augment import Moves, draw_moves
from fedstill.data.dataset import Samples, Share
from fedstill.errors import RunError
from fedstill.methods.base import LocalObjective, LocalTask, Turn
from fedstill.models.randomness import layers_draw_from
from fedstill.models.stateless import Stateless
from fedstill.payload import Kind, Payload
from fedstill.rng import seed_of, torch_stream
from fedstill.training import SGD, Trained, batches, step_count, train_locally
from fedstill.weights import State, Tensors, Weights

REMEDY = (
    "a smaller local.lr or local.clip_norm usually helps, unless a key of the method's own, such as scaffold.server_lr "
    "or moon.tau, is far from its default"
)
"""What to do where training diverges; which key is to blame cannot be told from the numbers."""


@dataclass(frozen=True)
class ClientWork:
    """What a client gets for a round; ``architecture`` is the place of its model among the federation's."""

    round: int
    client: int
    payload: Payload
    state: State
    send_label_counts: bool = False
    architecture: int = 0


@dataclass(frozen=True)
class ClientResult:
    """What comes back: the upload, the client's own state, and what it measured."""

    client: int
    payload: Payload
    state: State
    steps: int
    loss: float
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Site:
    """A client at work: what it received and keeps, its own data, its random streams.

    Parameters
    ----------
    model : Stateless
        The client's architecture.
    initial : Weights
        That architecture's initial weights.
    own : Samples or Share
        The client's training samples, on the device.
    task : LocalTask
    received : Payload
    state : dict
        What the client kept from its last round; empty at first.
    local : LocalSettings
    seed : int
        ``seed.train``.
    augmentation : str
    public : Samples or None
        The public set, on the device.
    stopped : threading.Event
        Set when the run is stopped.
    channels_last : bool
        How the kernels of convolutions lie in memory.
    """

    model: Stateless
    initial: Weights
    own: Samples | Share
    task: LocalTask
    received: Payload
    state: State
    local: LocalSettings
    seed: int
    augmentation: str = "none"
    public: Samples | None = None
    stopped: threading.Event = field(default_factory=threading.Event)
    channels_last: bool = False

    def stream(self, purpose: str) -> torch.Generator:
        """Return the client's random stream of this round for a purpose, on the CPU."""
        return torch_stream(self.seed, purpose, self.task.round, self.task.client)

    def check_stop(self) -> None:
        """Raise InterruptedError where the run has been stopped; to be called now and then."""
        if self.stopped.is_set():
            raise InterruptedError(f"client {self.task.client} was stopped")

    def train(self, objective: LocalObjective, start: Weights, extras: State, draws: Tensors) -> Trained:
        """Run the round's SGD steps of an objective on the client's own data.

        Raises
        ------
        RunError
            If the loss turns non-finite; it names the round, the client and the step.
        """
        batches_of_round = self.order()
        x, y, order = self.own.source(self.watched(batches_of_round))
        decay = self.local.weight_decay + objective.extra_weight_decay(self.received, self.task)
        trained = train_locally(
            self.model,
            objective,
            start,
            extras,
            x,
            y,
            order,
            SGD(self.task.lr, self.local.momentum, decay, self.local.clip_norm),
            draws={name: value.to(y.device) for name, value in draws.items()},
            moves=self.moves(batches_of_round),
            channels_last=self.channels_last,
        )
        check_finite(trained, self.task)
        return trained

    def order(self) -> list[Tensor]:
        """Return the index batches of the round, on the device."""
        local, stream, device = self.local, self.stream("batches"), self.own.y.device
        return list(batches(self.task.samples, local.batch_size, self.task.steps, stream, local.last_batch, device))

    def moves(self, order: Sequence[Tensor]) -> list[Moves] | None:
        """Return how the images of each batch are augmented, on the device; None for not at all."""
        if self.augmentation == "none":
            return None
        sizes = [len(batch) for batch in order]
        return draw_moves(self.augmentation, sizes, self.stream("augmentation"), self.own.y.device)

    def watched(self, order: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield batches as long as the run has not been stopped."""
        for batch in order:
            self.check_stop()
            yield batch


@dataclass
class LocalTrainer:
    """Trains any client of a federation; called by an executor with the architectures to use.

    Parameters
    ----------
    objective : LocalObjective
    samples : Samples
        All training samples, on the device.
    shares : list of Tensor
        Each client's positions in ``samples``.
    local : LocalSettings
    num_classes : int
    seed : int
        ``seed.train``; batch order and augmentation come from streams of (seed, round, client).
    initial : sequence of Weights
        Each architecture's initial weights; a method whose clients receive a model can do without.
    augmentation : str
    public : Samples or None
        The public set, on the device.
    channels_last : bool
        Hold the kernels of convolutions with the channels innermost while a client trains.
    """

    objective: LocalObjective
    samples: Samples
    shares: list[Tensor]
    local: LocalSettings
    num_classes: int
    seed: int
    initial: Sequence[Weights] = ()
    augmentation: str = "none"
    public: Samples | None = None
    channels_last: bool = False
    stop: threading.Event = field(default_factory=threading.Event)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process."""
        return {name: value for name, value in vars(self).items() if name != "stop"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, stop=threading.Event())

    def __call__(self, models: Sequence[Stateless], work: ClientWork) -> ClientResult:
        """Let one client do its round.

        Raises
        ------
        RunError
            If training turns non-finite; it names the round, the client and the step.
        """
        began = time.perf_counter()
        site = self.site(models, work)
        with layers_draw_from(
            site.model.module, site.own.y.device, seed_of(self.seed, "layers", work.round, work.client)
        ):
            turn = self.objective.run(site)
        return self.result(work, turn, time.perf_counter() - began)

    def result(self, work: ClientWork, turn: Turn, seconds: float) -> ClientResult:
        """Return what a client sends back, with its label counts where they were asked for."""
        payload = turn.payload
        if work.send_label_counts:
            payload = payload.also(Kind.LABEL_COUNTS, {"counts": self.label_counts(work.client)})
        return ClientResult(work.client, payload, turn.state, turn.steps, turn.loss, seconds, turn.notes)

    def site(self, models: Sequence[Stateless], work: ClientWork) -> Site:
        """Return a client at work."""
        return Site(
            models[work.architecture],
            self.initial[work.architecture] if self.initial else work.payload.weights(),
            Share(self.samples, self.shares[work.client].to(self.samples.y.device)),
            self.task(work),
            work.payload,
            work.state,
            self.local,
            self.seed,
            self.augmentation,
            self.public,
            self.stop,
            self.channels_last,
        )

    def label_counts(self, client: int) -> Tensor:
        """Return a client's n_k^y, int32 (classes,)."""
        own = self.samples.y[self.shares[client].to(self.samples.y.device)]
        return torch.bincount(own.cpu(), minlength=self.num_classes).to(torch.int32)

    def task(self, work: ClientWork) -> LocalTask:
        """Return the learning rate and the number of steps of a client's round."""
        lr = self.local.lr * self.local.lr_decay**work.round
        size, steps = len(self.shares[work.client]), self.steps_of(work.client)
        return LocalTask(work.round, work.client, size, lr, self.local.lr, steps)

    def steps_of(self, client: int) -> int:
        """Return how many SGD steps a client's round has."""
        size, local = len(self.shares[client]), self.local
        return step_count(size, local.batch_size, local.epochs, local.steps, local.last_batch)


def check_finite(trained: Trained, task: LocalTask) -> None:
    """Raise RunError where a client's training loss, or the model it ends with, is NaN or infinite."""
    bad = torch.nonzero(~torch.isfinite(trained.losses))
    if len(bad):
        step = int(bad[0])
        raise RunError(
            f"round {task.round + 1}, client {task.client}: the training loss became "
            f"{float(trained.losses[step])} in local step {step + 1} of {trained.steps}; {REMEDY}"
        )
    if not trained.weights.all_finite():
        raise RunError(
            f"round {task.round + 1}, client {task.client}: the weights became non-finite in the last of "
            f"{trained.steps} local steps, after a training loss of {float(trained.losses[-1])}; {REMEDY}"
        )
