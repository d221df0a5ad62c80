"""Recorded rounds: broadcast, local training, upload, fusion; clients of unequal size, partial participation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedstill.conformance.replays.registry import Case, must
from fedstill.conformance.replays.sites import ClientTurn, client_turn
from fedstill.conformance.replays.tiny import Architecture, batch_order
from fedstill.conformance.subject import Parts
from fedstill.methods.base import FederationInfo, LocalObjective, LocalTask, RoundContext, ServerState
from fedstill.training import SGD
from fedstill.weights import State, weighted_mean

Term = Callable[[ClientTurn, Tensor], Tensor]
"""What a recorded loss has on top of ours, as a function of a client's turn and its flat parameters before a step."""


def no_term(turn: ClientTurn, params: Tensor) -> Tensor:
    """Return 0: both have the same loss."""
    return params.new_zeros(())


@dataclass(frozen=True)
class Round:
    """A round that was played: the server after it, the cohort's turns, what every client keeps."""

    number: int
    info: FederationInfo
    server: ServerState
    turns: list[ClientTurn]
    states: dict[int, State]


def played(case: Case, net: Architecture, parts: Parts, term: Term | None, by_samples: bool) -> Iterator[Round]:
    """Play the recorded rounds and compare every client's result; no losses without a term.

    ``by_samples`` says how the recorded model ``all`` is averaged: what every client uploaded last, the initial model
    where nobody did.
    """
    objective, fusion = parts
    hyper, clients = case.hyper, range(case.hyper["clients"])
    data = [(case.tensor(f"in/x_{client}"), case.tensor(f"in/y_{client}")) for client in clients]
    info = FederationInfo(tuple(case.array("in/n_k").tolist()), 4, tuple(data[0][0].shape[1:]), net.stateless.head_name)
    first = net.weights(case.tensor("in/w0"))
    server, states, last = fusion.start(first, info), dict[int, State](), dict.fromkeys(clients, first)
    sgd = SGD(hyper["lr"], 0.0, hyper["weight_decay"], hyper["clip_norm"])
    for number in range(hyper["rounds"]):
        turns, decay = [], hyper["lr_decay_per_round"] ** number
        for place, client in enumerate(case.array("in/selected")[number].tolist()):
            order, size = batch_order(case.tensor("in/batch_idx")[number, place]), info.samples[client]
            must(len(order) == hyper.get("n_minibatch", -(-size // hyper["batch"])), "another number of steps")
            task = LocalTask(number, client, size, hyper["lr"] * decay, hyper["lr"], len(order))
            own = states.get(client, {})
            turns.append(
                client_turn(net.stateless, objective, fusion, server, info, task, data[client], order, sgd, own)
            )
            compare_turn(case, net, objective, turns[-1], term, (number, place))
        server = fusion.fuse(server, [turn.upload for turn in turns], RoundContext(number, info, decay))
        states |= {turn.upload.client: turn.state for turn in turns}
        last |= {turn.upload.client: turn.upload.weights for turn in turns}
        shares = [float(size) if by_samples else 1.0 for size in info.samples]
        case.agrees("out/w_all", net.flat(weighted_mean(list(last.values()), shares)), number)
        yield Round(number, info, server, turns, states)


def compare_turn(
    case: Case, net: Architecture, objective: LocalObjective, turn: ClientTurn, term: Term | None, at: tuple[int, int]
) -> None:
    """Compare a client's model, and with a term its losses and gradient norms."""
    case.agrees("out/w_client", net.flat(turn.upload.weights), at)
    if term is None:
        return
    seen = turn.site.seen
    steps = range(seen.trained.steps)
    terms = []
    for step in steps:
        before = turn.site.first(step).train(objective, seen.start, seen.extras, {}).weights
        terms.append(term(turn, net.flat_trainable(before.params)))
    exist = (*at, slice(len(steps)))  # steps that others have more are recorded as NaN
    case.agrees("out/loss", seen.trained.losses + torch.stack(terms), exist)
    assert seen.trained.grad_norms is not None
    case.agrees("out/grad_norm", seen.trained.grad_norms, exist)
