"""What holds for every base method, whatever it is: nothing here knows how a method works."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedstill.conformance.bench import Play, network
from fedstill.conformance.findings import (
    DoesNotApply,
    Verdict,
    agree,
    all_of,
    check,
    copied,
    differ,
    leaves,
    mismatch,
    only_tensors,
)
from fedstill.conformance.subject import Subject
from fedstill.federation import FederationState, GlobalModel
from fedstill.methods.base import LocalObjective
from fedstill.payload import Kind, problem_with
from fedstill.runs.checkpoint import CheckpointStore
from fedstill.weights import State, Tensors

ROUNDS = ((0, 1, 2), (1, 2), (0, 2))
"""Cohorts: everybody, then two with somebody absent."""


def played(subject: Subject, rounds: int = 2, **local: Any) -> Play:
    """Return a federation of small networks with BatchNorm, some rounds on."""
    play = Play(subject, network(), **{"batch_size": 4, **local})
    for cohort in ROUNDS[:rounds]:
        play.play(cohort)
    return play


@check(without="A method that works only because the simulation shares memory breaks as soon as messages travel.")
def inputs_not_changed(subject: Subject) -> Verdict:
    """A turn and a fusion leave what they were given as it was: messages, states, data, the server's model."""
    play = played(subject)
    given = {
        "server": {"weights": leaves(play.server.weights), "method": leaves(play.server.method)},
        "states": {str(client): leaves(state) for client, state in play.states.items()},
        "data": {"x": play.trainer.samples.x, "y": play.trainer.samples.y},
        "initial": leaves(play.problem.initial),
    }
    before = copied(given)
    sent = {client: play.sent(client) for client in (0, 1)}
    wire = copied({str(client): leaves(payload) for client, payload in sent.items()})
    uploads = [play.upload(play.turn(client, sent=sent[client])) for client in (0, 1)]
    after_turn = agree(given, before, 0, "after two turns")
    payloads = copied({str(one.client): leaves(one.payload) for one in uploads})
    play.fused(uploads)
    return all_of(
        after_turn,
        agree({str(client): leaves(payload) for client, payload in sent.items()}, wire, 0, "the broadcasts"),
        agree(given, before, 0, "after the fusion"),
        agree({str(one.client): leaves(one.payload) for one in uploads}, payloads, 0, "the uploads"),
    )


@check(without="Two runs of one seed differ, no difference between methods can be trusted, and resuming is a new run.")
def same_bits_twice(subject: Subject) -> Verdict:
    """The same turn and the same fusion, done twice, give the same bits."""
    play = played(subject)
    with streams_at(1):
        first = [play.turn(client) for client in (0, 1)]
        one = play.fused([play.upload(result) for result in first])
    with streams_at(1):
        second = [play.turn(client) for client in (0, 1)]
        other = play.fused([play.upload(result) for result in second])
    return all_of(
        *[agree(a.payload, b.payload, 0, f"upload of client {a.client}") for a, b in zip(first, second)],
        *[agree(a.state, b.state, 0, f"state of client {a.client}") for a, b in zip(first, second)],
        agree(one.weights, other.weights, 0, "fused model"),
        agree(one.method, other.method, 0, "server state"),
    )


@check(without="Clients in threads draw from one stream in whatever order they come; nothing can be reproduced.")
def global_stream_untouched(subject: Subject) -> Verdict:
    """Nothing is drawn from a stream of the whole process: PyTorch's, NumPy's and Python's stand as they stood."""
    play, outcomes = played(subject), []
    for seed in (1, 2):
        with streams_at(seed):
            before = positions()
            uploads = [play.upload(play.turn(client)) for client in (0, 1)]
            server = play.fused(uploads)
            moved = [name for name, place in positions().items() if place != before[name]]
        if moved:
            return Verdict(False, f"the global stream of {', '.join(moved)} has moved")
        outcomes.append({"uploads": {str(one.client): leaves(one.payload) for one in uploads},
                         "server": leaves(server.weights), "method": leaves(server.method)})  # fmt: skip
    return agree(outcomes[0], outcomes[1], 0, "under two seeds of the global streams")


@check(
    without="With partial participation a client starts from nothing, or from a neighbour's state, after every absence."
)
def state_outlives_absence(subject: Subject) -> Verdict:
    """A client that was absent comes back with the state that it left, to the bit, and uses it."""
    play = Play(subject, network(), batch_size=4)
    play.play((0, 1, 2))
    left = play.states.get(0, {})
    if not left:
        raise DoesNotApply("its clients keep nothing")
    before = copied(left)
    play.play((1, 2))
    play.play((1, 2))
    present, absent = dependence(play, 1), dependence(play, 0)
    if not any(present.values()):
        raise DoesNotApply("what its clients keep changes nothing")
    lost = [part for part, depends in present.items() if depends and not absent[part]]
    if lost:
        return Verdict(False, f"after two rounds of absence the {lost[0]} is that of a client which never took part")
    return all_of(agree(left, before, 0, "state of the absentee"), Verdict(True, "it depends on it when it is back"))


