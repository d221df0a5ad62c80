"""FedGen: a generator of features, learnt from the clients' heads, regularises their training.

Method card
-----------
Paper
    Zhu, Hong, Zhou, "Data-Free Knowledge Distillation for Heterogeneous Federated Learning", ICML 2021.
Client
    ``min_w F_k(w) + alpha E_{y ~ p, eps} CE(head(G(eps, y)), y)``, by SGD from the broadcast model. G is frozen and
    stands in for the body, so that this term moves the head alone. The client counts the labels of its batches, c_k.
Server
    ``min_G E_{y, eps} CE(softmax(mean_k head_k(G(eps, y))), y) + lambda_div L_div`` by Adam, whose moments live on over
    the rounds with G; then the average of the models. p is the distribution of the cohort's counts, uniform at first.
    ``G = linear - BatchNorm - ReLU - linear`` on (eps, one-hot y) gives what the model's head takes, in any model.
Travels
    Down w, G (with its running statistics) and p (M counts); up w_k and c_k (M counts). With ``share = "predictor"``
    the head travels in place of w, and every client keeps a body of its own.
Defaults
    The paper's; where it is silent (the generator's training and sizes, L_div's weight), the authors' code's for MNIST.
    In round 0 nothing is regularised, in any mode: G has learnt nothing yet.
Deviations of the authors' code, each with its key
    ==================== ========================= =========================================================
    topic                paper                     authors' code
    ==================== ========================= =========================================================
    G's teacher          ``teacher`` mean-logits   product-of-means: ``sum_k mean_b CE_k * mean_b r_k^{y_b}``
    noise                ``noise`` normal          uniform on [0, 1)
    labels               ``labels`` counted        uniform: the server over those seen, the clients over all
    average              ``client_weights`` uniform  samples
    BatchNorm buffers    ``buffers`` averaged      personal
    client's weights     ``alpha`` 1, ``beta`` 0   10 and 10 (EMNIST 1), times 0.98^t, at least 1e-4
    regularised steps    ``early_stop`` 0 (all)    the first 20
    ==================== ========================= =========================================================
    ``r_k^y`` is client k's share of the cohort's counts of y; counters start at 1. ``beta`` weighs a term that the
    paper does not have: ``KL(stopgrad softmax head(G(eps, y)) || p_w(x))`` with the labels of the batch itself.
    ``mode = "code"`` sets all; ``mode = "corrected"`` too, but for ``teacher = "per-sample"``:
    ``sum_k mean_b(r_k^{y_b} CE_kb)``, what the product was meant to be before its two shapes were broadcast.
    The code also trains each client at the learning rate of its last round before this one; here it is this round's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fedstill.adam import Adam
from fedstill.distill.labels import draw_labels
from fedstill.distill.losses import classification, diversity, kl
from fedstill.distill.weighting import class_shares, sample_weights
from fedstill.errors import InputError
from fedstill.methods.averaging import FusionSettings, merge
from fedstill.methods.base import (
    ClientWeights,
    FederationInfo,
    LocalObjective,
    LocalTask,
    RoundContext,
    ServerState,
    Upload,
)
from fedstill.models.anatomy import split_state
from fedstill.models.layers import initial_weights
from fedstill.models.stateless import Stateless
from fedstill.payload import Kind, Payload
from fedstill.rng import torch_stream
from fedstill.settings import ModedSettings
from fedstill.training import Trained
from fedstill.weights import State, Tensors, Weights

Noise = Literal["normal", "uniform"]

FLOOR = 1e-4
"""The least that alpha and beta decay to, in the authors' code."""

CODE: dict[str, object] = {
    "teacher": "product-of-means",
    "noise": "uniform",
    "labels": "uniform",
    "client_weights": "samples",
    "buffers": "personal",
    "alpha": 10.0,
    "beta": 10.0,
    "coefficient_decay": 0.98,
    "early_stop": 20,
}
MODES: dict[str, dict[str, object]] = {"paper": {}, "code": CODE, "corrected": {**CODE, "teacher": "per-sample"}}
"""What each mode sets where the key is not given; the settings' own defaults are the paper's."""


