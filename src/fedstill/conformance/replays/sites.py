"""A client at work on recorded batches and draws, and a turn of it between two messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedstill.client import Site
from fedstill.config import LocalSettings
from fedstill.conformance.findings import DoesNotApply
from fedstill.conformance.replays.registry import must
from fedstill.data.dataset import Samples
from fedstill.methods.base import FederationInfo, LocalObjective, LocalTask, ServerFusion, ServerState, Upload
from fedstill.models import Stateless
from fedstill.payload import Payload, problem_with
from fedstill.training import SGD, Trained
from fedstill.weights import State, Tensors, Weights


@dataclass(frozen=True)
class Seen:
    """A training: what it began with and what it gave."""

    start: Weights
    extras: State
    draws: Tensors
    trained: Trained


@dataclass(frozen=True)
class RecordedSite(Site):
    """A client at work that follows a recording.

    Parameters
    ----------
    batches : sequence of Tensor
        The batches of its steps.
    begins_at : Weights or None
        Where its training starts, if not where the objective has it.
    ends_at : Weights or None
        Where its training ends, without a step.
    given : dict
        Draws of all steps in place of the objective's.
    trainings : list of Seen
        Filled by ``train``.
    """

    batches: Sequence[Tensor] = ()
    begins_at: Weights | None = None
    ends_at: Weights | None = None
    given: Tensors = field(default_factory=dict)
    trainings: list[Seen] = field(default_factory=list)

    def order(self) -> list[Tensor]:
        """Return the recorded batches."""
        return list(self.batches)

    def train(self, objective: LocalObjective, start: Weights, extras: State, draws: Tensors) -> Trained:
        """Train on the recording, or end where the client is to end."""
        start = start if self.begins_at is None else self.begins_at
        draws = {**draws, **self.given} if draws else draws
        if self.ends_at is None:
            trained = super().train(objective, start, extras, draws)
        else:
            nothing = next(iter(start.params.values())).new_zeros(self.task.steps)
            trained = Trained(self.ends_at, self.task.steps, nothing, None, self.own.y[:0])
        self.trainings.append(Seen(start, extras, draws, trained))
        return trained

    @property
    def seen(self) -> Seen:
        """Its training.

        Raises
        ------
        DoesNotApply
            Where the objective has a loop of its own, to which no start, end or draw can be given.
        """
        if not self.trainings:
            raise DoesNotApply("it does not train by the site's SGD loop, to which the recorded numbers are given")
        return self.trainings[-1]

    def first(self, steps: int) -> RecordedSite:
        """Return the client when it takes the first steps alone."""
        return replace(self, batches=self.batches[:steps], task=replace(self.task, steps=steps), trainings=[])

    def after(self, objective: LocalObjective, sent: Payload, *ends: Weights) -> RecordedSite:
        """Return the client some rounds later: what was sent to it was trained to each of the given ends.

        That is how a state gets to a client whose objective keeps it under names of its own.
        """
        site = self
        for end in ends:
            away = replace(site, received=sent, ends_at=end, trainings=[])
            state = objective.run(away).state
            assert away.seen
            site = replace(site, state=state, task=replace(site.task, round=site.task.round + 1))
        return site


def over_the_wire(payload: Payload) -> Payload:
    """Return what arrives when ``payload`` is sent as bytes."""
    return Payload.from_bytes(payload.to_bytes())


@dataclass(frozen=True)
class ClientTurn:
    """What one client's turn gave, what it began with, and the client."""

    received: Payload
    upload: Upload
    state: State
    site: RecordedSite

    @property
    def trained(self) -> Trained:
        """What its training gave."""
        return self.site.seen.trained


def client_turn(
    model: Stateless,
    objective: LocalObjective,
    fusion: ServerFusion,
    server: ServerState,
    info: FederationInfo,
    task: LocalTask,
    data: tuple[Tensor, Tensor],
    order: Sequence[Tensor],
    sgd: SGD,
    state: State,
    label_counts: Tensor | None = None,
) -> ClientTurn:
    """Send the model to a client, train there, and take its upload; both messages travel as bytes."""
    received = over_the_wire(fusion.broadcast(server, task.client, info))
    local = LocalSettings(momentum=sgd.momentum, weight_decay=sgd.weight_decay, clip_norm=sgd.clip_norm)
    site = RecordedSite(model, server.weights, Samples(*data), task, received, state, local, 0, batches=order)
    turn = objective.run(site)
    sent = over_the_wire(turn.payload)
    problem = problem_with(sent, fusion.upload_like(server))
    must(problem is None, f"the upload is not as declared: {problem}")
    return ClientTurn(received, Upload(task.client, sent, task.samples, turn.steps, label_counts), turn.state, site)