def dependence(play: Play, client: int) -> dict[str, bool]:
    """Say whether what a client uploads, and what it then keeps, depends on what it has kept."""
    own, fresh = play.turn(client), play.turn(client, state={})
    return {
        "upload": mismatch(own.payload, fresh.payload)[1] > 0,
        "state": mismatch(own.state, fresh.state)[1] > 0,
    }


@check(without="Results depend on which worker trained which client, and a client is corrected with another's past.")
def state_is_the_clients_own(subject: Subject) -> Verdict:
    """A client's upload and state do not depend on who worked before it on the same machine."""
    play = played(subject)
    forward = {client: play.turn(client) for client in (0, 1, 2)}
    backward = {client: play.turn(client) for client in (2, 1, 0)}
    return all_of(
        *[agree(forward[k].payload, backward[k].payload, 0, f"upload of client {k}") for k in (0, 1, 2)],
        *[agree(forward[k].state, backward[k].state, 0, f"state of client {k}") for k in (0, 1, 2)],
    )


@check(without="Weights are taken by place instead of by client: in a partial cohort they are a stranger's.")
def order_of_uploads(subject: Subject) -> Verdict:
    """The fusion gives the same, up to rounding, whatever the order in which uploads came in."""
    play = played(subject)
    uploads = [play.upload(play.turn(client)) for client in (0, 1, 2)]
    one, other = play.fused(uploads), play.fused(uploads[::-1])
    return all_of(
        agree(one.weights, other.weights, 1e-9, "fused model"), agree(one.method, other.method, 1e-7, "server state")
    )


@check(without="The global model's normalisation is the initial one, or one client's, and its accuracy collapses.")
def batchnorm_buffers(subject: Subject) -> Verdict:
    """BatchNorm's running statistics are averaged with the declared client weights; its integer counter stays one."""
    play = played(subject)
    if not play.server.weights.buffers:
        raise DoesNotApply("no buffers are shared")
    uploads = [play.upload(play.turn(client)) for client in (0, 1, 2)]
    if Kind.BUFFERS not in uploads[0].payload:
        raise DoesNotApply("buffers stay with the clients")
    fused = play.fused(uploads).weights.buffers
    sizes = [float(one.samples) if play.fusion.client_weights == "samples" else 1.0 for one in uploads]
    verdicts = []
    for name, value in fused.items():
        own = [one.payload[Kind.BUFFERS][name].double() for one in uploads]
        mean = torch.stack([size * one for size, one in zip(sizes, own)]).sum(0) / sum(sizes)
        if play.problem.initial.buffers[name].is_floating_point():
            verdicts.append(agree(value, mean, 1e-12, name))
        elif value.is_floating_point():
            verdicts.append(Verdict(False, f"{name} was an integer and is {value.dtype}"))
        else:
            verdicts.append(agree(value, (mean + 1e-9).floor().long(), 0, name))
    return all_of(*verdicts)


@check(without="Step sizes that were meant for round 0 are used for ever; at round 1000 a factor of 7 is wrong.")
def rate_of_the_round(subject: Subject) -> Verdict:
    """In a later round only the learning rate of that round counts, and not the one of round 0."""
    outcomes = []
    for lr, decay in ((0.1, 1.0), (0.8, 0.5)):  # both have 0.1 in round 3
        play = played(subject, lr=0.1)
        play.round = 3
        play.trainer.local = play.local.model_copy(update={"lr": lr, "lr_decay": decay})
        result = play.turn(0)
        outcomes.append({"upload": leaves(result.payload), "state": leaves(result.state)})
    return agree(outcomes[0], outcomes[1], 1e-12, "rate 0.1 now, and 0.1 or 0.8 in round 0")


@check(without="It works in simulation and fails on the first network: a message holds what cannot be sent.")
def survives_the_wire(subject: Subject) -> Verdict:
    """Rounds in which every message travels as bytes end as rounds in which none does."""
    direct, wired = (Play(subject, network(), wire=wire, batch_size=4, clip_norm=0.5) for wire in (False, True))
    for cohort in ROUNDS:
        direct.play(cohort)
        wired.play(cohort)
    return all_of(
        agree(wired.server.weights, direct.server.weights, 0, "global model"),
        agree(wired.server.method, direct.server.method, 0, "server state"),
        *[agree(wired.states.get(k, {}), direct.states.get(k, {}), 0, f"state of client {k}") for k in (0, 1, 2)],
    )


