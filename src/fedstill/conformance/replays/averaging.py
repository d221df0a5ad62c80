"""FedAvg and FedProx: local steps and whole rounds."""

from __future__ import annotations

from torch import Tensor

from fedstill.conformance.replays import rounds, steps
from fedstill.conformance.replays.registry import Case, replays
from fedstill.conformance.replays.sites import ClientTurn
from fedstill.conformance.replays.subjects import built_in, plain_average
from fedstill.conformance.replays.tiny import Architecture
from fedstill.conformance.subject import Subject
from fedstill.payload import model_payload


@replays("fedavg", "local_fedavg", "local_fedavg_bn")
def fedavg_steps(case: Case, subject: Subject) -> None:
    """Local SGD."""
    net = Architecture.of(case)
    client = steps.client_of(case, net, model_payload(net.weights(case.tensor("in/w0"))))
    steps.compare_steps(case, net, subject.parts()[0], client, steps.no_term if built_in(subject) else None)


@replays("fedavg", "server_fedavg", "server_fedavg_bn")
def fedavg_rounds(case: Case, subject: Subject) -> None:
    """Rounds, averaged by n_k."""
    net, term = Architecture.of(case), rounds.no_term if built_in(subject) else None
    for round_ in rounds.played(case, net, plain_average(subject).parts(), term, by_samples=True):
        case.agrees("out/w_sel", net.flat(round_.server.weights), round_.number)


@replays("fedprox", "local_fedprox", "local_fedprox_moon")
def fedprox_steps(case: Case, subject: Subject) -> None:
    """Local steps with the term, of FedDyn's code and of MOON's; the two losses differ by a constant."""
    net, of_moon = Architecture.of(case), case.name == "local_fedprox_moon"
    mu, sent = float(case.hyper["mu"]), case.tensor("in/w_glob" if of_moon else "in/w_t")
    subject = subject.where(mu=mu, kind="proximal")

    def term(params: Tensor) -> Tensor:
        if of_moon:
            return mu / 2 * (params - sent).square().sum()
        return mu / 2 * params.dot(params) - mu * params.dot(sent)

    client = steps.client_of(case, net, model_payload(net.weights(sent)))
    steps.compare_steps(case, net, subject.parts()[0], client, term if built_in(subject) else None)


@replays("fedprox", "server_fedprox")
def fedprox_rounds(case: Case, subject: Subject) -> None:
    """Rounds, averaged by n_k."""
    net, mu = Architecture.of(case), float(case.hyper["mu"])
    subject = plain_average(subject.where(mu=mu, kind="proximal"))

    def term(turn: ClientTurn, params: Tensor) -> Tensor:
        sent = net.flat_trainable(turn.received.weights().params)
        return mu / 2 * params.dot(params) - mu * params.dot(sent)

    parts = subject.parts()
    for round_ in rounds.played(case, net, parts, term if built_in(subject) else None, by_samples=True):
        case.agrees("out/w_sel", net.flat(round_.server.weights), round_.number)
