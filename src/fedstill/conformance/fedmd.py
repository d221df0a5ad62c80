"""FedMD: who learns what from whom, and when."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedstill.conformance.bench import Play, cross_entropy, differentiated, linear, network
from fedstill.conformance.feddistill import logits_of
from fedstill.conformance.findings import DoesNotApply, Verdict, agree, all_of, check, differ
from fedstill.conformance.subject import Subject
from fedstill.payload import Kind
from fedstill.weights import Tensors


def one_epoch(subject: Subject) -> Subject:
    """Return the method with one full batch in every phase, on the whole public set."""
    return subject.near(
        align_samples=8, digest_epochs=1, digest_batch_size=64, revisit_epochs=1, revisit_batch_size=64,
        public_epochs=1, public_batch_size=64, private_epochs=1, private_batch_size=64, lr=0.05, head_decay=0.01,
    )  # fmt: skip


class Moments:
    """Adam written out: moments that go on, beta 0.9 and 0.999, epsilon 1e-8."""

    def __init__(self) -> None:
        self.t, self.m, self.v = 0, Tensors(), Tensors()

    def step(self, params: Tensors, loss: Callable[[Tensors], Tensor], lr: float) -> Tensors:
        """Return the parameters after a step."""
        self.t += 1
        moved = {}
        for name, g in differentiated(loss)(params).items():
            self.m[name] = 0.9 * self.m.get(name, torch.zeros_like(g)) + 0.1 * g
            self.v[name] = 0.999 * self.v.get(name, torch.zeros_like(g)) + 0.001 * g * g
            m, v = self.m[name] / (1 - 0.9**self.t), self.v[name] / (1 - 0.999**self.t)
            moved[name] = params[name] - lr * m / (v.sqrt() + 1e-8)
        return moved


@check(
    "fedmd",
    without="Participants revisit before they digest, forget their moments, or learn the consensus on other samples.",
)
def fedmd_rounds_by_hand(subject: Subject) -> Verdict:
    """Three rounds of one client: public set, own data; then digest, revisit, communicate; Adam written out."""
    subject = one_epoch(subject).where(digest_loss="mae", adam="pytorch", align_samples=8)
    play = Play(subject, linear())
    public, own = play.problem.public, play.problem.clients[0]
    assert public is not None
    public_x, public_y = public.x, public.y
    keys, at = subject.config.fedmd, play.problem.initial.params
    private, digest = Moments(), Moments()

    def with_decay(loss: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Tensor]:
        return lambda params: loss(params) + keys.head_decay * params["head.weight"].square().sum()

    revisit = with_decay(lambda params: cross_entropy(logits_of(params, own.x), own.y))
    transfer = with_decay(lambda params: cross_entropy(logits_of(params, public_x), public_y))
    verdicts = []
    for round_ in range(3):
        f = play.sent(0)[Kind.LOGITS]["logits"] if round_ else None
        if f is None:
            at = Moments().step(at, transfer, keys.lr)
        else:

            def distance(params: Tensors, f: Tensor = f) -> Tensor:
                return (logits_of(params, public_x) - f).abs().mean()

            at = digest.step(at, with_decay(distance), keys.lr)
        at = private.step(at, revisit, keys.lr)
        upload = play.play((0, 1, 2))[0]
        got = next(iter(upload.payload[Kind.LOGITS].values()))
        verdicts.append(agree(got, logits_of(at, public_x), 1e-7, f"logits of round {round_ + 1}"))
    return all_of(*verdicts)


@check(
    "fedmd", without="Everybody digests a consensus that is a round old, or none: collaboration lags or never happens."
)
def fedmd_consensus_is_digested_in_the_next_turn(subject: Subject) -> Verdict:
    """After a fusion the mean of its logits goes down, and the next turn depends on it; the first turn has none."""
    play = Play(one_epoch(subject), network())
    if Kind.LOGITS in play.sent(0):
        return Verdict(False, "a consensus is sent before there are any logits")
    weights = subject.config.fedmd.consensus_weights or (1.0, 1.0, 1.0)
    verdicts = []
    for round_, cohort in enumerate(((0, 1, 2), (1, 2), (0, 2))):
        uploads = play.play(cohort)
        own = [next(iter(one.payload[Kind.LOGITS].values())) for one in uploads]
        share = [weights[one.client] for one in uploads]
        mean = torch.stack([weight * one for weight, one in zip(share, own)]).sum(0) / sum(share)
        sent = play.sent(0)
        if Kind.LOGITS not in sent:
            return Verdict(False, f"no consensus is sent after round {round_ + 1}")
        verdicts.append(agree(next(iter(sent[Kind.LOGITS].values())), mean, 1e-9, f"after round {round_ + 1}"))
    name, f = next(iter(sent[Kind.LOGITS].items()))
    other = type(sent)({Kind.LOGITS: {name: -f}})
    return all_of(*verdicts, differ(play.turn(0).payload, play.turn(0, sent=other).payload, "turns on f~ and on -f~"))


@check("fedmd", without="Models leave their owners, and parties with other architectures cannot take part.")
def fedmd_only_logits_travel(subject: Subject) -> Verdict:
    """In three rounds no message, down or up, holds anything but logits."""
    play = Play(subject, network())
    found = set()
    for _ in range(3):
        found |= set(play.sent(0).parts)
        found |= {kind for one in play.play((0, 1, 2)) for kind in one.payload.parts}
    if not found:
        raise DoesNotApply("nothing travels")
    return Verdict(found == {Kind.LOGITS}, f"what travels: {', '.join(sorted(kind.value for kind in found))}")
