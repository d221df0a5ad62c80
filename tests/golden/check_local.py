"""Local training: every step's weights, loss and gradient norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from registry import Case, checks
from tiny import Architecture, batch_order
from torch import Tensor

from fedstill.methods.base import LocalObjective, LocalTask
from fedstill.methods.fedavg import FedAvgObjective
from fedstill.methods.fedprox import FedProxObjective, FedProxSettings
from fedstill.methods.scaffold import ScaffoldObjective, ScaffoldSettings
from fedstill.payload import Kind, Payload, model_payload, scalars
from fedstill.training import SGD, train_locally
from fedstill.weights import State

Term = Callable[[Tensor], Tensor]


def no_term(params: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def compare_steps(
    case: Case, net: Architecture, objective: LocalObjective, received: Payload, state: State, term: Term
) -> None:
    """Train on growing prefixes of the recorded batches and compare each result.

    fedstill puts a method's correction into the gradient; the recorded scalar has it in the loss. ``term`` is
    that part of the recorded scalar, a function of the flat parameters before the step.
    """
    hyper = case.hyper
    order = batch_order(case.tensor("in/batch_idx"))
    x, y = case.tensor("in/x"), case.tensor("in/y")
    task = LocalTask(0, 0, len(y), hyper["lr"], hyper["lr"], len(order))
    extras = objective.prepare(received, state, task)
    decay = hyper["weight_decay"] + objective.extra_weight_decay(received, task)
    sgd = SGD(hyper["lr"], hyper["momentum"], decay, hyper["clip_norm"])
    start = net.weights(case.tensor("in/w0"))
    known = [case.tensor("in/w0"), *case.tensor("out/w_after_step")]
    assert len(order) == len(known) - 1
    for steps in range(1, len(order) + 1):
        done = train_locally(net.stateless, objective, start, extras, x, y, order[:steps], sgd)
        assert done.steps == steps
        case.agrees("out/w_after_step", net.flat(done.weights), steps - 1)
        before = net.flat_trainable(net.weights(known[steps - 1]).params)
        case.agrees("out/loss", done.losses[-1] + term(before), steps - 1)
        if "out/grad_norm" in case.arrays:
            assert done.grad_norms is not None
            case.agrees("out/grad_norm", done.grad_norms, slice(steps))
    torch.testing.assert_close(net.flat(start), case.tensor("in/w0"), rtol=0, atol=0)


@checks("local_fedavg", "local_fedavg_bn")
def fedavg(case: Case) -> None:
    net = Architecture.of(case)
    received = model_payload(net.weights(case.tensor("in/w0")))
    compare_steps(case, net, FedAvgObjective(), received, {}, no_term)


@checks("local_fedprox")
def fedprox(case: Case) -> None:
    net = Architecture.of(case)
    mu, sent = case.hyper["mu"], case.tensor("in/w_t")
    objective = FedProxObjective(FedProxSettings(mu=mu))

    def term(params: Tensor) -> Tensor:
        return mu / 2 * params.dot(params) - mu * params.dot(sent)

    compare_steps(case, net, objective, model_payload(net.weights(sent)), {}, term)


@checks("local_fedprox_moon")
def fedprox_of_the_moon_code(case: Case) -> None:
    net = Architecture.of(case)
    mu, sent = case.hyper["mu"], case.tensor("in/w_glob")
    objective = FedProxObjective(FedProxSettings(mu=mu))

    def term(params: Tensor) -> Tensor:
        return mu / 2 * (params - sent).square().sum()

    compare_steps(case, net, objective, model_payload(net.weights(sent)), {}, term)


@checks("local_scaffold", "local_scaffold_bn")
def scaffold(case: Case) -> None:
    net = Architecture.of(case)
    own, server, omega = case.tensor("in/c_k"), case.tensor("in/c"), float(case.array("in/omega_k"))
    received = model_payload(net.weights(case.tensor("in/w0")))
    received = received.also(Kind.CONTROL_VARIATE, net.trainable(server)).also(Kind.SCALARS, scalars(omega=omega))

    def term(params: Tensor) -> Tensor:
        return params.dot(server / omega - own)

    objective = ScaffoldObjective(ScaffoldSettings())
    compare_steps(case, net, objective, received, {"control": net.trainable(own)}, term)
