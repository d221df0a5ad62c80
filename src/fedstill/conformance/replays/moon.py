"""MOON: local steps with given old models, by the FedFTG code and by its own."""

from __future__ import annotations

from fedstill.conformance.replays import steps
from fedstill.conformance.replays.registry import Case, replays
from fedstill.conformance.replays.sites import RecordedSite
from fedstill.conformance.replays.subjects import built_in
from fedstill.conformance.replays.tiny import Architecture
from fedstill.conformance.subject import Subject
from fedstill.methods.moon import MoonObjective
from fedstill.payload import model_payload
from fedstill.weights import Weights


@replays(
    "moon",
    "local_moon_ftg",
    "local_moon_ftg_bn",
    "local_moon_ftg_first",
    "local_moon_official",
    "local_moon_official_buffer2",
    "local_moon_official_first",
)
def moon_steps(case: Case, subject: Subject) -> None:
    """Local steps; the client gets its old models by turns that end at them."""
    net, sent = Architecture.of(case), model_payload(Architecture.of(case).weights(case.tensor("in/w_glob")))
    old = old_models(case, net)
    subject = subject.where(mu=case.hyper["mu"], tau=case.hyper["tau"], previous_models=max(1, len(old)))
    objective = subject.parts()[0]
    client = steps.client_of(case, net, sent).after(objective, sent, *reversed(old))
    steps.compare_steps(case, net, objective, client, steps.no_term if built_in(subject) else None)
    if built_in(subject) and isinstance(objective, MoonObjective) and "out/loss_con_unweighted" in case.arrays:
        compare_terms(case, net, objective, client)


def old_models(case: Case, net: Architecture) -> list[Weights]:
    """Return the client's old models where the case uses them, the newest first."""
    if case.hyper.get("first_participation") or "in/w_prev" not in case.arrays:
        return []
    return [net.weights(flat) for flat in case.tensor("in/w_prev").reshape(-1, len(case.array("in/w0")))]


def compare_terms(case: Case, net: Architecture, objective: MoonObjective, client: RecordedSite) -> None:
    """Compare the two terms of every step's loss."""
    extras = objective.prepare(client.received, client.state, client.task)
    before = [case.tensor("in/w0"), *case.tensor("out/w_after_step")]
    for step, batch in enumerate(client.batches):
        weights, x, y = net.weights(before[step]), client.own.x[batch], client.own.y[batch]
        both, alone = (
            objective.loss(net.stateless, weights.params, weights.buffers, x, y, given) for given in (extras, {})
        )
        case.agrees("out/loss_ce", alone, step)
        case.agrees("out/loss_con_unweighted", (both - alone) / objective.settings.mu, step)
