"""FedAvg, FedProx, training alone; what travels in every family."""

from __future__ import annotations

from typing import Any

import torch

from fedstill.config import Config
from fedstill.conformance.bench import (
    Play,
    cross_entropy,
    descend,
    differentiated,
    linear,
    network,
    optimum,
    quadratics,
    slope,
)
from fedstill.conformance.findings import DoesNotApply, Verdict, agree, all_of, check, differ
from fedstill.conformance.subject import Subject
from fedstill.methods.fedavg import FedAvgFusion, FedAvgObjective
from fedstill.weights import Tensors

COHORTS = ((0, 2), (1, 2, 3), (0, 1, 2, 3), (1, 3))
"""Four rounds with partial participation of four clients of unequal size."""
HARD: dict[str, Any] = {"lr": 0.2, "weight_decay": 0.01, "clip_norm": 1.5}
"""Local settings under which the clip acts in some steps and not in others."""


def fedavg_twin(subject: Subject) -> Subject:
    """Return FedAvg with the same general keys, to be equal to."""

    def make(config: Config) -> Any:
        return FedAvgObjective(), FedAvgFusion(config.fusion)

    return Subject("fedavg", make, "fedavg", subject.held)


@check(
    "fedavg",
    without="Small clients count as much as large ones: the model is that of the mean client, not of the data.",
)
def fedavg_rounds_by_hand(subject: Subject) -> Verdict:
    """Four rounds with unequal clients: ``w <- sum n_k w_k / sum n_k`` over the cohort, written out in float64."""
    subject.must({"fusion.server_momentum": 0.0})
    play = Play(subject, quadratics(), **HARD)
    by_samples = subject.config.fusion.client_weights == "samples"
    w, clients, verdicts = torch.zeros(2, dtype=torch.float64), play.problem.clients, []
    for round_, cohort in enumerate(COHORTS):
        own = []
        for k in cohort:

            def plain(at: Tensors, k: int = k) -> Tensors:
                return {"w": slope(clients[k], at["w"])}

            own.append(descend({"w": w}, plain, 3, 0.2, 0.01, 1.5)["w"])
        sizes = [len(clients[k]) if by_samples else 1 for k in cohort]
        w = torch.stack([size * one for size, one in zip(sizes, own)]).sum(0) / sum(sizes)
        play.play(cohort)
        verdicts.append(agree(play.params, {"w": w}, 1e-9, f"round {round_ + 1}"))
    return all_of(*verdicts)


@check(
    "fedavg", without="The problems of this suite would tell nothing: a method that corrects nothing would pass too."
)
def fedavg_drifts(subject: Subject) -> Verdict:
    """With several local steps it comes to rest away from the optimum of the pooled data; with one step it is there."""
    subject.must({"fusion.server_momentum": 0.0, "fusion.client_weights": "samples"})
    ends = {}
    for steps in (1, 5):
        play = Play(subject, quadratics(), lr=0.3, steps=steps)
        for _ in range(60):
            play.play((0, 1, 2, 3))
        ends[steps] = play.params["w"]
    best = optimum(quadratics(), by_samples=True)
    return all_of(
        agree(ends[1], best, 1e-4, "one step, from the optimum"),
        differ(ends[5], best, "five steps and the optimum", 0.01),
    )


@check("fedprox", without="The term is not the one of the paper, and its weight mu has another meaning in every table.")
def fedprox_rounds_by_hand(subject: Subject) -> Verdict:
    """Four rounds with ``g = clip(grad + mu (w - w_t))``, weight decay outside the clip, written out in float64."""
    subject.must({"fusion.server_momentum": 0.0})
    subject = subject.near(mu=0.6)
    mu, by_samples = subject.config.fedprox.mu, subject.config.fusion.client_weights == "samples"
    play = Play(subject, quadratics(), **HARD)
    w, clients, verdicts = torch.zeros(2, dtype=torch.float64), play.problem.clients, []
    for round_, cohort in enumerate(COHORTS):
        own = []
        for k in cohort:

            def pulled(at: Tensors, k: int = k, sent: torch.Tensor = w) -> Tensors:
                return {"w": slope(clients[k], at["w"]) + mu * (at["w"] - sent)}

            own.append(descend({"w": w}, pulled, 3, 0.2, 0.01, 1.5)["w"])
        sizes = [len(clients[k]) if by_samples else 1 for k in cohort]
        w = torch.stack([size * one for size, one in zip(sizes, own)]).sum(0) / sum(sizes)
        play.play(cohort)
        verdicts.append(agree(play.params, {"w": w}, 1e-9, f"round {round_ + 1}"))
    return all_of(*verdicts)


@check("fedprox", without="The term is weight decay under another name: it pulls a good model away from its optimum.")
def fedprox_pulls_to_what_was_sent(subject: Subject) -> Verdict:
    """A client that receives its own optimum stays there, whatever mu; a pull to zero would move it."""
    problem = quadratics((6,))
    best = optimum(problem, by_samples=True)
    play = Play(subject.near(mu=0.6), problem, lr=0.3)
    play.begin_at({"w": best.clone()})
    return agree(play.turn(0).payload.weights().params, {"w": best}, 1e-9, "from the optimum")


