"""FedDyn's local steps and whole rounds."""

from __future__ import annotations

import check_local
import check_server
from registry import Case, checks
from tiny import Architecture, Turn
from torch import Tensor

from fedstill.methods.base import ServerState
from fedstill.methods.feddyn import FedDynFusion, FedDynObjective, FedDynSettings
from fedstill.payload import Kind, model_payload, scalars
from fedstill.weights import State, Weights, zeros_like


@checks("local_feddyn", "local_feddyn_bn")
def steps(case: Case) -> None:
    net = Architecture.of(case)
    alpha, own, sent = case.hyper["alpha_k"], case.tensor("in/h_k"), case.tensor("in/w_t")
    received = model_payload(Weights(net.trainable(sent), {})).also(Kind.SCALARS, scalars(alpha=alpha))

    def term(params: Tensor) -> Tensor:
        return alpha * params.dot(own - sent)

    check_local.compare_steps(case, net, FedDynObjective(), received, {"h": net.trainable(own)}, term)


@checks("server_feddyn", "server_feddyn_bn")
def rounds(case: Case) -> None:
    net = Architecture.of(case)
    fusion = FedDynFusion(FedDynSettings(alpha=case.hyper["alpha"]))

    def term(turn: Turn, params: Tensor) -> Tensor:
        return params.dot(net.flat_trainable(turn.extras["linear"]))

    def states_and_mean(round_: int, server: ServerState, states: dict[int, State]) -> None:
        for client, state in states.items():
            own = state.get("h", zeros_like(server.weights.params))
            case.agrees("out/h", net.flat_trainable(own), (round_, client))
        case_mean = case.tensor("out/h")[round_].mean(0)
        mean = net.trainable(case_mean)
        params = {name: value - mean[name] for name, value in server.weights.params.items()}
        case.agrees("out/w_sel", net.flat(Weights(params, server.weights.buffers)), round_)

    check_server.compare_rounds(
        case, net, FedDynObjective(), fusion, term, all_by_samples=False, after=states_and_mean, fused="out/w_cloud"
    )
