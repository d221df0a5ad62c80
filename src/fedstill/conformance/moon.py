"""MOON: the contrastive term by hand, and where it vanishes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedstill.conformance.averaging import end, fedavg_twin, same_as_fedavg
from fedstill.conformance.bench import Play, cross_entropy, descend, differentiated, network
from fedstill.conformance.findings import Verdict, agree, all_of, check, differ
from fedstill.conformance.subject import Subject
from fedstill.weights import Tensors


def perceptron(params: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and features of the bench's network without BatchNorm, written out."""
    features = (x.flatten(1) @ params["body.1.weight"].T + params["body.1.bias"]).clamp_min(0)
    return features @ params["head.weight"].T + params["head.bias"], features


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine of each row; a row of zeros has no direction and counts as one of length 1e-8."""
    lengths = [row.square().sum(1).sqrt().clamp_min(1e-8) for row in (one, other)]
    return (one * other).sum(1) / (lengths[0] * lengths[1])


def contrast(x: Tensor, y: Tensor, sent: Tensors, old: Tensors, mu: float, tau: float) -> Callable[[Tensors], Tensor]:
    """Return ``CE + mu mean -log(e^{cos(z, z_glob)/tau} / (e^{cos(z, z_glob)/tau} + e^{cos(z, z_prev)/tau}))``."""

    def loss(params: Tensors) -> Tensor:
        logits, z = perceptron(params, x)
        positive, negative = (torch.exp(cosine(z, perceptron(one, x)[1].detach()) / tau) for one in (sent, old))
        return cross_entropy(logits, y) - mu * torch.log(positive / (positive + negative)).mean()

    return loss


@check(
    "moon",
    without="The term pushes to the old model instead of the global one, or its strength is not what mu and tau say.",
)
def moon_steps_by_hand(subject: Subject) -> Verdict:
    """Three steps of a client whose old model is three rounds old: the loss of Eq. 3 to 5, written out in float64."""
    subject = subject.where(mu=1.5, tau=0.4, previous_models=1)
    keys = subject.config.moon
    play = Play(subject, network(norm=False), lr=0.3)
    old = play.play((0, 1, 2))[0].weights.params
    play.play((1, 2))
    play.play((1, 2))
    sent, own = play.params, play.problem.clients[0]
    wanted = descend(sent, differentiated(contrast(own.x, own.y, sent, old, keys.mu, keys.tau)), 3, 0.3)
    plain = descend(sent, differentiated(lambda at: cross_entropy(perceptron(at, own.x)[0], own.y)), 3, 0.3)
    got = play.turn(0).payload.weights().params
    return all_of(agree(got, wanted, 1e-9, "w_k"), differ(got, plain, "w_k and one without the term", 1e-6))


@check("moon", without="A comparison at mu = 0 shows a difference that is not the term's.")
def moon_without_mu_is_fedavg(subject: Subject) -> Verdict:
    """With mu = 0 it is FedAvg, and with mu > 0 it is not."""
    return all_of(
        same_as_fedavg(subject.where(mu=0.0), rounds=3),
        differ(end(subject.where(mu=1.0), 3).params, end(fedavg_twin(subject), 3).params, "with mu = 1"),
    )


@check("moon", without="A client that has no old model yet is compared with something arbitrary.")
def moon_first_participation_is_fedavg(subject: Subject) -> Verdict:
    """In a client's first round there is no negative: the term is 0 and it trains as in FedAvg."""
    return same_as_fedavg(subject.near(mu=5.0), rounds=1)
