"""The round loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedstill.client import ClientResult, ClientWork, LocalTrainer
from fedstill.client_states import ClientStates
from fedstill.config import Config
from fedstill.data.dataset import Samples
from fedstill.data.fingerprint import Fingerprints
from fedstill.data.partition import Partition
from fedstill.distill.teachers import GroupedTeachers, StackedTeachers, Teachers
from fedstill.errors import RunError
from fedstill.evaluation import Evaluation, Record, over_architectures
from fedstill.execution import Executor, intra_op_threads
from fedstill.methods.acceptance import Hearing, Verdict
from fedstill.methods.base import FederationInfo, Method, RoundContext, ServerState, Upload
from fedstill.models.randomness import layers_draw_from
from fedstill.models.stateless import Stateless
from fedstill.payload import Kind, Payload, problem_with, problem_with_counts
from fedstill.rng import numpy_stream, seed_of, torch_stream
from fedstill.weights import State, Weights, weighted_mean


@dataclass(frozen=True)
class Architecture:
    """One of the federation's architectures: its name, the network, its initial weights, and whose it is."""

    name: str
    model: Stateless
    initial: Weights
    info: FederationInfo


@dataclass(frozen=True)
class GlobalModel:
    """What the server carries for one architecture: its state, and what each refinement keeps for it."""

    server: ServerState
    refinements: tuple[State, ...] = ()


@dataclass(frozen=True)
class FederationState:
    """All that the next round depends on; what a checkpoint holds.

    Random streams are not in it: each is made anew from (seed, round, client, purpose). There is one global model
    for each architecture, or a single one where the fusion works across architectures.
    """

    round: int
    models: tuple[GlobalModel, ...]
    clients: Mapping[int, State] = field(default_factory=ClientStates)
    label_counts: dict[int, Tensor] = field(default_factory=dict)

    @property
    def server(self) -> ServerState:
        """The first architecture's server state, the only one in most federations."""
        return self.models[0].server

    @property
    def refinements(self) -> tuple[State, ...]:
        """What each refinement keeps for the first architecture."""
        return self.models[0].refinements


