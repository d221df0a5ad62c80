"""A cohort trained as one batched model: stacked parameters, one ``torch.func`` step for many clients.

Clients need not have the same number of samples. Each goes through its own batches in its own order; in every tick
those whose next batch has the same size step together, and a client that has finished no longer moves. Every sum is a
client's own, so that the results are those of one client after another up to rounding.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from fedstill.client import ClientResult, ClientWork, LocalTrainer, Site, check_finite
from fedstill.data.augment import Moves, moved
from fedstill.data.dataset import Share
from fedstill.errors import RunError
from fedstill.execution.executors import Models, SerialExecutor, ThreadExecutor
from fedstill.methods.base import LocalObjective, Turn
from fedstill.models.anatomy import split_state
from fedstill.models.randomness import draws_random_numbers
from fedstill.models.stateless import Stateless
from fedstill.training import CLIP_EPSILON, Trained
from fedstill.weights import State, Tensors, Weights

Stack = dict[str, Tensor]
"""Tensors by name with a leading dimension of clients."""


Step = Callable[[Stack, Stack, Tensor, Tensor, State], tuple[Stack, tuple[Tensor, Stack, Stack]]]
"""The batched gradient step: (params, buffers, x, y, extras) -> grads, (loss, noted, new buffers)."""


@dataclass
class Steps:
    """Makes the batched steps of a run, and keeps those that were compiled.

    Parameters
    ----------
    compiled : bool
        Whether ticks of the usual shape, all clients with a whole batch, go through ``torch.compile``. Every other
        shape would have to be compiled for itself.
    """

    compiled: bool = False
    kept: dict[tuple[int, int], tuple[object, object, Step]] = field(default_factory=dict)

    def of(self, objective: LocalObjective, model: Stateless) -> tuple[Step, Step]:
        """Return the step for any tick, and the one for ticks of the usual shape."""
        step = _step_of(objective, model)
        if not self.compiled:
            return step, step
        key = id(objective), id(model)  # of objects that are kept too
        if key not in self.kept:
            self.kept[key] = objective, model, _compiled(step, model)
        return step, self.kept[key][2]


@dataclass
class VectorizedExecutor:
    """The cohort in chunks, each as one batched model.

    Parameters
    ----------
    inner : SerialExecutor or ThreadExecutor
        Runs the chunks: one after another, or several at a time.
    workers : int
        How many chunks an architecture's clients make at least, one for each worker.
    at_once : int or None
        Largest number of clients in a chunk, which bounds the memory; None for no bound.
    steps : Steps
        What clients do in a tick.
    """

    inner: SerialExecutor | ThreadExecutor
    workers: int = 1
    at_once: int | None = None
    steps: Steps = field(default_factory=Steps)

    def run(self, train: LocalTrainer, works: Sequence[ClientWork]) -> Iterator[ClientResult]:
        """Yield the results chunk by chunk."""

        def train_chunk(models: Models, chunk: Sequence[ClientWork]) -> list[ClientResult]:
            began = time.perf_counter()
            turns = train_together(train, [train.site(models, work) for work in chunk], self.steps)
            seconds = (time.perf_counter() - began) / len(chunk)
            return [train.result(work, turn, seconds) for work, turn in zip(chunk, turns, strict=True)]

        for results in self.inner.run(train_chunk, self.chunks(works)):
            yield from results

    def chunks(self, works: Sequence[ClientWork]) -> list[Sequence[ClientWork]]:
        """Return the works in parts of one architecture, of nearly equal size."""
        by_architecture: dict[int, list[ClientWork]] = defaultdict(list)
        for work in works:
            by_architecture[work.architecture].append(work)
        parts: list[Sequence[ClientWork]] = []
        for own in by_architecture.values():
            count = max(self.workers, math.ceil(len(own) / (self.at_once or len(own))))
            cuts = [round(len(own) * part / count) for part in range(count + 1)]
            parts += [own[first:last] for first, last in pairwise(cuts) if first < last]
        return parts

    def close(self) -> None:
        """End the workers."""
        self.inner.close()


def why_not(objective: LocalObjective, model: Stateless, shape: tuple[int, ...]) -> str | None:
    """Say why clients of a method and an architecture cannot be trained as one batch; None where they can."""
    if type(objective).run is not LocalObjective.run:
        return "its clients do more than SGD on one loss"
    module = model.module
    if draws_random_numbers(module):
        return "layers of its model draw random numbers"
    params, buffers = (_repeated(part) for part in split_state(module))
    like = next(iter(params.values()))
    x = torch.zeros((2, 2, *shape), dtype=like.dtype, device=like.device)

    def loss(params: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
        return model(params, {name: value.clone() for name, value in buffers.items()}, x, train=True).square().mean()

    try:
        torch.func.vmap(torch.func.grad(loss))(params, buffers, x)
    except (RuntimeError, ValueError, NotImplementedError) as error:  # what torch.func raises at what it cannot batch
        return f"its model cannot be batched over clients ({str(error).splitlines()[0]})"
    return None


def train_together(train: LocalTrainer, sites: Sequence[Site], steps: Steps) -> list[Turn]:
    """Run the local round of several clients of one architecture; turns are in the order of ``sites``.

    Raises
    ------
    RunError
        If a client's training turns non-finite; it names the round, the client and the step.
    """
    jobs = [Job.of(train, site) for site in sites]
    groups: dict[object, list[Job]] = defaultdict(list)
    for job in jobs:
        groups[job.signature()].append(job)
    for group in groups.values():
        Batch(train, group, steps).train()
    return [job.turn(train.objective) for job in jobs]


@dataclass
class Job:
    """One client's part of a batch: what it starts from, its batches to come, and what it has noted."""

    site: Site
    extras: State
    draws: Tensors
    start: Weights
    order: list[Tensor]
    weight_decay: float
    moves: list[Moves] | None
    trained: Trained | None = None

    @staticmethod
    def of(train: LocalTrainer, site: Site) -> Job:
        """Prepare a client's round."""
        objective = train.objective
        device = site.own.y.device
        draws = objective.draws(site.received, site.task, site.stream("objective"))
        order = site.order()
        return Job(
            site,
            objective.prepare(site.received, site.state, site.task),
            {name: value.to(device) for name, value in draws.items()},
            objective.own_model(site.received, site.state, site.initial),
            order,
            site.local.weight_decay + objective.extra_weight_decay(site.received, site.task),
            site.moves(order),
        )

    def signature(self) -> object:
        """Return what clients must share to be stacked: names and shapes of all their tensors, but for the steps."""
        extras = {(group, name, value.shape) for group, own in self.extras.items() for name, value in own.items()}
        draws = {(name, value.shape[1:]) for name, value in self.draws.items()}
        return frozenset(extras), frozenset(draws)

    def turn(self, objective: LocalObjective) -> Turn:
        """Finish the client's round."""
        site, trained = self.site, self.trained
        assert trained is not None
        check_finite(trained, site.task)
        payload, state = objective.finish(site.received, site.state, trained, site.task)
        return Turn(payload, state, trained.steps, trained.loss)


