"""MOON's local steps, by the FedFTG code and by its own."""

from __future__ import annotations

import check_local
import torch
from registry import Case, checks
from tiny import Architecture, batch_order
from torch import Tensor

from fedstill.methods.moon import MoonObjective, MoonSettings, contrastive, frozen_features
from fedstill.payload import model_payload
from fedstill.weights import State


def previous(case: Case, net: Architecture) -> State:
    """Return what the client keeps: the recorded previous models, where the case uses them."""
    if case.hyper.get("first_participation") or "in/w_prev" not in case.arrays:
        return {}
    models = [net.weights(flat) for flat in case.tensor("in/w_prev").reshape(-1, len(case.array("in/w0")))]
    return {
        "previous": {name: torch.stack([model.params[name] for model in models]) for name in models[0].params},
        "previous-buffers": {name: torch.stack([model.buffers[name] for model in models]) for name in models[0].buffers},
    }


def objective_of(case: Case) -> MoonObjective:
    return MoonObjective(MoonSettings(mu=case.hyper["mu"], tau=case.hyper["tau"]))


@checks(
    "local_moon_ftg",
    "local_moon_ftg_bn",
    "local_moon_ftg_first",
    "local_moon_official",
    "local_moon_official_buffer2",
    "local_moon_official_first",
)
def steps(case: Case) -> None:
    net, objective = Architecture.of(case), objective_of(case)
    received = model_payload(net.weights(case.tensor("in/w_glob")))
    check_local.compare_steps(case, net, objective, received, previous(case, net), check_local.no_term)
    if "out/loss_con_unweighted" in case.arrays:
        compare_terms(case, net, objective)


def compare_terms(case: Case, net: Architecture, objective: MoonObjective) -> None:
    """Compare the contrastive term alone, at the recorded weights before each step."""
    known = [case.tensor("in/w0"), *case.tensor("out/w_after_step")]
    extras = objective.prepare(
        model_payload(net.weights(case.tensor("in/w_glob"))), previous(case, net), task=None  # type: ignore[arg-type]
    )
    for step, batch in enumerate(batch_order(case.tensor("in/batch_idx"))):
        case.agrees("out/loss_con_unweighted", term(net, extras, known[step], case.tensor("in/x")[batch], objective), step)


def term(net: Architecture, extras: State, flat: Tensor, x: Tensor, objective: MoonObjective) -> Tensor:
    if not extras:
        return x.new_zeros(())
    weights = net.weights(flat)
    _, z = net.stateless.with_features(weights.params, weights.buffers, x, train=True)
    number = len(next(iter(extras["frozen"].values())))
    frozen = [frozen_features(net.stateless, extras, place, x) for place in range(number)]
    return contrastive(z, frozen, objective.settings.tau)
