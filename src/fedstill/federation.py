"""The round loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedstill.client import ClientResult, ClientWork, LocalTrainer
from fedstill.config import Config
from fedstill.data.dataset import Samples
from fedstill.data.partition import Partition
from fedstill.distill.teachers import StackedTeachers, ensemble_accuracy
from fedstill.errors import RunError
from fedstill.evaluation import by_label_mix, evaluate
from fedstill.execution import Executor, intra_op_threads
from fedstill.methods.base import FederationInfo, Method, RefineContext, Refined, ServerState, Upload
from fedstill.models.randomness import layers_draw_from
from fedstill.models.stateless import Stateless
from fedstill.payload import Kind, Payload, problem_with, problem_with_counts
from fedstill.rng import numpy_stream, seed_of, torch_stream
from fedstill.weights import State, Weights

Record = dict[str, object]


@dataclass(frozen=True)
class FederationState:
    """All that the next round depends on; what a checkpoint holds.

    Random streams are not in it: each is made anew from (seed, round, client, purpose).
    """

    round: int
    server: ServerState
    refinements: tuple[State, ...] = ()
    clients: dict[int, State] = field(default_factory=dict)
    label_counts: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationSets:
    """The samples on which models are measured, by name, and those for the ensembles."""

    sets: dict[str, Samples]
    clients: list[Samples] | None
    ensembles: Samples | None


@dataclass
class Federation:
    """A method, the clients' data and an executor; made by :func:`fedstill.build.build`."""

    config: Config
    method: Method
    info: FederationInfo
    partition: Partition
    model: Stateless
    initial: Weights
    trainer: LocalTrainer
    executor: Executor
    evaluation: EvaluationSets
    device: torch.device
    on_client: Callable[[int, int, int], None] = lambda round, done, of: None

    def start(self) -> FederationState:
        """Return the state before the first round."""
        server = self.method.fusion.start(self.initial, self.info)
        return FederationState(0, server, tuple({} for _ in self.method.refinements))

    def run_round(self, state: FederationState) -> tuple[FederationState, Record]:
        """Run one round: sample, broadcast, train, fuse, refine, evaluate.

        Returns
        -------
        state, record
            The next state, and what was measured, ready for the metrics file.
        """
        clock = Clock()
        cohort = self.sample_cohort(state.round)
        works = [self.work(state, client) for client in cohort]
        with clock("train"):
            results = self.train(state.round, works)
        uploads, counts = self.receive(state, results)
        with clock("fuse"), intra_op_threads(self.config.execution.server_threads):
            fused = self.method.fusion.fuse(state.server, uploads, self.info)
        with clock("refine"):
            teachers = self.teachers(uploads)
            server, kept, measured = self.refine(state, fused, uploads, teachers)
        record: Record = {"round": state.round + 1, "cohort": cohort}
        with clock("evaluate"):
            record |= self.evaluate(state.round, fused.weights, server.weights, teachers)
        record |= {"refinement": measured, "train_loss": sum(r.loss for r in results) / len(results)}
        record |= {"bytes": traffic(works, results), "seconds": clock.seconds}
        clients = {**state.clients, **{result.client: result.state for result in results if result.state}}
        return FederationState(state.round + 1, server, kept, clients, {**state.label_counts, **counts}), record

    def sample_cohort(self, round: int) -> list[int]:
        """Return the clients of a round, ascending; the same for every method of one seed."""
        stream = numpy_stream(self.config.seed.train, "cohort", round)
        total, part = len(self.info.samples), self.config.train.participation
        if self.config.train.sampling == "fixed":
            size = max(1, round_half_up(part * total))
            return sorted(int(client) for client in stream.choice(total, size, replace=False))
        while True:
            cohort = [client for client in range(total) if stream.random() < part]
            if cohort:
                return cohort

    def work(self, state: FederationState, client: int) -> ClientWork:
        """Return what one client gets; it is asked for its label counts once."""
        payload = self.method.fusion.broadcast(state.server, client, self.info)
        ask = self.method.needs_label_counts and client not in state.label_counts
        return ClientWork(state.round, client, payload, state.clients.get(client, {}), ask)

    def train(self, round: int, works: Sequence[ClientWork]) -> list[ClientResult]:
        """Run the cohort and return its results in client-id order, whatever order they came in."""
        results: list[ClientResult] = []
        self.trainer.stop.clear()
        try:
            for result in self.executor.run(self.trainer, works):
                results.append(result)
                self.on_client(round, len(results), len(works))
        finally:
            self.trainer.stop.set()
        return sorted(results, key=lambda result: result.client)

    def receive(
        self, state: FederationState, results: Sequence[ClientResult]
    ) -> tuple[list[Upload], dict[int, Tensor]]:
        """Check the uploads; nothing malformed or non-finite goes further."""
        known = dict(state.label_counts)
        uploads = []
        like = self.method.fusion.upload_like(state.server)
        counts = {"counts": torch.zeros(self.info.num_classes, dtype=torch.int32)}
        for result in results:
            samples = self.info.samples[result.client]
            asked = self.method.needs_label_counts and result.client not in known
            problem = problem_with(result.payload, like.also(Kind.LABEL_COUNTS, counts) if asked else like)
            if not problem and asked:
                known[result.client] = result.payload[Kind.LABEL_COUNTS]["counts"].long()
                problem = problem_with_counts(known[result.client], samples)
            if problem:
                raise RunError(f"round {state.round + 1}, client {result.client}: refused its upload: {problem}")
            uploads.append(Upload(result.client, result.payload, samples, result.steps, known.get(result.client)))
        return uploads, known

    def refine(
        self, state: FederationState, fused: ServerState, uploads: Sequence[Upload], teachers: StackedTeachers
    ) -> tuple[ServerState, tuple[State, ...], Record]:
        """Let every refinement improve the fused model in turn."""
        server, kept = fused, []
        measured: Record = {}
        for refinement, own in zip(self.method.refinements, state.refinements, strict=True):
            context = self.context(state.round, uploads, refinement.simulation_only)
            seed = seed_of(self.config.seed.train, "layers", state.round, refinement.name)
            layers = layers_draw_from(self.model.module, self.device, seed)
            with intra_op_threads(self.config.execution.server_threads), layers:
                refined: Refined = refinement.refine(self.model, server.weights, teachers, own, context)
            if not refined.weights.all_finite():
                raise RunError(
                    f"round {state.round + 1}: {refinement.name} made the global model non-finite; "
                    f"a smaller {refinement.name}.lr_student usually helps"
                )
            server = replace(server, weights=refined.weights)
            kept.append(refined.state)
            measured[refinement.name] = refined.metrics
        return server, tuple(kept), measured

    def context(self, round: int, uploads: Sequence[Upload], with_real: bool) -> RefineContext:
        """Return what a refinement may use in a round."""
        real = None
        if with_real:
            everyone = torch.cat([self.trainer.shares[upload.client] for upload in uploads])
            real = self.trainer.samples.take(everyone.to(self.device))

        def stream(purpose: str) -> torch.Generator:
            return torch_stream(self.config.seed.train, purpose, round, device=self.device)

        decay = self.config.local.lr_decay**round
        return RefineContext(round, self.info, decay, stream, self.device, real)

    def teachers(self, uploads: Sequence[Upload]) -> StackedTeachers:
        """Return the cohort's models as one stack.

        Label counts come from the uploads; where the method does not ask for them, from the clients' data, which
        only a simulation knows.
        """
        counts = torch.stack(
            [
                self.trainer.label_counts(upload.client).long() if upload.label_counts is None else upload.label_counts
                for upload in uploads
            ]
        )
        return StackedTeachers.of(self.model, [upload.weights for upload in uploads], counts)

    def evaluate(self, round: int, fused: Weights, refined: Weights, teachers: StackedTeachers) -> Record:
        """Measure the fused model, the refined one, and now and then the ensembles that bound any refinement."""
        record: Record = {}
        with intra_op_threads(self.config.execution.server_threads):
            if self.due(round, self.config.eval.every):
                record["fused"] = self.scores(fused)
                if self.method.refinements:
                    record["refined"] = self.scores(refined)
            samples = self.evaluation.ensembles
            if samples is not None and self.due(round, self.config.eval.ensembles_every):
                size = self.config.eval.batch_size
                record["ensembles"] = {
                    "uniform": ensemble_accuracy(teachers, samples.x, samples.y, "uniform", size),
                    "class_weighted": ensemble_accuracy(teachers, samples.x, samples.y, "class", size),
                }
        return record

    def scores(self, weights: Weights) -> Record:
        """Return a model's scores on every evaluation set."""
        classes, size = self.info.num_classes, self.config.eval.batch_size
        record: Record = {}
        for name, samples in self.evaluation.sets.items():
            score = evaluate(self.model, weights, samples, classes, size)
            record[name] = score.record()
            if name == "test":
                record["by_client_label_mix"] = by_label_mix(score, self.partition.counts.tolist())
        if self.evaluation.clients is not None:
            own = [evaluate(self.model, weights, part, classes, size) for part in self.evaluation.clients]
            right, seen = sum(int(s.right.sum()) for s in own), sum(int(s.seen.sum()) for s in own)
            record["clients"] = {
                "accuracy": right / max(seen, 1),
                "per_client": [score.accuracy if int(score.seen.sum()) else None for score in own],
            }
        return record

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


def traffic(works: Sequence[ClientWork], results: Sequence[ClientResult]) -> dict[str, dict[str, int]]:
    """Return the bytes of a round by direction and kind, summed over the cohort."""

    def total(payloads: Sequence[Payload]) -> dict[str, int]:
        summed: dict[str, int] = {}
        for payload in payloads:
            for kind, size in payload.bytes_by_kind().items():
                summed[kind] = summed.get(kind, 0) + size
        return summed

    return {"down": total([work.payload for work in works]), "up": total([result.payload for result in results])}


def round_half_up(value: float) -> int:
    """Return the nearest integer; a half goes up, so that 0.25 of 10 clients is 3."""
    return int(value + 0.5 + 1e-9)
