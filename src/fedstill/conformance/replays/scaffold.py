"""SCAFFOLD: local steps with given variates, and whole rounds with c and every c_k."""

from __future__ import annotations

import torch
from torch import Tensor

from fedstill.conformance.replays import rounds, steps
from fedstill.conformance.replays.registry import Case, replays
from fedstill.conformance.replays.sites import ClientTurn
from fedstill.conformance.replays.subjects import as_recorded, built_in, plain
from fedstill.conformance.replays.tiny import Architecture
from fedstill.conformance.subject import Subject
from fedstill.payload import Kind, Payload, model_payload, scalars
from fedstill.weights import Weights, zeros_like


@replays("scaffold", "local_scaffold", "local_scaffold_bn")
def scaffold_steps(case: Case, subject: Subject) -> None:
    """Local steps with c and c_k; the client gets c_k by a turn that ends ``steps eta c_k`` away."""
    net, objective = Architecture.of(case), subject.parts()[0]
    first, omega = net.weights(case.tensor("in/w0")), float(case.array("in/omega_k"))
    own, server = case.tensor("in/c_k"), case.tensor("in/c")
    client = steps.client_of(case, net, message(first, net.trainable(server), omega))

    def term(params: Tensor) -> Tensor:
        return params.dot(server / omega - own)

    zero, away = zeros_like(first.params), -client.task.steps * case.hyper["lr"] * own
    sent = message(Weights(zero, first.buffers), zero, omega)
    client = client.after(objective, sent, Weights(net.trainable(away), first.buffers))
    steps.compare_steps(case, net, objective, client, term if built_in(subject) else None)


def message(weights: Weights, control: dict[str, Tensor], omega: float) -> Payload:
    """Return what SCAFFOLD's server sends."""
    return model_payload(weights).also(Kind.CONTROL_VARIATE, control).also(Kind.SCALARS, scalars(omega=omega))


@replays("scaffold", "server_scaffold")
def scaffold_rounds(case: Case, subject: Subject) -> None:
    """Rounds at a constant learning rate, where the code and the paper are one."""
    compare_rounds(case, subject.where(client_weights="samples", server_lr=float(case.hyper["global_lr"])))


@replays("scaffold", "server_scaffold_bn_lrdecay")
def scaffold_rounds_of_the_code(case: Case, subject: Subject) -> None:
    """Rounds with a decay of the rate, which the code forgets in c_k."""
    compare_rounds(case, as_recorded(subject, "code", server_lr=float(case.hyper["global_lr"])))


def compare_rounds(case: Case, subject: Subject) -> None:
    """Compare the models, c as it is sent, c_k as the sum of what was uploaded, and what the built-in keeps of it."""
    net, parts, own = Architecture.of(case), plain(subject).parts(), built_in(subject)

    def term(turn: ClientTurn, params: Tensor) -> Tensor:
        return params.dot(net.flat_trainable(turn.site.seen.extras["correction"]))

    variates = torch.zeros_like(case.tensor("out/c_k")[0])
    for round_ in rounds.played(case, net, parts, term if own else None, by_samples=False):
        case.agrees("out/w_sel", net.flat(round_.server.weights), round_.number)
        sent = parts[1].broadcast(round_.server, 0, round_.info)
        case.agrees("out/c", net.flat_trainable(sent[Kind.CONTROL_VARIATE]), round_.number)
        for turn in round_.turns:
            variates[turn.upload.client] += net.flat_trainable(turn.upload.payload[Kind.CONTROL_VARIATE])
        case.agrees("out/c_k", variates, round_.number)
        for client, state in round_.states.items() if own else ():
            case.agrees("out/c_k", net.flat_trainable(state["control"]), (round_.number, client))