@dataclass
class Batch:
    """Clients that are stacked: their parameters as they stand, and where each is in its batches."""

    train_with: LocalTrainer
    jobs: Sequence[Job]
    steps: Steps
    losses: list[list[Tensor]] = field(default_factory=list)
    norms: list[list[Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        jobs, local = self.jobs, self.train_with.local
        self.params = _stacked([job.start.params for job in jobs], own=True)
        self.buffers = _stacked([job.start.buffers for job in jobs], own=True)
        groups = jobs[0].extras
        self.extras = {group: _stacked([job.extras[group] for job in jobs]) for group in groups}
        like = next(iter(self.params.values()))
        self.decay = torch.tensor([job.weight_decay for job in jobs], dtype=like.dtype, device=like.device)
        self.places: dict[tuple[int, ...], Tensor] = {}
        self.velocity = {name: torch.zeros_like(value) for name, value in self.params.items()} if local.momentum else {}
        self.done = [0] * len(jobs)
        self.sums: list[Tensors] = [{} for _ in jobs]
        self.losses, self.norms = [[] for _ in jobs], [[] for _ in jobs]
        self.step, self.usual_step = self.steps.of(self.train_with.objective, jobs[0].site.model)

    def train(self) -> None:
        """Take all steps of all clients, and give each its result."""
        while members := self.next_members():
            self.jobs[0].site.check_stop()
            self.tick(members)
        for place, job in enumerate(self.jobs):
            weights = Weights(_row(self.params, place), _row(self.buffers, place))
            like = job.start.params[next(iter(job.start.params))]
            losses = torch.stack(self.losses[place]) if self.losses[place] else like.new_zeros(0)
            norms = torch.stack(self.norms[place]) if self.norms[place] else None
            labels = job.site.own.y[torch.cat(job.order)] if job.order else job.site.own.y[:0]
            job.trained = Trained(weights, len(job.order), losses, norms, labels, self.sums[place])

    def next_members(self) -> list[int]:
        """Return the clients that step next: the most that have the same size of batch before them."""
        waiting: dict[int, list[int]] = defaultdict(list)
        for place, job in enumerate(self.jobs):
            if self.done[place] < len(job.order):
                waiting[len(job.order[self.done[place]])].append(place)
        return max(waiting.items(), key=lambda item: (len(item[1]), item[0]))[1] if waiting else []

    def tick(self, members: list[int]) -> None:
        """Let some clients take a step each."""
        at = self.rows_of(members)

        def chosen(stack: Stack) -> Stack:
            return stack if at is None else {name: value[at] for name, value in stack.items()}

        x, y = self.samples(members)
        params, extras = chosen(self.params), {group: chosen(own) for group, own in self.extras.items()}
        if draws := self.draws(members):
            extras["draws"] = draws
        step = self.usual_step if at is None and y.shape[1] == self.train_with.local.batch_size else self.step
        grads, (loss, noted, buffers) = step(params, chosen(self.buffers), x, y, extras)
        self.update(params, grads, extras, members, at)
        self.put(self.buffers, buffers, at)
        for row, place in enumerate(members):
            self.losses[place].append(loss[row])
            own = self.sums[place]
            self.sums[place] = {n: own[n] + v[row] if n in own else v[row] for n, v in noted.items()}
            self.done[place] += 1

    def rows_of(self, members: list[int]) -> Tensor | None:
        """Return the members' rows in the stacks, on the device; None for everyone's."""
        if len(members) == len(self.jobs):
            return None
        key = tuple(members)
        if key not in self.places:  # brought there once, not in every tick: a GPU would be waited for
            self.places[key] = torch.tensor(members, device=self.decay.device)
        return self.places[key]

    def samples(self, members: list[int]) -> tuple[Tensor, Tensor]:
        """Return the next batches (clients, B, ...) and their labels (clients, B)."""
        train = self.train_with
        own = [self.jobs[place] for place in members]
        batches = [job.order[self.done[place]] for job, place in zip(own, members, strict=True)]
        at = torch.stack([cast(Share, job.site.own).rows[batch] for job, batch in zip(own, batches, strict=True)])
        x = train.samples.x.index_select(0, at.view(-1))  # far faster than x[at] on a CPU
        moves = [job.moves[self.done[place]] for job, place in zip(own, members, strict=True) if job.moves]
        x = moved(x, Moves.joined(moves)) if moves else x
        return x.view(*at.shape, *x.shape[1:]), train.samples.y[at]

    def draws(self, members: list[int]) -> Stack:
        """Return the rows of the clients' random numbers that belong to their next steps."""
        names = self.jobs[members[0]].draws
        return {
            name: torch.stack([self.jobs[place].draws[name][self.done[place]] for place in members]) for name in names
        }

    @torch.no_grad()
    def update(self, params: Stack, grads: Stack, extras: State, members: list[int], at: Tensor | None) -> None:
        """Correct, clip, decay and step, each client for itself, in the order of the serial loop.

        ``params`` is changed in place: the stack itself where everyone steps, else a copy of the members' rows.
        """
        local, names = self.train_with.local, list(params)
        values = [params[name] for name in names]
        steps = self.train_with.objective.adjust([grads[name] for name in names], params, extras)
        if local.clip_norm is not None:
            norms = torch.stack([torch.linalg.vector_norm(step.flatten(1), dim=1) for step in steps])
            norm = torch.linalg.vector_norm(norms, dim=0)
            factor = torch.clamp(local.clip_norm / (norm + CLIP_EPSILON), max=1.0)
            steps = list(torch._foreach_mul(steps, [_over(factor, step) for step in steps]))
            for row, place in enumerate(members):
                self.norms[place].append(norm[row])
        if any(job.weight_decay for job in self.jobs):
            decay = self.decay if at is None else self.decay[at]
            steps = list(torch._foreach_addcmul(steps, [_over(decay, value) for value in values], values))
        if local.momentum:
            before = self.velocity if at is None else {name: value[at] for name, value in self.velocity.items()}
            velocity = {n: local.momentum * before[n] + step for n, step in zip(names, steps, strict=True)}
            self.put(self.velocity, velocity, at)
            steps = [velocity[name] for name in names]
        torch._foreach_add_(values, steps, alpha=-self.jobs[0].site.task.lr)
        if at is not None:
            self.put(self.params, params, at)

    def put(self, stack: Stack, rows: Stack, at: Tensor | None) -> None:
        """Write the members' rows into the stack."""
        for name, value in rows.items():
            if at is None:
                stack[name] = value
            else:
                stack[name][at] = value


def _step_of(objective: LocalObjective, model: Stateless) -> Step:
    """Return a method's batched gradient step on a model."""

    def one(params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State) -> tuple[Tensors, Any]:
        def loss(params: Tensors) -> tuple[Tensor, Any]:
            own = {name: value.clone() for name, value in buffers.items()}
            value, noted = objective.loss_and_sums(model, params, own, x, y, extras)
            return value, (value.detach(), noted, own)

        grads, aux = torch.func.grad(loss, has_aux=True)(params)
        return grads, aux

    return cast(Step, torch.func.vmap(one))


def _compiled(step: Step, model: Stateless) -> Step:
    """Return the step through ``torch.compile``; RunError where PyTorch cannot."""
    from torch._dynamo.exc import TorchDynamoException  # seconds, for those who compile

    def own(params: Stack, buffers: Stack, x: Tensor, y: Tensor, extras: State) -> Any:
        return step(params, buffers, x, y, extras)

    # What was compiled is kept, and limited, for each code object; without one of its own, many workers' share one.
    own.__code__ = own.__code__.replace()
    fast = torch.compile(own, dynamic=False)

    def run(params: Stack, buffers: Stack, x: Tensor, y: Tensor, extras: State) -> Any:
        model.module.train()  # else it would be compiled once more after an evaluation
        try:
            return fast(params, buffers, x, y, extras)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise RunError(
                f"execution.compile: PyTorch cannot compile this step ({reason}); leave the key out"
            ) from error

    return run


def _stacked(models: Sequence[Tensors], own: bool = False) -> Stack:
    """Stack tensors by name; one that all clients share is not copied, unless each needs its own."""
    found: Stack = {}
    for name, first in models[0].items():
        values = [model[name] for model in models]
        shared = all(value is first for value in values) and not own
        found[name] = first.expand(len(values), *first.shape) if shared else torch.stack(values).detach()
    return found


def _row(stack: Stack, place: int) -> Tensors:
    return {name: value[place].clone() for name, value in stack.items()}


def _over(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per client in a shape that multiplies a stacked tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _repeated(tensors: Tensors) -> Stack:
    return {name: torch.stack([value.detach(), value.detach()]) for name, value in tensors.items()}