@dataclass
class Federation:
    """A method, the clients' data and an executor; made by :func:`fedstill.build.build`."""

    config: Config
    method: Method
    info: FederationInfo
    partition: Partition
    architectures: tuple[Architecture, ...]
    trainer: LocalTrainer
    executor: Executor
    evaluation: Evaluation
    device: torch.device
    public: Samples | None = None
    validation: Samples | None = None
    held_out: Sequence[Samples] | None = None
    data_fingerprints: Fingerprints = field(default_factory=dict)
    on_client: Callable[[int, int, int], None] = lambda round, done, of: None
    on_note: Callable[[str], None] = lambda line: None

    @property
    def model(self) -> Stateless:
        """The first architecture, the only one in most federations."""
        return self.architectures[0].model

    @property
    def initial(self) -> Weights:
        """The first architecture's initial weights."""
        return self.architectures[0].initial

    @cached_property
    def architecture_of(self) -> dict[int, int]:
        """Client -> the place of its architecture."""
        return {client: place for place, one in enumerate(self.architectures) for client in one.info.members}

    @property
    def groups(self) -> list[FederationInfo]:
        """The clients that are fused with each other: each architecture's, or all."""
        return [self.info] if self.method.fusion.across_architectures else [one.info for one in self.architectures]

    def group_of(self, client: int) -> int:
        """Return the place of a client's group."""
        return 0 if self.method.fusion.across_architectures else self.architecture_of[client]

    def start(self) -> FederationState:
        """Return the state before the first round."""
        models = []
        for place, info in enumerate(self.groups):
            shared = not self.method.fusion.across_architectures
            initial = self.architectures[place].initial if shared else Weights({}, {})
            server = self.method.fusion.start(initial, info)
            models.append(GlobalModel(server, tuple({} for _ in self.method.refinements)))
        return FederationState(0, tuple(models))

    def run_round(self, state: FederationState) -> tuple[FederationState, Record]:
        """Run one round: sample, broadcast, train, fuse, refine, evaluate.

        Returns
        -------
        state, record
            The next state, and what was measured, ready for the metrics file.
        """
        # All of the server's work: two threads inside an operation are very slow on a machine that does other things.
        with intra_op_threads(self.config.execution.server_threads):
            return self._round(state)

    def _round(self, state: FederationState) -> tuple[FederationState, Record]:
        clock = Clock()
        cohort = self.sample_cohort(state.round)
        works = [self.work(state, client) for client in cohort]
        with clock("train"):
            results = self.train(state.round, works)
        uploads, counts = self.receive(state, results)
        sent = Traffic.of(works, results)
        with clock("fuse"):
            fused = self.fuse(state, uploads)
        with clock("refine" if self.method.refinements else "evaluate"):
            teachers = self.teachers(uploads) if self.needs_teachers(state.round) else None
        with clock("refine"):
            refined, measured = self.refine(state.round, fused, uploads, teachers, sent)
        clients = ClientStates.of(state.clients) | self.kept(results)
        known = {**state.label_counts, **counts} if counts else state.label_counts
        following = FederationState(state.round + 1, refined, clients, known)
        record: Record = {"round": state.round + 1, "cohort": cohort}
        with clock("evaluate"):
            record |= self.evaluate(state.round, fused, following, uploads, teachers)
        record |= {"refinement": measured, "train_loss": sum(r.loss for r in results) / len(results)}
        return following, record | {"bytes": sent.record(), "seconds": clock.seconds}

    def sample_cohort(self, round: int) -> list[int]:
        """Return the clients of a round, ascending; the same for every method of one seed."""
        stream = numpy_stream(self.config.seed.train, "cohort", round)
        total, part = len(self.info.samples), self.config.train.participation
        if self.config.train.sampling == "fixed":
            size = cohort_size(part, total)
            return sorted(int(client) for client in stream.choice(total, size, replace=False))
        while True:
            cohort = np.flatnonzero(stream.random(total) < part)
            if len(cohort):
                return [int(client) for client in cohort]

    def work(self, state: FederationState, client: int) -> ClientWork:
        """Return what one client gets; it is asked for its label counts once."""
        ask = self.method.needs_label_counts and client not in state.label_counts
        payload, own = self.broadcast(state, client), state.clients.get(client, {})
        return ClientWork(state.round, client, payload, own, ask, self.architecture_of[client])

    def broadcast(self, state: FederationState, client: int) -> Payload:
        """Return what the server sends to one client."""
        group = self.group_of(client)
        return self.method.fusion.broadcast(state.models[group].server, client, self.groups[group])

    def train(self, round: int, works: Sequence[ClientWork]) -> list[ClientResult]:
        """Run the cohort and return its results in client-id order, whatever order they came in."""
        results: list[ClientResult] = []
        self.trainer.stop.clear()
        try:
            for result in self.executor.run(self.trainer, works):
                results.append(result)
                for note in result.notes:
                    self.on_note(f"round {round + 1}, client {result.client}: {note}")
                self.on_client(round, len(results), len(works))
        finally:
            self.trainer.stop.set()
        return sorted(results, key=lambda result: result.client)

    def receive(
        self, state: FederationState, results: Sequence[ClientResult]
    ) -> tuple[list[Upload], dict[int, Tensor]]:
        """Check the uploads; nothing malformed or non-finite goes further.

        Returns
        -------
        uploads, counts
            The uploads, and the label counts that were not known before.
        """
        new: dict[int, Tensor] = {}
        uploads = []
        likes = [self.method.fusion.upload_like(model.server) for model in state.models]
        counts = {"counts": torch.zeros(self.info.num_classes, dtype=torch.int32)}
        for result in results:
            samples, like = self.info.samples[result.client], likes[self.group_of(result.client)]
            asked = self.method.needs_label_counts and result.client not in state.label_counts
            problem = problem_with(result.payload, like.also(Kind.LABEL_COUNTS, counts) if asked else like)
            if not problem and asked:
                new[result.client] = result.payload[Kind.LABEL_COUNTS]["counts"].long()
                problem = problem_with_counts(new[result.client], samples)
            if problem:
                raise RunError(f"round {state.round + 1}, client {result.client}: refused its upload: {problem}")
            known = new.get(result.client, state.label_counts.get(result.client))
            uploads.append(Upload(result.client, result.payload, samples, result.steps, known))
        return uploads, new

    def fuse(self, state: FederationState, uploads: Sequence[Upload]) -> tuple[GlobalModel, ...]:
        """Make each group's next server state; a group without anyone in the cohort keeps its own."""
        fused = []
        for group, model in enumerate(state.models):
            own = [upload for upload in uploads if self.group_of(upload.client) == group]
            context = self.context(state.round, self.groups[group], own)
            server = self.method.fusion.fuse(model.server, own, context) if own else model.server
            if not server.weights.all_finite():
                raise RunError(f"round {state.round + 1}: the fused model is not finite; a smaller local.lr may help")
            fused.append(replace(model, server=server))
        return tuple(fused)

    def refine(
        self,
        round: int,
        fused: Sequence[GlobalModel],
        uploads: Sequence[Upload],
        teachers: Teachers | None,
        sent: Traffic,
    ) -> tuple[tuple[GlobalModel, ...], Record]:
        """Let every refinement improve every architecture's fused model in turn, each from all teachers."""
        if teachers is None or not self.method.refinements:
            return tuple(fused), {}
        models, records = [], []
        for architecture, model in zip(self.architectures, fused, strict=True):
            model, record = self.refine_one(round, architecture, model, uploads, teachers, sent)
            models.append(model)
            records.append(record)
        if len(records) == 1:
            return tuple(models), records[0]
        named = {one.name: record for one, record in zip(self.architectures, records, strict=True)}
        return tuple(models), {"by_model": named}

    def refine_one(
        self,
        round: int,
        architecture: Architecture,
        fused: GlobalModel,
        uploads: Sequence[Upload],
        teachers: Teachers,
        sent: Traffic,
    ) -> tuple[GlobalModel, Record]:
        """Refine one architecture's fused model; a refinement that is not accepted leaves it as it was."""
        server, kept, measured = fused.server, [], Record()
        for refinement, own in zip(self.method.refinements, fused.refinements, strict=True):
            context = self.context(round, architecture.info, uploads, refinement.simulation_only)
            seed = seed_of(self.config.seed.train, "layers", round, refinement.name)
            layers = layers_draw_from(architecture.model.module, self.device, seed)
            with layers:
                refined = refinement.refine(architecture.model, server.weights, teachers, own, context)
            if not refined.weights.all_finite():
                raise RunError(
                    f"round {round + 1}: {refinement.name} made the global model non-finite; "
                    f"a smaller {refinement.name}.lr_student usually helps"
                )
            kept.append(refined.state)
            measured[refinement.name] = dict(refined.metrics)
            verdict = self.hear(architecture, server.weights, refined.weights, uploads, sent)
            if verdict is not None:
                measured[refinement.name] |= verdict.record()
            if verdict is None or verdict.accepted:
                server = replace(server, weights=refined.weights)
        return GlobalModel(server, tuple(kept)), measured

    def hear(
        self, architecture: Architecture, fused: Weights, refined: Weights, uploads: Sequence[Upload], sent: Traffic
    ) -> Verdict | None:
        """Ask the cohort, or the server's validation set, whether a refined model is better; None where nobody is."""
        keys = self.config.refinement
        if keys.accept == "always":
            return None
        hearing = Hearing(architecture.model, fused, refined, self.config.eval.batch_size)
        if keys.accept == "server":
            assert self.validation is not None
            return hearing.verdict([self.validation], keys.accept_margin)
        assert self.held_out is not None
        asked = [client for client in (upload.client for upload in uploads) if self.uses(client, architecture)]
        sent.add(*hearing.traffic(len(asked)))
        return hearing.verdict([self.held_out[client] for client in asked], keys.accept_margin)

    def uses(self, client: int, architecture: Architecture) -> bool:
        """Say whether a client's model is of an architecture."""
        return self.architectures[self.architecture_of[client]] is architecture

    def context(
        self, round: int, info: FederationInfo, uploads: Sequence[Upload], with_real: bool = False
    ) -> RoundContext:
        """Return what the server may use in a round."""
        real = None
        if with_real:
            everyone = torch.cat([self.trainer.shares[upload.client] for upload in uploads])
            real = self.trainer.samples.take(everyone.to(self.device))

        def stream(purpose: str) -> torch.Generator:
            return torch_stream(self.config.seed.train, purpose, round, device=self.device)

        return RoundContext(
            round, info, self.config.local.lr_decay**round, stream, self.device, self.public, self.validation, real,
            self.config.execution.cuda_graphs, self.config.execution.memory_format == "channels_last",
        )  # fmt: skip

    def needs_teachers(self, round: int) -> bool:
        """Say whether a round's uploads are looked at as an ensemble: to refine, or to measure it."""
        measured = self.evaluation.ensembles is not None and self.due(round, self.config.eval.ensembles_every)
        return bool(self.method.refinements) or measured

    def teachers(self, uploads: Sequence[Upload]) -> Teachers | None:
        """Return the cohort's models as one ensemble; None where clients keep their models to themselves.

        Label counts come from the uploads; where the method does not ask for them, from the clients' data, which
        only a simulation knows.
        """
        if self.method.objective.personal:
            return None
        groups = []
        for place, architecture in enumerate(self.architectures):
            own = [upload for upload in uploads if self.architecture_of[upload.client] == place]
            if own:
                counts = torch.stack([self.counts_of(upload) for upload in own])
                weights = [upload.weights for upload in own]
                groups.append(StackedTeachers.of(architecture.model, weights, counts))
        return groups[0] if len(groups) == 1 else GroupedTeachers(groups)

    def counts_of(self, upload: Upload) -> Tensor:
        """Return a client's n_k^y, int64 (classes,)."""
        known = upload.label_counts
        return self.trainer.label_counts(upload.client).long() if known is None else known

    def kept(self, results: Sequence[ClientResult]) -> dict[int, State]:
        """Return what clients keep; where the model ``all`` is measured, also what each uploaded last."""
        kept = {}
        for result in results:
            state = result.state
            if "all" in self.config.eval.models:
                last = result.payload.weights()
                state = {**state, LAST_PARAMS: last.params, LAST_BUFFERS: last.buffers}
            if state:
                kept[result.client] = state
        return kept

    def evaluate(
        self,
        round: int,
        fused: Sequence[GlobalModel],
        following: FederationState,
        uploads: Sequence[Upload],
        teachers: Teachers | None,
    ) -> Record:
        """Measure the fused models, the refined ones, and now and then the ensembles that bound any refinement."""
        record: Record = {}
        if self.due(round, self.config.eval.every):
            if self.method.objective.personal:
                everyone = range(len(self.info.samples))
                record["fused"] = self.evaluation.personal(self.own_model(following, client) for client in everyone)
            else:
                record["fused"] = self.scores([model.server.weights for model in fused])
                if self.method.refinements:
                    record["refined"] = self.scores([model.server.weights for model in following.models])
            if "sel" in self.config.eval.models:
                record["sel"] = self.scores(self.averages(following, uploads))
            if "all" in self.config.eval.models:
                record["all"] = self.scores(self.averages(following, None))
        if teachers is None or not self.due(round, self.config.eval.ensembles_every):
            return record
        pairs = zip(self.architectures, fused, strict=True)
        starts = ((one.model, model.server.weights, one.info.size) for one, model in pairs)
        ensembles = self.evaluation.ensemble_accuracies(teachers, starts)
        return {**record, "ensembles": ensembles} if ensembles else record

    def own_models(self, state: FederationState) -> list[tuple[Stateless, Weights]]:
        """Return every client's own model as it stands after a round."""
        return [self.own_model(state, client) for client in range(len(self.info.samples))]

    def own_model(self, state: FederationState, client: int) -> tuple[Stateless, Weights]:
        """Return one client's own model as it stands after a round."""
        architecture = self.architectures[self.architecture_of[client]]
        own, sent = state.clients.get(client, {}), self.broadcast(state, client)
        return architecture.model, self.method.objective.own_model(sent, own, architecture.initial)

    def averages(self, state: FederationState, uploads: Sequence[Upload] | None) -> list[Weights]:
        """Return, by architecture, the mean of the cohort's uploads, or of what every client uploaded last.

        A client that has not been in a cohort yet counts with the initial model.
        """
        means = []
        for architecture in self.architectures:
            models: Iterator[Weights]
            if uploads is None:
                members = architecture.info.members
                models = (last_upload(state, client, architecture.initial) for client in members)
            else:
                own = [upload for upload in uploads if self.uses(upload.client, architecture)]
                members = tuple(upload.client for upload in own)
                models = (upload.weights for upload in own)
            by_samples = self.method.fusion.client_weights == "samples"
            shares = [float(self.info.samples[client]) if by_samples else 1.0 for client in members]
            means.append(weighted_mean(models, shares) if members else architecture.initial)
        return means

    def scores(self, models: Sequence[Weights]) -> Record:
        """Return the scores of one model for each architecture."""
        pairs = zip(self.architectures, models, strict=True)
        records = {one.name: self.evaluation.shared(one.model, weights) for one, weights in pairs}
        if len(records) == 1:
            return next(iter(records.values()))
        return over_architectures(records, [one.info.size for one in self.architectures])

    def due(self, round: int, every: int | None) -> bool:
        """Say whether something done every so many rounds is due; the first and the last round always are."""
        last = self.config.train.rounds - 1
        return round in (0, last) or (every is not None and (round + 1) % every == 0)


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of a block to ``phase``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


