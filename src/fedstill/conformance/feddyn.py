"""FedDyn: rounds by hand, its optimum, its identity of the cloud model."""

from __future__ import annotations

import torch
from torch import Tensor

from fedstill.conformance.averaging import COHORTS, HARD
from fedstill.conformance.bench import Play, descend, optimum, quadratics, slope
from fedstill.conformance.findings import Verdict, agree, all_of, check
from fedstill.conformance.scaffold import PARTIAL, omegas
from fedstill.conformance.subject import Subject
from fedstill.weights import Tensors


@check("feddyn", without="Any slip in the regulariser, its place outside the clip, h_k or the cloud model.")
def feddyn_rounds_by_hand(subject: Subject) -> Verdict:
    """Four rounds with unequal clients: the linear term inside the clip, the quadratic outside, h_k and h."""
    subject = subject.near(alpha=0.5)
    keys = subject.config.feddyn
    play = Play(subject, quadratics(), **HARD)
    clients, omega = play.problem.clients, omegas(play, keys.client_weights == "samples")
    zero = torch.zeros(2, dtype=torch.float64)
    w, own, verdicts = zero, [zero] * 4, []
    for round_, cohort in enumerate(COHORTS):
        models = []
        for k in cohort:
            alpha = keys.alpha / omega[k]

            def pulled(at: Tensors, k: int = k, linear: Tensor = alpha * (own[k] - w)) -> Tensors:
                return {"w": slope(clients[k], at["w"]) + linear}

            models.append(descend({"w": w}, pulled, 3, 0.2, 0.01 + alpha, 1.5)["w"])
        for k, model in zip(cohort, models):
            own[k] = own[k] + (model - w)
        w = torch.stack(models).mean(0) + torch.stack(own).sum(0) / 4
        play.play(cohort)
        verdicts.append(agree(play.params, {"w": w}, 1e-9, f"w after round {round_ + 1}"))
    return all_of(*verdicts)


@check(
    "feddyn",
    without="The regulariser keeps the clients together and away from the optimum; alpha becomes a matter of luck.",
)
def feddyn_reaches_the_pooled_optimum(subject: Subject) -> Verdict:
    """With unequal clients, half of them a round, and alpha 0.1, 1 and 5: the optimum of the pooled data."""
    verdicts = []
    for alpha, lr, rounds in ((0.1, 0.7, 210), (1.0, 0.3, 60), (5.0, 0.1, 72)):
        play = Play(subject.where(alpha=alpha, client_weights="samples"), quadratics((6, 10, 14, 30)), lr=lr, steps=2)
        for round_ in range(rounds):
            play.play(PARTIAL[round_ % 6])
        wanted = optimum(play.problem, by_samples=True)
        verdicts.append(agree(play.params["w"], wanted, 5e-3, f"alpha {alpha:g}"))
    return all_of(*verdicts)


@check(
    "feddyn", without="The server's correction is not the mean of what the clients hold; it drifts off round by round."
)
def feddyn_cloud_is_the_mean_plus_h(subject: Subject) -> Verdict:
    """The new model minus the cohort's uniform mean is ``(1/K) sum_k h_k`` over all clients, h_k from the uploads."""
    play = Play(subject.near(alpha=0.5), quadratics(), **HARD)
    own, verdicts = [torch.zeros(2, dtype=torch.float64)] * 4, []
    for round_, cohort in enumerate(COHORTS):
        sent, uploads = play.params["w"].clone(), play.play(cohort)
        models = [upload.weights.params["w"] for upload in uploads]
        for upload, model in zip(uploads, models):
            own[upload.client] = own[upload.client] + (model - sent)
        wanted = torch.stack(models).mean(0) + torch.stack(own).sum(0) / 4
        verdicts.append(agree(play.params["w"], wanted, 1e-9, f"round {round_ + 1}"))
    return all_of(*verdicts)


@check(
    "feddyn", without="h counts the cohort instead of all clients, or a misplaced parenthesis takes w_t off once only."
)
def feddyn_first_round_overshoots(subject: Subject) -> Verdict:
    """After the first round the model is ``W + (|S|/K)(W - w_0)`` with W the cohort's mean, whatever alpha."""
    verdicts = []
    for cohort in ((2,), (0, 3), (0, 1, 2, 3)):
        for alpha in (0.01, 1.0):
            play = Play(subject.where(alpha=alpha), quadratics(), lr=0.05)
            first = torch.tensor([0.5, -1.0], dtype=torch.float64)
            play.begin_at({"w": first.clone()})
            mean = torch.stack([upload.weights.params["w"] for upload in play.play(cohort)]).mean(0)
            wanted = mean + len(cohort) / 4 * (mean - first)
            verdicts.append(agree(play.params["w"], wanted, 1e-9, f"{len(cohort)} of 4 clients, alpha {alpha:g}"))
    return all_of(*verdicts)
