"""MOON's local steps, by the FedFTG code and by its own."""

from __future__ import annotations

import check_local
import torch
from registry import Case, checks
from tiny import Architecture, batch_order

from fedstill.methods.base import LocalTask
from fedstill.methods.moon import MoonObjective, MoonSettings
from fedstill.payload import model_payload
from fedstill.weights import State


def kept(case: Case, net: Architecture) -> State:
    """Return what the client kept: the recorded previous models, where the case uses them."""
    if case.hyper.get("first_participation") or "in/w_prev" not in case.arrays:
        return {}
    models = [net.weights(flat) for flat in case.tensor("in/w_prev").reshape(-1, len(case.array("in/w0")))]
    return {
        "previous": {name: torch.stack([model.params[name] for model in models]) for name in models[0].params},
        "previous-buffers": {
            name: torch.stack([model.buffers[name] for model in models]) for name in models[0].buffers
        },
    }


@checks(
    "local_moon_ftg",
    "local_moon_ftg_bn",
    "local_moon_ftg_first",
    "local_moon_official",
    "local_moon_official_buffer2",
    "local_moon_official_first",
)
def steps(case: Case) -> None:
    net = Architecture.of(case)
    objective = MoonObjective(MoonSettings(mu=case.hyper["mu"], tau=case.hyper["tau"]))
    received, state = model_payload(net.weights(case.tensor("in/w_glob"))), kept(case, net)
    check_local.compare_steps(case, net, objective, received, state, check_local.no_term)
    if "out/loss_con_unweighted" not in case.arrays:
        return
    extras = objective.prepare(received, state, LocalTask(0, 0, 1, 1.0, 1.0, 1))
    before = [case.tensor("in/w0"), *case.tensor("out/w_after_step")]
    for step, batch in enumerate(batch_order(case.tensor("in/batch_idx"))):
        weights, x, y = net.weights(before[step]), case.tensor("in/x")[batch], case.tensor("in/y")[batch]
        both = objective.loss(net.stateless, weights.params, weights.buffers, x, y, extras)
        alone = objective.loss(net.stateless, weights.params, weights.buffers, x, y, {})
        case.agrees("out/loss_ce", alone, step)
        case.agrees("out/loss_con_unweighted", (both - alone) / objective.settings.mu, step)