LAST_PARAMS, LAST_BUFFERS = "last-upload", "last-upload-buffers"
"""Groups of a client's state that hold what it uploaded last."""


def last_upload(state: FederationState, client: int, initial: Weights) -> Weights:
    """Return the model that a client uploaded last; the initial one where it has not been in a cohort."""
    own = state.clients.get(client, {})
    return Weights(own[LAST_PARAMS], own.get(LAST_BUFFERS, {})) if LAST_PARAMS in own else initial


@dataclass
class Traffic:
    """The bytes of a round by direction and kind, summed over the cohort."""

    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(works: Sequence[ClientWork], results: Sequence[ClientResult]) -> Traffic:
        """Count the broadcasts and the uploads."""
        sent = Traffic()
        sent.add([work.payload for work in works], [result.payload for result in results])
        return sent

    def add(self, down: Sequence[Payload], up: Sequence[Payload]) -> None:
        """Count more messages."""
        for counted, payloads in ((self.down, down), (self.up, up)):
            for payload in payloads:
                for kind, size in payload.bytes_by_kind().items():
                    counted[kind] = counted.get(kind, 0) + size

    def record(self) -> dict[str, dict[str, int]]:
        """Return the bytes for the metrics file."""
        return {"down": self.down, "up": self.up}


def cohort_size(participation: float, clients: int) -> int:
    """Return how many clients a round has, or has on average where each is drawn for itself; at least 1."""
    return max(1, round_half_up(participation * clients))


def round_half_up(value: float) -> int:
    """Return the nearest integer; a half goes up, so that 0.25 of 10 clients is 3."""
    return int(value + 0.5 + 1e-9)
