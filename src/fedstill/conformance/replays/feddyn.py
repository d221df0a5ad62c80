"""FedDyn: local steps with a given h_k, and whole rounds with every h_k."""

from __future__ import annotations

import torch
from torch import Tensor

from fedstill.conformance.replays import rounds, steps
from fedstill.conformance.replays.registry import Case, replays
from fedstill.conformance.replays.sites import ClientTurn
from fedstill.conformance.replays.subjects import built_in, plain
from fedstill.conformance.replays.tiny import Architecture
from fedstill.conformance.subject import Subject
from fedstill.payload import Kind, Payload, model_payload, scalars
from fedstill.weights import Weights, zeros_like


@replays("feddyn", "local_feddyn", "local_feddyn_bn")
def feddyn_steps(case: Case, subject: Subject) -> None:
    """Local steps; the client gets h_k by a turn from 0 that ends at h_k."""
    net, objective, alpha = Architecture.of(case), subject.parts()[0], case.hyper["alpha_k"]
    first, own, sent = net.weights(case.tensor("in/w0")), case.tensor("in/h_k"), case.tensor("in/w_t")

    def message(params: dict[str, Tensor]) -> Payload:
        return model_payload(Weights(params, first.buffers)).also(Kind.SCALARS, scalars(alpha=alpha))

    def term(params: Tensor) -> Tensor:
        found: Tensor = alpha * params.dot(own - sent)
        return found

    client = steps.client_of(case, net, message(net.trainable(sent)))
    end = Weights(net.trainable(own), first.buffers)
    client = client.after(objective, message(zeros_like(first.params)), end)
    steps.compare_steps(case, net, objective, client, term if built_in(subject) else None)


@replays("feddyn", "server_feddyn", "server_feddyn_bn")
def feddyn_rounds(case: Case, subject: Subject) -> None:
    """Rounds: the cloud model, the cohort's mean, and every h_k."""
    net, own = Architecture.of(case), built_in(subject)
    parts = plain(subject.where(alpha=case.hyper["alpha"], client_weights="samples")).parts()

    def term(turn: ClientTurn, params: Tensor) -> Tensor:
        return params.dot(net.flat_trainable(turn.site.seen.extras["linear"]))

    moved = torch.zeros_like(case.tensor("out/h")[0])
    for round_ in rounds.played(case, net, parts, term if own else None, by_samples=False):
        cloud = round_.server.weights
        case.agrees("out/w_cloud", net.flat(cloud), round_.number)
        for turn in round_.turns:
            sent, back = (net.flat_trainable(one.params) for one in (turn.received.weights(), turn.upload.weights))
            moved[turn.upload.client] += back - sent
        case.agrees("out/h", moved, round_.number)
        for client, state in round_.states.items() if own else ():
            case.agrees("out/h", net.flat_trainable(state["h"]), (round_.number, client))
        h = net.trainable(case.tensor("out/h")[round_.number].mean(0))
        mean = {name: value - h[name] for name, value in cloud.params.items()}
        case.agrees("out/w_sel", net.flat(Weights(mean, cloud.buffers)), round_.number)
