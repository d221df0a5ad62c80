"""SCAFFOLD: rounds by hand, its optimum, its invariant, the rate in its variates."""

from __future__ import annotations

import torch
from torch import Tensor

from fedstill.conformance.averaging import COHORTS, HARD, same_as_fedavg
from fedstill.conformance.bench import Play, descend, optimum, quadratics, slope
from fedstill.conformance.findings import Verdict, agree, all_of, check
from fedstill.conformance.subject import Subject
from fedstill.payload import Kind
from fedstill.weights import Tensors

PARTIAL = ((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))
"""Every pair of four clients, over and over."""


def omegas(play: Play, by_samples: bool) -> list[float]:
    """Return omega_k = n_k K / sum n, or 1."""
    sizes = [len(own) for own in play.problem.clients]
    return [size * len(sizes) / sum(sizes) if by_samples else 1.0 for size in sizes]


@check(
    "scaffold", without="Any slip in the signs, the weights or the bookkeeping: the method runs, and is another one."
)
def scaffold_rounds_by_hand(subject: Subject) -> Verdict:
    """Four rounds with unequal clients: steps, c_k, c and the server's step, written out in float64."""
    keys = subject.config.scaffold
    play = Play(subject, quadratics(), **HARD)
    omega, clients = omegas(play, keys.client_weights == "samples"), play.problem.clients
    zero = torch.zeros(2, dtype=torch.float64)
    w, c, own, verdicts = zero, zero, [zero] * 4, []
    for round_, cohort in enumerate(COHORTS):
        models, moved = [], zero
        for k in cohort:

            def corrected(at: Tensors, k: int = k, c: Tensor = c, c_k: Tensor = own[k]) -> Tensors:
                return {"w": slope(clients[k], at["w"]) - c_k + c / omega[k]}

            models.append(descend({"w": w}, corrected, 3, 0.2, 0.01, 1.5)["w"])
            change = (w - models[-1]) / (3 * 0.2) - c
            own[k] = own[k] + change
            moved = moved + omega[k] * change
        w, c = w + keys.server_lr * (torch.stack(models).mean(0) - w), c + moved / 4
        play.play(cohort)
        sent = play.sent(0)[Kind.CONTROL_VARIATE]
        verdicts += [agree(play.params, {"w": w}, 1e-9, f"w after round {round_ + 1}"),
                     agree(sent, {"w": c}, 1e-9, f"c after round {round_ + 1}")]  # fmt: skip
    return all_of(*verdicts)


def rest(subject: Subject, by_samples: bool) -> Verdict:
    """Say whether partial participation of unequal clients ends in the optimum."""
    play = Play(subject, quadratics(), lr=0.5)
    for round_ in range(90):
        play.play(PARTIAL[round_ % 6])
    wanted, other = (optimum(play.problem, one) for one in (by_samples, not by_samples))
    apart = float(torch.dist(wanted, other))
    return agree(play.params["w"], wanted, 1e-4, f"from the optimum (the other one is {apart:.2g} away)")


@check("scaffold", without="The variates do not correct the drift, and more rounds do not help.")
def scaffold_reaches_the_pooled_optimum(subject: Subject) -> Verdict:
    """With ``client_weights = samples``, unequal clients and half of them a round: the optimum of the pooled data."""
    return rest(subject.where(client_weights="samples", server_lr=1.0), by_samples=True)


@check("scaffold", without="What is called the paper's form has another optimum than the paper's.")
def scaffold_reaches_the_mean_optimum(subject: Subject) -> Verdict:
    """With ``client_weights = uniform``: the optimum of the clients' mean loss, with all clients equal."""
    return rest(subject.where(client_weights="uniform", server_lr=1.0), by_samples=False)


@check("scaffold", without="c grows or shrinks with the cohort's size; the correction no longer cancels in the mean.")
def scaffold_c_is_the_mean_of_the_variates(subject: Subject) -> Verdict:
    """After every round ``c = (1/K) sum_k omega_k c_k``, with c_k the sum of what client k has ever uploaded."""
    by_samples = subject.config.scaffold.client_weights == "samples"
    play = Play(subject, quadratics(), **HARD)
    omega, verdicts = omegas(play, by_samples), []
    own = [torch.zeros(2, dtype=torch.float64)] * 4
    for round_, cohort in enumerate(COHORTS):
        for upload in play.play(cohort):
            own[upload.client] = own[upload.client] + upload.payload[Kind.CONTROL_VARIATE]["w"]
        mean = torch.stack([weight * one for weight, one in zip(omega, own)]).sum(0) / 4
        verdicts.append(agree(play.sent(0)[Kind.CONTROL_VARIATE], {"w": mean}, 1e-9, f"round {round_ + 1}"))
    return all_of(*verdicts)


@check(
    "scaffold",
    without="Variates are scaled by eta_t / eta_0: 0.135 of what they should be at round 1000 of FedFTG's setting.",
)
def scaffold_current_rate(subject: Subject) -> Verdict:
    """With a decaying rate and one step a round, c_k is the client's gradient at what it was sent, in every round."""
    subject = subject.where(client_weights="uniform")
    play = Play(subject, quadratics(), lr=0.4, lr_decay=0.5, steps=1)
    own, verdicts = torch.zeros(2, dtype=torch.float64), []
    for round_ in range(4):
        at = play.params["w"].clone()
        change = play.play((0, 1, 2, 3))[0].payload[Kind.CONTROL_VARIATE]["w"]
        own = own + change
        verdicts.append(agree(own, slope(play.problem.clients[0], at), 1e-9, f"round {round_ + 1}"))
    return all_of(*verdicts)


@check("scaffold", without="The variates do not start at zero, or the clients of the first round are not FedAvg's.")
def scaffold_first_round_is_fedavg(subject: Subject) -> Verdict:
    """In the first round, with clients of equal size, it is FedAvg."""
    subject = subject.where(server_lr=1.0)
    subject.must({"fusion.server_momentum": 0.0})
    return same_as_fedavg(subject, 1, (6, 6, 6))
