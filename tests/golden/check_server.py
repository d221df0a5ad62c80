"""Whole rounds: broadcast, local training, upload, fusion; clients of unequal size, partial participation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from registry import Case, checks
from tiny import Architecture, Turn, batch_order, client_turn
from torch import Tensor

from fedstill.methods.base import FederationInfo, LocalObjective, LocalTask, RoundContext, ServerFusion, ServerState
from fedstill.methods.fedavg import FedAvgFusion, FedAvgObjective
from fedstill.methods.fedprox import FedProxObjective, FedProxSettings
from fedstill.methods.scaffold import ScaffoldFusion, ScaffoldObjective, ScaffoldSettings
from fedstill.training import SGD, train_locally
from fedstill.weights import State, weighted_mean, zeros_like

Term = Callable[[Turn, Tensor], Tensor]
AfterRound = Callable[[int, ServerState, dict[int, State]], None]


def nothing_more(round: int, server: ServerState, states: dict[int, State]) -> None:
    pass


def compare_rounds(
    case: Case,
    net: Architecture,
    objective: LocalObjective,
    fusion: ServerFusion,
    term: Term,
    all_by_samples: bool,
    after: AfterRound = nothing_more,
    fused: str = "out/w_sel",
) -> None:
    """Run the recorded rounds. ``term`` is the part of the recorded loss that fedstill has in the gradient.

    ``fused`` names the recorded global models.
    """
    hyper = case.hyper
    sizes = tuple(case.array("in/n_k").tolist())
    data = [(case.tensor(f"in/x_{client}"), case.tensor(f"in/y_{client}")) for client in range(hyper["clients"])]
    info = FederationInfo(sizes, 4, tuple(data[0][0].shape[1:]))
    first = net.weights(case.tensor("in/w0"))
    server = fusion.start(first, info)
    states: dict[int, State] = {client: {} for client in range(hyper["clients"])}
    last_uploads = dict.fromkeys(range(hyper["clients"]), first)
    sgd = SGD(hyper["lr"], 0.0, hyper["weight_decay"], hyper["clip_norm"])
    for round_ in range(hyper["rounds"]):
        uploads = []
        lr = hyper["lr"] * hyper["lr_decay_per_round"] ** round_
        for place, client in enumerate(case.array("in/selected")[round_].tolist()):
            order = batch_order(case.tensor("in/batch_idx")[round_, place])
            assert len(order) == hyper.get("n_minibatch", -(-sizes[client] // hyper["batch"]))
            task = LocalTask(round_, client, sizes[client], lr, hyper["lr"], len(order))
            turn = client_turn(
                net.stateless, objective, fusion, server, info, task, data[client], order, sgd, states[client]
            )
            at = (round_, place)
            case.agrees("out/w_client", net.flat(turn.trained.weights), at)
            more = replace(sgd, weight_decay=sgd.weight_decay + objective.extra_weight_decay(turn.received, task))
            case.agrees("out/loss", losses(net, objective, turn, data[client], order, more, lr, term), full(at, order))
            assert turn.trained.grad_norms is not None
            case.agrees("out/grad_norm", turn.trained.grad_norms, full(at, order))
            states[client] = turn.state
            last_uploads[client] = turn.upload.weights
            uploads.append(turn.upload)
        server = fusion.fuse(server, uploads, RoundContext(0, info))
        case.agrees(fused, net.flat(server.weights), round_)
        # The ``all`` evaluation model: what every client uploaded last, the initial model where nobody did.
        shares = [float(size) if all_by_samples else 1.0 for size in sizes]
        case.agrees("out/w_all", net.flat(weighted_mean(list(last_uploads.values()), shares)), round_)
        after(round_, server, states)


def full(at: tuple[int, int], order: list[Tensor]) -> tuple[int, int, slice]:
    """Return the place of the steps that exist; the others are recorded as NaN."""
    return (*at, slice(len(order)))


def losses(
    net: Architecture,
    objective: LocalObjective,
    turn: Turn,
    data: tuple[Tensor, Tensor],
    order: list[Tensor],
    sgd: SGD,
    lr: float,
    term: Term,
) -> Tensor:
    """Return each step's loss with the term of the parameters before that step."""
    sgd = SGD(lr, 0.0, sgd.weight_decay, sgd.clip_norm)
    start, terms = turn.received.weights(), []
    for steps in range(len(order)):
        before = train_locally(net.stateless, objective, start, turn.extras, *data, order[:steps], sgd).weights
        terms.append(term(turn, net.flat_trainable(before.params)))
    return turn.trained.losses + torch.stack(terms)


@checks("server_fedavg", "server_fedavg_bn")
def fedavg(case: Case) -> None:
    def term(turn: Turn, params: Tensor) -> Tensor:
        return params.new_zeros(())

    compare_rounds(case, Architecture.of(case), FedAvgObjective(), FedAvgFusion(), term, all_by_samples=True)


@checks("server_fedprox")
def fedprox(case: Case) -> None:
    net, mu = Architecture.of(case), case.hyper["mu"]

    def term(turn: Turn, params: Tensor) -> Tensor:
        sent = net.flat_trainable(turn.received.weights().params)
        return mu / 2 * params.dot(params) - mu * params.dot(sent)

    objective = FedProxObjective(FedProxSettings(mu=mu))
    compare_rounds(case, net, objective, FedAvgFusion(), term, all_by_samples=True)


@checks("server_scaffold", "server_scaffold_bn_lrdecay")
def scaffold(case: Case) -> None:
    net = Architecture.of(case)
    mode = "code" if case.name == "server_scaffold_bn_lrdecay" else "paper"
    settings = ScaffoldSettings(mode=mode, server_lr=float(case.hyper["global_lr"]))

    def term(turn: Turn, params: Tensor) -> Tensor:
        return params.dot(net.flat_trainable(turn.extras["correction"]))

    def control_variates(round_: int, server: ServerState, states: dict[int, State]) -> None:
        case.agrees("out/c", net.flat_trainable(server.method["control"]), round_)
        for client, state in states.items():
            own = state.get("control", zeros_like(server.weights.params))
            case.agrees("out/c_k", net.flat_trainable(own), (round_, client))

    objective, fusion = ScaffoldObjective(settings), ScaffoldFusion(settings)
    compare_rounds(case, net, objective, fusion, term, all_by_samples=False, after=control_variates)