class FedGenSettings(ModedSettings):
    """``[fedgen]``."""

    MODES: ClassVar[dict[str, dict[str, object]]] = MODES

    mode: Literal["paper", "code", "corrected"] = "paper"
    """The paper's form, the authors' code's, or the code's with the label weights per sample; sets keys not given."""
    share: Literal["all", "predictor"] = "all"
    """What travels: the model, or its last linear layer alone (theta^p); then every client has a model of its own."""
    buffers: Literal["averaged", "personal"] = "averaged"
    """BatchNorm statistics: averaged (those of a shared model), or each client's own, and so a model of its own."""
    client_weights: ClientWeights = "uniform"
    """Weights of the average: n_k, or the same for all."""
    alpha: float = Field(1.0, ge=0)
    """Client: weight of the cross-entropy of the head on generated features."""
    beta: float = Field(0.0, ge=0)
    """Client: weight of the KL from the head's answer to a feature generated for the same label; not the paper's."""
    coefficient_decay: float = Field(1.0, gt=0, le=1)
    """Factor of alpha and beta per round."""
    early_stop: int = Field(0, ge=0)
    """Steps of a client's round that are regularised; 0 for all."""
    teacher: Literal["mean-logits", "product-of-means", "per-sample"] = "mean-logits"
    """What teaches the generator: the mean of the heads' logits; or each head's loss, with label weights."""
    noise: Literal["normal", "uniform"] = "normal"
    """Law of eps: standard normal, or uniform on [0, 1)."""
    labels: Literal["counted", "uniform"] = "counted"
    """Law of generated labels: that of the cohort's label counts, p, or uniform."""
    lambda_div: float = Field(1.0, ge=0)
    """Weight of the diversity loss L_div."""
    generator_steps: int = Field(50, ge=1)
    """Server's steps per round."""
    generator_batch: int = Field(32, ge=2)
    """Server's batch."""
    generator_lr: float = Field(3e-4, gt=0)
    """Adam's learning rate (the authors have 1e-4 for EMNIST)."""
    generator_lr_decay: float = Field(0.98, gt=0, le=1)
    """Factor of it per round."""
    generator_weight_decay: float = Field(1e-2, ge=0)
    """Adam's weight decay, added to the gradient."""
    noise_dim: int = Field(32, ge=1)
    """Width of eps."""
    generator_hidden: int = Field(256, ge=1)
    """Units of the generator's hidden layer."""


def imitate(generator: Tensors, eps: Tensor, labels: Tensor, train: bool = False) -> Tensor:
    """Return the generator's features (B, D) for noise (B, d) and labels (B,).

    A function of tensors alone, so that clients can call it in threads and under ``torch.func``.

    Parameters
    ----------
    generator : dict
        What :func:`initial_generator` returned, trained since.
    train : bool
        Whether BatchNorm takes the batch's statistics, and updates the running ones in place.
    """
    weight = generator["hidden.weight"]
    # Not F.one_hot, which looks at the labels' values and cannot be batched.
    one_hot = torch.eye(weight.shape[1] - eps.shape[1], dtype=weight.dtype, device=weight.device)[labels]
    given = torch.cat([eps.to(weight.dtype), one_hot], dim=1)
    hidden = F.batch_norm(
        F.linear(given, weight, generator["hidden.bias"]),
        generator["norm.running_mean"],
        generator["norm.running_var"],
        generator["norm.weight"],
        generator["norm.bias"],
        training=train,
    )
    return F.linear(hidden.relu(), generator["latent.weight"], generator["latent.bias"])


def initial_generator(seed: int, noise_dim: int, classes: int, hidden: int, width: int) -> tuple[Tensors, Tensors]:
    """Return a new generator's parameters and running statistics; its weights come from a stream of ``seed``."""
    with initial_weights(torch_stream(seed, "fedgen", "initial-weights")):
        net = nn.Sequential(
            OrderedDict(
                hidden=nn.Linear(noise_dim + classes, hidden),
                norm=nn.BatchNorm1d(hidden),
                relu=nn.ReLU(),
                latent=nn.Linear(hidden, width),
            )
        )
    params, statistics = split_state(net)
    del statistics["norm.num_batches_tracked"]
    return params, statistics


