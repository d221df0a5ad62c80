"""FedDistill: running sums, their means, and what clients learn from them, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from fedstill.conformance.bench import Play, cross_entropy, descend, differentiated, linear
from fedstill.conformance.findings import Verdict, agree, all_of, check
from fedstill.conformance.subject import Subject
from fedstill.payload import Kind
from fedstill.weights import Tensors


def logits_of(params: Tensors, x: Tensor) -> Tensor:
    """Return the bench's linear model, written out."""
    return x.flatten(1) @ params["head.weight"].T + params["head.bias"]


@check(
    "feddistill",
    without="Labels that a client rarely sees count too much, or clients distil before anything has been averaged.",
)
def feddistill_rounds_by_hand(subject: Subject) -> Verdict:
    """Three rounds: sums of logits by label with counts from 1, their uniform mean, ``CE + lambda KL(t_y || p)``."""
    subject = subject.near(lambda_kl=0.7)
    keys = subject.config.feddistill
    play = Play(subject, linear(), lr=0.2)
    clients, initial = play.problem.clients, play.problem.initial.params
    models = [initial] * 3
    sums, counts = torch.zeros(3, 3, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)
    t: Tensor | None = None
    verdicts = []
    for round_, cohort in enumerate(((0, 1, 2), (1, 2), (0, 2))):
        for k in cohort:
            x, y = clients[k].x, clients[k].y

            def loss(at: Tensors, x: Tensor = x, y: Tensor = y, t: Tensor | None = t) -> Tensor:
                logits = logits_of(at, x)
                if t is None:
                    return cross_entropy(logits, y)
                q, log_p = t[y].softmax(1), logits - logits.logsumexp(1, keepdim=True)
                return cross_entropy(logits, y) + keys.lambda_kl * (q * (q.log() - log_p)).sum(1).mean()

            for _ in range(3):
                seen = logits_of(models[k], x)
                for label in range(3):
                    sums[k, label] += seen[y == label].sum(0)
                    counts[k, label] += int((y == label).sum())
                models[k] = descend(models[k], differentiated(loss), 1, 0.2)
        t = torch.stack([sums[k] / counts[k][:, None] for k in cohort]).mean(0)
        play.play(cohort)
        if keys.share == "weights":
            sizes = [len(clients[k]) for k in cohort]
            mean = {name: sum((size * models[k][name] for size, k in zip(sizes, cohort)), torch.zeros(()).double())
                    / sum(sizes) for name in initial}  # fmt: skip
            models = [mean] * 3
            verdicts.append(agree(play.params, mean, 1e-5, f"model after round {round_ + 1}"))
        # What travels is float32.
        verdicts.append(agree(next(iter(play.sent(0)[Kind.LOGITS].values())), t, 1e-5, f"t after round {round_ + 1}"))
    return all_of(*verdicts)
