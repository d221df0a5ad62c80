"""FedGen: what the generated features reach, what teaches the generator, what is counted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedstill.conformance.averaging import same_as_fedavg
from fedstill.conformance.bench import SEED, Play, cross_entropy, descend, differentiated, network
from fedstill.conformance.findings import DoesNotApply, Verdict, agree, all_of, check, differ
from fedstill.conformance.moon import perceptron
from fedstill.conformance.subject import Subject
from fedstill.methods.base import Upload
from fedstill.payload import Kind, Payload
from fedstill.rng import torch_stream
from fedstill.weights import Tensors


def regularised(subject: Subject, alpha: float) -> Subject:
    """Return the method with a constant alpha in all steps, and as it is otherwise."""
    return subject.where(alpha=alpha, early_stop=0, coefficient_decay=1.0).near(beta=0.0)


@check("fedgen", without="Made-up features train the body, which they know nothing of.")
def fedgen_generated_batch_reaches_the_head_alone(subject: Subject) -> Verdict:
    """One step with and without the generated batch: the body's weights are the same bits, the head's are not."""
    ends = []
    for alpha in (0.0, 3.0):
        play = Play(regularised(subject, alpha), network(), steps=1)
        play.play((0, 1, 2))
        play.begin_at({name: play.problem.initial.params[name] for name in play.params})
        result = play.turn(0)
        ends.append({**result.state.get("body", {}), **result.payload.weights().params})
    body, head = ([{k: v for k, v in end.items() if k.startswith(part)} for end in ends] for part in ("body", "head"))
    return all_of(agree(body[0], body[1], 0, "body"), differ(head[0], head[1], "heads", 1e-6))


def imagined(generator: Tensors, eps: Tensor, labels: Tensor) -> Tensor:
    """Return linear - BatchNorm - ReLU - linear of noise and one-hot label, written out, in eval mode."""
    missing = {"hidden.weight", "norm.running_mean", "latent.weight"} - generator.keys()
    if missing:
        raise DoesNotApply(f"the generator that travels has no {min(missing)}")
    weight = generator["hidden.weight"]
    one_hot = (labels[:, None] == torch.arange(weight.shape[1] - eps.shape[1])).to(weight)
    hidden = torch.cat([eps.to(weight), one_hot], 1) @ weight.T + generator["hidden.bias"]
    spread = (generator["norm.running_var"] + 1e-5).sqrt()
    hidden = (hidden - generator["norm.running_mean"]) / spread * generator["norm.weight"] + generator["norm.bias"]
    return hidden.clamp_min(0) @ generator["latent.weight"].T + generator["latent.bias"]


@check("fedgen", without="The clients are regularised by something else than the head's loss on generated features.")
def fedgen_client_steps_by_hand(subject: Subject) -> Verdict:
    """Three steps of ``CE + alpha CE(head(G(eps, y')), y')``, alpha = 1, on the draws that the method announces."""
    play = Play(regularised(subject, 1.0), network(norm=False), lr=0.3)
    play.play((0, 1, 2))
    sent, own = play.sent(0), play.problem.clients[0]
    params = play.objective.own_model(sent, play.states.get(0, {}), play.problem.initial).params
    task = play.trainer.task(play.work(0))
    draws = play.objective.draws(sent, task, torch_stream(SEED, "objective", play.round, 0))
    if not {"labels", "noise"} <= draws.keys():
        raise DoesNotApply("it announces no labels and noise of its steps")
    for labels, eps in zip(draws["labels"], draws["noise"]):
        made = imagined(sent[Kind.GENERATOR], eps, labels)

        def loss(at: Tensors, made: Tensor = made, labels: Tensor = labels) -> Tensor:
            dreamt = cross_entropy(made @ at["head.weight"].T + at["head.bias"], labels)
            return cross_entropy(perceptron(at, own.x)[0], own.y) + dreamt

        params = descend(params, differentiated(loss), 1, 0.3)
    got = play.turn(0).payload.weights().params
    return agree(got, {name: params[name] for name in got}, 1e-9, "w_k")


@check("fedgen", without="Clients are regularised by a generator that has learnt nothing.")
def fedgen_first_round_is_plain(subject: Subject) -> Verdict:
    """In the first round nothing is regularised: with clients of equal size it is FedAvg."""
    if play_of(subject).objective.personal:
        raise DoesNotApply("part of the model stays with the clients")
    return same_as_fedavg(subject, 1, (6, 6, 6))


def play_of(subject: Subject) -> Play:
    """Return a federation of two clients and two classes, without BatchNorm."""
    return Play(subject, network((6, 6), norm=False, classes=2))


def move_of_the_generator(
    subject: Subject, heads: list[Tensor], biases: list[Tensor], seen: list[list[int]]
) -> tuple[float, float]:
    """Return by how much one step moves the last bias of the generator in its first place, and its learning rate.

    Adam's first step is the learning rate against the gradient's sign. The heads are small, so that their answers
    do not depend on what is generated: only on their biases.
    """
    subject = subject.where(
        generator_steps=1, generator_batch=200, lambda_div=0.0, generator_weight_decay=0.0, generator_lr=0.01
    )
    play = play_of(subject)
    like = play.fusion.upload_like(play.server)
    uploads = []
    for client, (head, bias, counts) in enumerate(zip(heads, biases, seen)):
        own = {**play.problem.initial.params, "head.weight": 1e-3 * head, "head.bias": bias}
        payload = Payload({Kind.WEIGHTS: {name: own[name] for name in like[Kind.WEIGHTS]}})
        name, kind = next(iter(like[Kind.LABEL_COUNTS].items()))
        payload = payload.also(Kind.LABEL_COUNTS, {name: torch.tensor(counts, dtype=kind.dtype)})
        uploads.append(Upload(client, payload, 6, 1))
    before = play.sent(0)[Kind.GENERATOR]
    play.server = play.fused(uploads)
    after = play.sent(0)[Kind.GENERATOR]
    if "latent.bias" not in after:
        raise DoesNotApply("the generator that travels has no latent.bias")
    return float((after["latent.bias"] - before["latent.bias"])[0]), subject.config.fedgen.generator_lr


def only(first: float, *, like: Tensor) -> Tensor:
    """Return a head (2, D) that looks at the first feature alone: ``first`` for class 0, the opposite for class 1."""
    head = torch.zeros_like(like)
    head[0, 0], head[1, 0] = first, -first
    return head


@check(
    "fedgen",
    without="A product of two means: a client that knows nothing of a label teaches it as much as one that does.",
)
def fedgen_label_weights_act_per_sample(subject: Subject) -> Verdict:
    """With per-sample weights, a head learns from the labels its client has seen: a case whose sign tells.

    Client 0 has seen 100 of class 0, client 1 has seen 400 of class 1; only client 0's head looks at the first
    feature, and it is nearly sure of class 0. Its own label raises that feature; the mean over all would lower it.
    """
    subject = subject.near(teacher="per-sample")
    if subject.config.fedgen.teacher == "mean-logits":
        raise DoesNotApply("the mean of the logits has no label weights")
    like = play_of(subject).problem.initial.params["head.weight"]
    sure, unsure = torch.tensor([math.log(9), 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    moved, rate = move_of_the_generator(
        subject, [only(1.0, like=like), only(0.0, like=like)], [sure, unsure], [[101, 1], [1, 401]]
    )
    return Verdict(moved > 0.5 * rate, f"the feature's bias moved by {moved:+.3g}, expected {rate:+.3g}")


@check(
    "fedgen",
    without="A sure client cannot outvote an unsure one: the generator follows single heads, not the ensemble.",
)
def fedgen_teacher_is_the_mean_of_the_logits(subject: Subject) -> Verdict:
    """In the paper's form the ensemble is ``softmax(mean_k logits_k)``: a case in which the sum of losses moves apart.

    All labels are 0. Client 0 is sure of it and looks at the first feature, client 1 is not and looks at it the other
    way round, a little less. The ensemble's gradient follows the sum of the heads; a sum of losses the unsure one.
    """
    if subject.config.fedgen.teacher != "mean-logits":
        raise DoesNotApply("its teacher is fixed at another form")
    like = play_of(subject).problem.initial.params["head.weight"]
    sure, unsure = torch.tensor([6.0, 0.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    moved, rate = move_of_the_generator(
        subject, [only(1.5, like=like), only(-1.0, like=like)], [sure, unsure], [[31, 1], [31, 1]]
    )
    return Verdict(moved > 0.5 * rate, f"the feature's bias moved by {moved:+.3g}, expected {rate:+.3g}")


@check("fedgen", without="Labels that nobody in the cohort holds are generated, from heads that have never seen them.")
def fedgen_labels_are_those_counted(subject: Subject) -> Verdict:
    """With ``labels = counted``, the p that is sent down is the sum of what the cohort has counted in its batches."""
    subject = subject.where(labels="counted")
    play = Play(subject, network(norm=False))
    play.play((0, 1, 2))
    counted = play.play((0, 1))
    wanted = torch.stack([next(iter(one.payload[Kind.LABEL_COUNTS].values())) - 1 for one in counted]).sum(0)
    drawn = torch.stack([3 * torch.bincount(play.problem.clients[k].y, minlength=3) for k in (0, 1)]).sum(0)
    prior = next(iter(play.sent(0)[Kind.LABEL_COUNTS].values())).double()
    return all_of(
        agree(wanted, drawn, 0, "counters, from 1, against three full batches"),
        agree(prior / prior.sum(), drawn.double() / drawn.sum(), 1e-9, "p"),
    )
