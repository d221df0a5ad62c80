"""Recorded local steps: every step's weights, and of the built-in method its loss and gradient norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedstill.config import LocalSettings
from fedstill.conformance.replays.registry import Case
from fedstill.conformance.replays.sites import RecordedSite
from fedstill.conformance.replays.tiny import Architecture, batch_order
from fedstill.data.dataset import Samples
from fedstill.methods.base import LocalObjective, LocalTask
from fedstill.payload import Payload

Term = Callable[[Tensor], Tensor]
"""What a recorded loss has on top of ours, as a function of the flat parameters before the step.

fedstill puts a method's correction into the gradient; the recorded scalar has it in the loss.
"""


def no_term(params: Tensor) -> Tensor:
    """Return 0: both have the same loss."""
    return params.new_zeros(())


def client_of(case: Case, net: Architecture, received: Payload) -> RecordedSite:
    """Return the client of a case, which begins at the recorded weights whatever it received."""
    hyper, first = case.hyper, net.weights(case.tensor("in/w0"))
    order, own = batch_order(case.tensor("in/batch_idx")), Samples(case.tensor("in/x"), case.tensor("in/y"))
    task = LocalTask(0, 0, len(own), hyper["lr"], hyper["lr"], len(order))
    keys = {name: hyper[name] for name in ("lr", "momentum", "weight_decay", "clip_norm")}
    local = LocalSettings.model_validate(keys)
    return RecordedSite(net.stateless, first, own, task, received, {}, local, 0, batches=order, begins_at=first)


def compare_steps(
    case: Case, net: Architecture, objective: LocalObjective, client: RecordedSite, term: Term | None
) -> None:
    """Train on growing prefixes of the recorded batches and compare each result; no losses without a term."""
    known = [case.tensor("in/w0"), *case.tensor("out/w_after_step")]
    for steps in range(1, len(known)):
        site = client.first(steps)
        turn = objective.run(site)
        done = site.seen.trained
        case.agrees("out/w_after_step", net.flat(turn.payload.weights()), steps - 1)
        if term is None:
            continue
        before = net.flat_trainable(net.weights(known[steps - 1]).params)
        case.agrees("out/loss", done.losses[-1] + term(before), steps - 1)
        if "out/grad_norm" in case.arrays:
            norms = torch.zeros(0) if done.grad_norms is None else done.grad_norms
            case.agrees("out/grad_norm", norms, slice(steps))