@check(without="A run that was stopped goes on as another run: part of its state was only in memory.")
def survives_a_checkpoint(subject: Subject) -> Verdict:
    """All state is tensors, and a round after saving and loading gives the bits of an uninterrupted one."""
    play = played(subject, clip_norm=0.5)
    kept = [only_tensors(state, f"state of client {client}") for client, state in play.states.items()]
    typed = all_of(only_tensors(play.server.method, "server state"), *kept)
    if not typed.held:
        return typed
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), 1, "conformance")
        store.save(FederationState(2, (GlobalModel(play.server),), play.states, play.known))
        loaded = CheckpointStore(Path(folder), 1, "conformance").load()
    assert loaded is not None
    other = played(subject, rounds=0, clip_norm=0.5)  # nothing but the checkpoint is known here
    other.round = 2
    other.server, other.states = loaded.server, dict(loaded.clients)
    other.known = loaded.label_counts
    play.play(ROUNDS[2])
    other.play(ROUNDS[2])
    return all_of(
        agree(other.server.weights, play.server.weights, 0, "global model"),
        agree(other.server.method, play.server.method, 0, "server state"),
        *[agree(other.states.get(k, {}), play.states.get(k, {}), 0, f"state of client {k}") for k in (0, 1, 2)],
    )


@check(without="The server refuses every upload in float32, the precision that users train in.")
def uploads_are_as_declared(subject: Subject) -> Verdict:
    """In float32 every upload has the kinds, names, shapes and types that ``upload_like`` declares, and is finite."""
    play = Play(subject, network(dtype=torch.float32), batch_size=4)
    for round_, cohort in enumerate(ROUNDS):
        like = play.fusion.upload_like(play.server)
        asked = play.fusion.needs_label_counts
        for one in play.play(cohort):
            own = one.payload
            if asked and Kind.LABEL_COUNTS not in like:
                own = type(own)({kind: own[kind] for kind in own.parts if kind is not Kind.LABEL_COUNTS})
            if problem := problem_with(own, like):
                return Verdict(False, f"round {round_ + 1}, client {one.client}: {problem}")
    return Verdict(True, "three rounds of uploads are as declared")


@check(without="Clients cannot be trained together on a GPU: a batched step fails, or gives another client's gradient.")
def steps_batch_over_clients(subject: Subject) -> Verdict:
    """The loss's gradient under ``torch.func.vmap``, and ``adjust`` on the clients' stack, agree with one at a time."""
    play = played(subject, steps=1)
    objective, model = play.objective, play.problem.model
    if type(objective).run is not LocalObjective.run:
        raise DoesNotApply("its clients do something else than SGD on one loss")

    def loss(params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State) -> tuple[Tensor, Noted]:
        value, sums = objective.loss_and_sums(model, params, buffers, x, y, extras)
        return value, (value.detach(), sums)

    gradient = torch.func.grad(loss, has_aux=True)
    many = [step_of(play, client) for client in (1, 2)]
    stacked = cast(Step, tuple(stack([step[part] for step in many]) for part in range(5)))
    together, (values, sums) = torch.func.vmap(gradient)(*stacked)
    corrected = dict(zip(together, objective.adjust(list(together.values()), stacked[0], stacked[4]), strict=True))
    all_ = {"gradient": together, "corrected": corrected, "loss": {"value": values}, "sums": sums}
    verdicts, slopes = [], []
    for place, step in enumerate(many):
        alone, (value, noted) = gradient(*step)
        right = dict(zip(alone, objective.adjust(list(alone.values()), step[0], step[4]), strict=True))
        own = {"gradient": alone, "corrected": right, "loss": {"value": value}, "sums": noted}
        got = {what: {name: tensor[place] for name, tensor in part.items()} for what, part in all_.items()}
        verdicts.append(agree(got, own, 1e-9, f"client {place + 1}"))
        slopes.append(alone)
    return all_of(*verdicts, differ(slopes[0], slopes[1], "the two clients' gradients"))


Noted = tuple[Tensor, Tensors]
Step = tuple[Tensors, Tensors, Tensor, Tensor, State]


def step_of(play: Play, client: int) -> Step:
    """Return the arguments of a client's first step; each client stands at a model of its own."""
    work = play.work(client)
    sent, state = work.payload, work.state
    site = play.trainer.site([play.problem.model], work)
    start = play.objective.own_model(sent, state, play.problem.initial)
    extras: State = dict(play.objective.prepare(sent, state, site.task))
    draws = play.objective.draws(sent, site.task, site.stream("objective"))
    if draws:
        extras["draws"] = {name: value[0] for name, value in draws.items()}
    params = {name: value + 0.01 * client for name, value in start.params.items()}
    return params, start.buffers, site.own.x[:4], site.own.y[:4], extras


def stack(parts: Sequence[Any]) -> Any:
    """Stack tensors, or trees of them, of several clients."""
    if isinstance(parts[0], Tensor):
        return torch.stack(list(parts))
    return {name: stack([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def streams_at(seed: int) -> Iterator[None]:
    """Set the global streams within the block; afterwards they stand where they stood."""
    state, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global stream is what is watched
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(state)
        np.random.set_state(legacy)  # noqa: NPY002


def positions() -> dict[str, bytes]:
    """Return where the global streams stand."""
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002
    return {
        "PyTorch": torch.default_generator.get_state().numpy().tobytes(),
        "NumPy": repr(legacy).encode(),
        "Python": repr(random.getstate()).encode(),
    }