@check("fedprox", without="A comparison at mu = 0 shows a difference that is not the term's.")
def fedprox_without_mu_is_fedavg(subject: Subject) -> Verdict:
    """With mu = 0 it is FedAvg, and with mu > 0 it is not."""
    return all_of(
        same_as_fedavg(subject.where(mu=0.0), rounds=3),
        differ(end(subject.where(mu=0.6), 3).params, end(fedavg_twin(subject), 3).params, "with mu = 0.6"),
    )


def end(subject: Subject, rounds: int, sizes: tuple[int, ...] = (6, 6, 6)) -> Play:
    """Return a federation of networks after some rounds."""
    play = Play(subject, network(sizes), batch_size=4)
    for cohort in ((0, 1, 2), (0, 2), (1, 2))[:rounds]:
        play.play(cohort)
    return play


def same_as_fedavg(subject: Subject, rounds: int, sizes: tuple[int, ...] = (4, 6, 10)) -> Verdict:
    """Say whether a method's model is FedAvg's after some rounds."""
    own, fedavg = end(subject, rounds, sizes), end(fedavg_twin(subject), rounds, sizes)
    return agree(own.server.weights, fedavg.server.weights, 1e-12, f"after {rounds} rounds, from FedAvg")


@check("alone", without="The floor that methods are compared with is not one: clients learn from each other after all.")
def alone_by_hand(subject: Subject) -> Verdict:
    """A client goes on from its own model, round after round, by gradient steps written out; absentees stand still."""
    play = Play(subject, linear(), lr=0.2, weight_decay=0.01)
    own = play.problem.clients[0]
    gradient = differentiated(lambda at: cross_entropy(own.x.flatten(1) @ at["head.weight"].T + at["head.bias"], own.y))
    params = play.problem.initial.params
    for cohort in ((0, 1), (1, 2), (0, 2)):
        play.play(cohort)
        if 0 in cohort:
            params = descend(params, gradient, 3, 0.2, 0.01)
    model = play.objective.own_model(play.sent(0), play.states[0], play.problem.initial)
    return agree(model.params, params, 1e-9, "after two rounds of taking part")


@check(
    "fedavg", "fedprox", "scaffold", "feddyn", "moon", "fedgen", "feddistill", "fedmd", "alone",
    without="Traffic is billed wrongly, and a method that sends twice as much looks as cheap as FedAvg.",
)  # fmt: skip
def traffic_as_in_the_papers(subject: Subject) -> Verdict:
    """A client's bytes by kind, down and up, in float32: models, variates, generators, logits, counts."""
    play = Play(subject, network(dtype=torch.float32), batch_size=4)
    play.play((0, 1, 2))
    down, up = expected_traffic(subject, play)
    found_down, found_up = play.sent(0).bytes_by_kind(), play.turn(0).payload.bytes_by_kind()
    right = (found_down, found_up) == (down, up)
    missed = "" if right else f"; expected down {told(down)}, up {told(up)}"
    return Verdict(right, f"down {told(found_down)}, up {told(found_up)}{missed}")


def told(bytes_by_kind: dict[str, int]) -> str:
    """Return bytes by kind in words."""
    return " + ".join(f"{size} {kind}" for kind, size in sorted(bytes_by_kind.items())) or "nothing"


def expected_traffic(subject: Subject, play: Play) -> tuple[dict[str, int], dict[str, int]]:
    """Return the table of the papers, in bytes by kind."""
    family, config = subject.like, subject.config
    p, classes = 4 * (16 * 5 + 5 + 2 * 5 + 5 * 3 + 3), 3  # linear, BatchNorm's weights, head
    model = {"weights": p, "buffers": 4 * 2 * 5 + 8}
    if family == "alone":
        return {}, {}
    if family == "fedmd":
        logits = {"logits": 4 * min(config.fedmd.align_samples, 8) * classes}
        return logits, logits
    if family == "feddistill":
        logits = {"logits": 4 * classes * classes}
        both = logits if config.feddistill.share == "logits" else {**model, **logits}
        return both, both
    if family == "scaffold":
        up = {**model, "control-variate": p}
        return {**up, "scalars": 8}, up
    if family == "feddyn":
        return {**model, "scalars": 8}, model
    if family == "fedgen":
        keys = config.fedgen
        if keys.share == "predictor" or keys.buffers == "personal":
            raise DoesNotApply("part of the model stays with the clients")
        hidden = keys.generator_hidden
        statistics = 2 * hidden
        generator = (keys.noise_dim + classes + 1) * hidden + 2 * hidden + statistics + (hidden + 1) * 5
        up = {**model, "label-counts": 4 * classes}
        return {**up, "generator": 4 * generator}, up
    return model, model