def draw_noise(kind: Noise, shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
    """Return eps, on the stream's device."""
    draw = torch.randn if kind == "normal" else torch.rand
    return draw(shape, generator=stream, device=stream.device)


@dataclass(frozen=True)
class FedGenObjective(LocalObjective):
    """Cross-entropy, and the head's answers to generated features.

    Parameters
    ----------
    settings : FedGenSettings
    batch_size : int
        The clients' batch; as many features are generated in a step.
    """

    settings: FedGenSettings
    batch_size: int
    needs_head = True

    @property
    def personal(self) -> bool:
        """Whether a body or BatchNorm statistics stay with the client."""
        return self.settings.share == "predictor" or self.settings.buffers == "personal"

    def own_model(self, received: Payload, state: State, initial: Weights) -> Weights:
        """Return what came down, with what the client keeps to itself; at first that is the initial model's."""
        params = {**initial.params, **state.get("body", {}), **received[Kind.WEIGHTS]}
        return Weights(params, received.parts.get(Kind.BUFFERS) or state.get("buffers", initial.buffers))

    def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
        """Keep the generator for the steps."""
        return {"generator": received[Kind.GENERATOR]}

    def draws(self, received: Payload, task: LocalTask, stream: torch.Generator) -> Tensors:
        """Return labels y' ~ p, their noise, that of the batch's labels, and alpha and beta of every step.

        Nothing in round 0, where the generator has learnt nothing.
        """
        keys, size = self.settings, (task.steps, self.batch_size)
        if task.round == 0:
            return {}
        prior = received[Kind.LABEL_COUNTS]["prior"].cpu()
        active = (torch.arange(task.steps) < (keys.early_stop or task.steps)).double()
        draws = {
            "labels": draw_labels("sampled", prior[None], *size, stream),
            "noise": draw_noise(keys.noise, (*size, keys.noise_dim), stream),
            "alpha": active * self._decayed(keys.alpha, task.round),
        }
        if keys.beta:
            draws["batch_noise"] = draw_noise(keys.noise, (*size, keys.noise_dim), stream)
            draws["beta"] = active * self._decayed(keys.beta, task.round)
        return draws

    def loss(self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State) -> Tensor:
        """Return ``CE + alpha_t CE(head(G(y')), y') + beta_t KL(head(G(y)) || p(x))``."""
        logits = model(params, buffers, x, train=True)
        loss = F.cross_entropy(logits, y)
        draws, generator = extras.get("draws"), extras["generator"]
        if draws is None:
            return loss
        made = imitate(generator, draws["noise"], draws["labels"])
        loss = loss + draws["alpha"].to(loss) * F.cross_entropy(model.head(params, made), draws["labels"])
        if "beta" in draws:
            made = imitate(generator, draws["batch_noise"][: len(y)], y)  # the last batch of an epoch may be smaller
            loss = loss + draws["beta"].to(loss) * kl(model.head(params, made).detach(), logits).mean()
        return loss

    def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
        """Upload what was received, trained, and the labels seen; keep the rest of the model."""
        params, buffers = trained.weights.params, trained.weights.buffers
        shared = received[Kind.WEIGHTS].keys()
        payload = Payload({Kind.WEIGHTS: {name: params[name] for name in shared}})
        kept = {"body": {name: value for name, value in params.items() if name not in shared}}
        if Kind.BUFFERS in received:
            payload = payload.also(Kind.BUFFERS, buffers)
        else:
            kept["buffers"] = buffers
        classes = len(received[Kind.LABEL_COUNTS]["prior"])
        seen = 1 + torch.bincount(trained.labels, minlength=classes).to(torch.int32)
        payload = payload.also(Kind.LABEL_COUNTS, {"seen": seen})
        return payload, {group: tensors for group, tensors in kept.items() if tensors}

    def _decayed(self, coefficient: float, round: int) -> float:
        return max(FLOOR, coefficient * self.settings.coefficient_decay**round) if coefficient else 0.0


@dataclass(frozen=True)
class Predictors:
    """The cohort's heads, stacked, and r_k^y, each client's share of what the cohort has seen of a label.

    Parameters
    ----------
    weight : Tensor
        (clients, classes, width).
    bias : Tensor
        (clients, classes).
    shares : Tensor
        (clients, classes).
    """

    weight: Tensor
    bias: Tensor
    shares: Tensor

    @staticmethod
    def of(uploads: Sequence[Upload], seen: Tensor, head: str) -> Predictors:
        """Stack the heads of the uploads; ``seen`` has their label counters, (clients, classes)."""
        params = [upload.payload[Kind.WEIGHTS] for upload in uploads]
        weight = torch.stack([own[f"{head}.weight"] for own in params])
        none = weight.new_zeros(weight.shape[1])
        bias = torch.stack([own.get(f"{head}.bias", none) for own in params])
        return Predictors(weight, bias, class_shares(seen).to(weight))

    def logits(self, z: Tensor) -> Tensor:
        """Return every head's logits on features (B, width), (clients, B, classes)."""
        return z @ self.weight.mT + self.bias[:, None]


@dataclass(frozen=True)
class FedGenFusion:
    """The generator's training and the average.

    Parameters
    ----------
    settings : FedGenSettings
    fusion : FusionSettings
        For its class-weighted head.
    seed : int
        ``seed.train``, for the generator's initial weights.
    """

    settings: FedGenSettings
    fusion: FusionSettings = field(default_factory=FusionSettings)
    seed: int = 0
    across_architectures: bool = False

    @property
    def client_weights(self) -> ClientWeights:
        """n_k, or the same for all."""
        return self.settings.client_weights

    @property
    def needs_label_counts(self) -> bool:
        """True for the class-weighted head; the generator has the counters of the batches."""
        return self.fusion.head == "class-weighted"

    def start(self, weights: Weights, info: FederationInfo) -> ServerState:
        """Return what the clients share of the initial model, a new generator, Adam at rest, and uniform p."""
        head = _head(info)
        if f"{head}.weight" not in weights.params:
            raise InputError(f"model.head: {head!r} has no weight of its own, which FedGen's generator teaches")
        if self.settings.share == "predictor":
            own = {name: value for name, value in weights.params.items() if name.startswith(f"{head}.")}
            weights = Weights(own, {})
        like, keys = weights.params[f"{head}.weight"], self.settings
        params, statistics = (
            {name: value.to(like) for name, value in part.items()}
            for part in initial_generator(
                self.seed, keys.noise_dim, info.num_classes, keys.generator_hidden, like.shape[1]
            )
        )
        prior = torch.ones(info.num_classes, dtype=torch.int32, device=like.device)
        method = {"generator": params, "statistics": statistics, **Adam.start(params), "labels": {"prior": prior}}
        return ServerState(weights, method)

    def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
        """Send the shared weights, the generator and p."""
        generator = {**server.method["generator"], **server.method["statistics"]}
        return self._shared(server).also(Kind.GENERATOR, generator).also(Kind.LABEL_COUNTS, server.method["labels"])

    def upload_like(self, server: ServerState) -> Payload:
        """Expect the shared weights and the labels seen."""
        return self._shared(server).also(Kind.LABEL_COUNTS, {"seen": server.method["labels"]["prior"]})

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        """Train the generator on the uploads' heads, then average."""
        keys, stream = self.settings, context.stream("fedgen")
        method = {group: {name: value.clone() for name, value in own.items()} for group, own in server.method.items()}
        seen = torch.stack([upload.payload[Kind.LABEL_COUNTS]["seen"] for upload in uploads])
        drawn = (seen - 1).sum(0, dtype=torch.int32)  # counters start at 1
        if keys.labels == "uniform":
            drawn = (drawn > 0).to(torch.int32)
        size = (keys.generator_steps, keys.generator_batch)
        labels = draw_labels("sampled", drawn[None], *size, stream)
        noise = draw_noise(keys.noise, (*size, keys.noise_dim), stream)
        heads = Predictors.of(uploads, seen, _head(context.info))
        self.train_generator(method, heads, labels, noise, context.round)
        if keys.labels == "counted":
            method["labels"]["prior"] = drawn
        mean = merge(uploads, keys.client_weights, self.fusion.head, server.weights, context.info)
        return ServerState(Weights(mean.params, mean.buffers or server.weights.buffers), method)

    def train_generator(self, method: State, heads: Predictors, labels: Tensor, noise: Tensor, round: int) -> None:
        """Take one step of Adam for each row of labels (steps, B) and noise (steps, B, d); ``method`` is moved."""
        keys, params = self.settings, method["generator"]
        adam = Adam(keys.generator_lr * keys.generator_lr_decay**round, weight_decay=keys.generator_weight_decay)
        for y, eps in zip(labels, noise, strict=True):
            leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
            made = imitate({**leaves, **method["statistics"]}, eps, y, train=True)
            teacher, apart = self.terms(heads, made, y, eps)
            found = torch.autograd.grad(teacher + keys.lambda_div * apart, list(leaves.values()))
            adam.step(params, dict(zip(params, found, strict=True)), method)

    def terms(self, heads: Predictors, made: Tensor, labels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the cohort's heads say of generated features, as a loss, and L_div."""
        logits, teacher = heads.logits(made), self.settings.teacher
        if teacher == "mean-logits":
            taught = F.cross_entropy(logits.mean(0), labels)
        else:
            weights = sample_weights(heads.shares, labels, "label")
            taught = classification(logits, labels, weights, teacher == "per-sample").sum()
        return taught, diversity(made, eps)

    def _shared(self, server: ServerState) -> Payload:
        payload = Payload({Kind.WEIGHTS: server.weights.params})
        travel = server.weights.buffers and self.settings.buffers == "averaged"
        return payload.also(Kind.BUFFERS, server.weights.buffers) if travel else payload


def _head(info: FederationInfo) -> str:
    if info.head is None:
        raise InputError("method = 'fedgen' needs to know the layer that gives the logits: name it with model.head")
    return info.head
