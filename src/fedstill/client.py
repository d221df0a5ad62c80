"""One client's round: from the broadcast to the upload."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedstill.config import LocalSettings
from fedstill.data.dataset import Samples
from fedstill.errors import RunError
from fedstill.methods.base import LocalObjective, LocalTask
from fedstill.models.randomness import layers_draw_from
from fedstill.models.stateless import Stateless
from fedstill.payload import Kind, Payload
from fedstill.rng import seed_of, torch_stream
from fedstill.training import SGD, Trained, batches, step_count, train_locally
from fedstill.weights import State


@dataclass(frozen=True)
class ClientWork:
    """What a client gets for a round."""

    round: int
    client: int
    payload: Payload
    state: State
    send_label_counts: bool = False


@dataclass(frozen=True)
class ClientResult:
    """What comes back: the upload, the client's own state, and what it measured."""

    client: int
    payload: Payload
    state: State
    steps: int
    loss: float
    seconds: float


@dataclass
class LocalTrainer:
    """Trains any client of a federation; called by an executor with the architecture to use.

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
    augmentation : str
    """

    objective: LocalObjective
    samples: Samples
    shares: list[Tensor]
    local: LocalSettings
    num_classes: int
    seed: int
    augmentation: str = "none"
    stop: threading.Event = field(default_factory=threading.Event)

    def __call__(self, model: Stateless, work: ClientWork) -> ClientResult:
        """Train one client.

        Raises
        ------
        RunError
            If the loss turns non-finite; it names the round, the client and the step.
        """
        began = time.perf_counter()
        own = self.samples.take(self.shares[work.client].to(self.samples.y.device))
        task = self.task(work)
        extras = self.objective.prepare(work.payload, work.state, task)
        with layers_draw_from(model.module, own.y.device, seed_of(self.seed, "layers", work.round, work.client)):
            trained = train_locally(
                model,
                self.objective,
                work.payload.weights(),
                extras,
                own.x,
                own.y,
                self._order(work, task),
                self._sgd(task),
                augmentation=self.augmentation,
                generator=self._augmentation_stream(work),
            )
        check_finite(trained, work)
        payload, state = self.objective.finish(work.payload, work.state, trained, task)
        if work.send_label_counts:
            payload = payload.also(Kind.LABEL_COUNTS, {"counts": self.label_counts(work.client)})
        seconds = time.perf_counter() - began
        return ClientResult(work.client, payload, state, trained.steps, trained.loss, seconds)

    def label_counts(self, client: int) -> Tensor:
        """Return a client's n_k^y, int32 (classes,)."""
        own = self.samples.y[self.shares[client].to(self.samples.y.device)]
        return torch.bincount(own.cpu(), minlength=self.num_classes).to(torch.int32)

    def task(self, work: ClientWork) -> LocalTask:
        """Return the learning rate and the number of steps of a client's round."""
        size = len(self.shares[work.client])
        steps = step_count(size, self.local.batch_size, self.local.epochs, self.local.steps)
        lr = self.local.lr * self.local.lr_decay**work.round
        return LocalTask(work.round, work.client, size, lr, self.local.lr, steps)

    def _sgd(self, task: LocalTask) -> SGD:
        decay = self.local.weight_decay + self.objective.extra_weight_decay(task)
        return SGD(task.lr, self.local.momentum, decay, self.local.clip_norm)

    def _order(self, work: ClientWork, task: LocalTask) -> Iterator[Tensor]:
        stream = torch_stream(self.seed, "batches", work.round, work.client)
        device = self.samples.y.device
        for batch in batches(task.samples, self.local.batch_size, task.steps, stream):
            if self.stop.is_set():
                raise InterruptedError(f"client {work.client} was stopped")
            yield batch.to(device)

    def _augmentation_stream(self, work: ClientWork) -> torch.Generator | None:
        if self.augmentation == "none":
            return None
        return torch_stream(self.seed, "augmentation", work.round, work.client)


def check_finite(trained: Trained, work: ClientWork) -> None:
    """Raise RunError where a client's training loss, or the model it ends with, is NaN or infinite."""
    bad = torch.nonzero(~torch.isfinite(trained.losses))
    if len(bad):
        step = int(bad[0])
        raise RunError(
            f"round {work.round + 1}, client {work.client}: the training loss became "
            f"{float(trained.losses[step])} in local step {step + 1} of {trained.steps}; "
            f"a smaller local.lr or local.clip_norm usually helps"
        )
    if not trained.weights.all_finite():
        raise RunError(
            f"round {work.round + 1}, client {work.client}: the weights became non-finite in the last of "
            f"{trained.steps} local steps, after a training loss of {float(trained.losses[-1])}; "
            f"a smaller local.lr or local.clip_norm usually helps"
        )
