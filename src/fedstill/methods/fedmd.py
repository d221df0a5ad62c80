"""FedMD: participants with models of their own learn from their mean logits on public samples.

Method card
-----------
Paper
    Li, Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", NeurIPS 2019 workshop on
    Federated Learning for Data Privacy and Confidentiality (arXiv:1910.03581).
Client
    Once: learn the public set, then the own data (transfer learning). In every later round: *digest*, fit the
    consensus ``f~`` on the samples that it was computed on; *revisit*, learn the own data again; then
    *communicate* the logits ``f_k(x)`` on this round's samples. Every phase is Adam on
    ``loss + head_decay * sum W^2`` with W the weight of the last layer.
Server
    *Aggregate*: ``f~ = sum_k c_k f_k(x) / sum_k c_k`` over the cohort. There is no global model.
Rounds
    The paper's round is communicate, aggregate, digest, revisit. Here a round ends with the server, so that the
    first one is transfer learning and the first logits, and T rounds of collaboration are ``train.rounds = T + 1``.
    The evaluation after round 1 is the one before any collaboration.
Travels
    Logits alone, ``N_a M`` floats each way (nothing down in the first round). Which samples a round has is drawn
    from a stream of (``seed.train``, round) that everybody knows: no index travels.
Kept
    By a client: its model, and the moments of two Adams, which go on from round to round: that of the own data (from
    the transfer learning on) and that of the digest. That of the public set is dropped.
    By the server: the last consensus.
Defaults
    N_a = 5,000 is the paper's. Losses, batches, epochs and the decay of the last layer are those of the authors'
    code for its FEMNIST task with equal shares. Its other tasks have ``revisit_epochs`` 4 or 10, and CIFAR with
    unequal shares ``revisit_batch_size`` 10 and ``digest_batch_size`` 128.
    The keys of ``[local]`` are not used, nor is ``data.augment``.
Deviations of the authors' code
    * Adam is Keras', which adds 1e-7 to the root before the correction of its bias: ``mode = "code"`` sets
      ``adam = "keras"``; ``"pytorch"`` adds 1e-8 after it.
    * Not followed, since it looks at test data: it ends the transfer learning by the accuracy on test samples, with a
      patience of 3 epochs on the public and 10 on the private set. Here both phases have a fixed number of epochs;
      with ``patience`` one ends earlier where its training loss no longer falls.
    * Its CIFAR experiments have the FEMNIST models: name ``fedmd-femnist-*`` instead of ``fedmd-cifar-*``.
    * It subtracts the mean training image; here samples are normalised by channel, as everywhere.
Own decisions
    A client that comes late does its transfer learning first, then digests. One that is absent keeps its model; the
    consensus is the cohort's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedstill.adam import Adam
from fedstill.distill.losses import kl
from fedstill.errors import InputError
from fedstill.methods.base import (
    ClientWeights,
    FederationInfo,
    LocalObjective,
    RoundContext,
    ServerState,
    Turn,
    Upload,
)
from fedstill.models.layout import Layout, channels_outermost, layout_of, predictor
from fedstill.models.randomness import own_stream
from fedstill.models.stateless import Stateless
from fedstill.payload import Kind, Payload
from fedstill.rng import torch_stream
from fedstill.settings import ModedSettings
from fedstill.training import batches, gradients, step_count
from fedstill.weights import State, Tensors, Weights, weighted_sum

if TYPE_CHECKING:
    from fedstill.client import Site
    from fedstill.methods.pretraining import Pretrained

Loss = Callable[[Tensor, Tensor], Tensor]

MODES: dict[str, dict[str, object]] = {"paper": {"adam": "pytorch"}, "code": {"adam": "keras"}}

DIGEST_LOSSES: dict[str, Loss] = {
    "mae": F.l1_loss,
    "mse": F.mse_loss,
    "kl": lambda own, consensus: kl(consensus, own).mean(),
}

PREDICTION_BATCH = 250
"""Samples whose logits are computed at a time; the largest of the paper's models needs 200 MB for a layer of it."""


class FedMDSettings(ModedSettings):
    """``[fedmd]``."""

    MODES: ClassVar[dict[str, dict[str, object]]] = MODES

    mode: Literal["paper", "code"] = "paper"
    """Sets the key adam where it is not given: PyTorch's form, or that of the authors' Keras."""
    align_samples: int = Field(5000, ge=1)
    """Public samples of a round, N_a, drawn by class; all of them where the public set has fewer."""
    consensus_weights: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False)] | None = None
    """Weight of each client in the consensus, c_k, one number per client; by default the same for all."""
    digest_loss: Literal["mae", "mse", "kl"] = "mae"
    """Distance to the consensus: mean absolute or squared error of logits, or KL(softmax f~ || softmax f_k)."""
    digest_epochs: int = Field(1, ge=0)
    """Epochs on the consensus; 0 leaves the digest out: the control in which nobody learns from anybody."""
    digest_batch_size: int = Field(256, ge=1)
    """Batch of the digest."""
    revisit_epochs: int = Field(2, ge=1)
    """Epochs on the own data in every round."""
    revisit_batch_size: int = Field(5, ge=1)
    """Batch of the revisit."""
    public_epochs: int = Field(20, ge=0)
    """Transfer learning: epochs on the public set."""
    public_batch_size: int = Field(128, ge=1)
    """Its batch on the public set."""
    private_epochs: int = Field(25, ge=0)
    """Transfer learning: epochs on the own data after that."""
    private_batch_size: int = Field(32, ge=1)
    """Its batch on the own data."""
    patience: int | None = Field(None, ge=1)
    """Transfer learning: ends a phase after so many epochs without a lower training loss; by default never."""
    min_delta: float = Field(1e-3, ge=0)
    """What counts as lower, for patience."""
    lr: float = Field(1e-3, gt=0)
    """Adam's learning rate, in all phases and rounds."""
    adam: Literal["pytorch", "keras"] = "pytorch"
    """Epsilon of Adam: 1e-8 added to the corrected root, or 1e-7 added to the root before the correction."""
    head_decay: float = Field(1e-3, ge=0)
    """Weight of sum W^2 of the last layer, in the loss of every phase."""
    pretraining_cache: str | None = None
    """Folder in which models are kept that have learnt the public set, for all runs in which that phase is the same
    (same public samples, initial weights, keys, program and machine). Does not change results."""

    def optimiser(self) -> Adam:
        """Return Adam as the keys have it."""
        return Adam(self.lr, epsilon=1e-7, keras=True) if self.adam == "keras" else Adam(self.lr)


def alignment_subset(labels: Tensor, number: int, seed: int, round: int) -> Tensor:
    """Return the public samples of a round, ascending positions (number,) on the CPU, the same for everybody.

    Every class has its share of them, rounded, in a random choice: the samples of a class of n get the ranks
    (1/2)/n, (3/2)/n, ... in random order, and the lowest ranks are taken; equal ranks in random order.

    Parameters
    ----------
    labels : Tensor
        Of the public set, (N,).
    number : int
        N_a; all are taken where there are no more.
    seed : int
        ``seed.train``.
    round : int
        t, from 0.
    """
    shuffled = torch.randperm(len(labels), generator=torch_stream(seed, "fedmd-alignment", round))
    known = labels.cpu()[shuffled]
    ranks = torch.empty(len(known), dtype=torch.float64)
    for label in range(int(known.max()) + 1):
        own = known == label
        size = int(own.sum())
        ranks[own] = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return shuffled[ranks.argsort(stable=True)[:number]].sort().values


@dataclass(frozen=True)
class Lesson:
    """One phase: what is learnt, by which loss, and how often it is gone through."""

    name: str
    x: Tensor
    target: Tensor
    loss: Loss
    batch_size: int
    epochs: int
    patience: int | None = None


@dataclass
class Learner:
    """A client's model and the moments of its Adams, changed in place.

    Meanwhile the channels may be innermost in all of them; what is kept has the usual layout.
    """

    model: Stateless
    weights: Weights
    settings: FedMDSettings
    digest: State
    private: State
    channels_last: bool = False

    @staticmethod
    def of(site: Site, settings: FedMDSettings) -> Learner:
        """Return a client's learner as it was after its last round, or before its first."""
        layout = layout_of(site.channels_last)
        weights = own_model(site.state, site.initial).map(layout)
        digest, private = (
            _moments(name, site.state, layout) if site.state else Adam.start(weights.params)
            for name in ("digest", "private")
        )
        return Learner(site.model, weights, settings, digest, private, site.channels_last)

    def state(self) -> State:
        """Return what the client keeps."""
        adams = {"digest": self.digest, "private": self.private}
        moments = {f"{name}-{group}": own for name, adam in adams.items() for group, own in adam.items()}
        kept = {"params": self.weights.params, "buffers": self.weights.buffers, **moments}
        return {group: {name: channels_outermost(value) for name, value in own.items()} for group, own in kept.items()}

    def take(self, found: Pretrained) -> None:
        """Go on from a stored model as if it had just been learnt."""
        device = next(iter(self.weights.params.values())).device
        self.weights = found.weights.to(device).map(layout_of(self.channels_last))
        if (stream := own_stream(self.model.module)) is not None and found.layers is not None:
            stream.set_state(found.layers)

    def study(self, site: Site, lesson: Lesson, moments: State) -> list[Tensor]:
        """Go through a lesson in shuffled mini-batches and return the loss of each step."""
        order, samples = site.stream(f"fedmd-{lesson.name}"), len(lesson.x)
        steps = step_count(samples, lesson.batch_size, 1, None)
        losses: list[Tensor] = []
        means: list[float] = []
        for _ in range(lesson.epochs):
            total = torch.zeros((), device=lesson.x.device)
            for batch in batches(samples, lesson.batch_size, steps, order, device=lesson.x.device):
                site.check_stop()
                losses.append(self.step(lesson, batch, moments))
                total += losses[-1] * len(batch) / samples
            means.append(float(total))
            if stalled(means, lesson.patience, self.settings.min_delta):
                break
        return losses

    def step(self, lesson: Lesson, batch: Tensor, moments: State) -> Tensor:
        """Take one step of Adam and return the loss before it."""
        params = {name: value.detach().requires_grad_() for name, value in self.weights.params.items()}
        inputs = layout_of(self.channels_last)(lesson.x.index_select(0, batch))
        logits = self.model(params, self.weights.buffers, inputs, train=True)
        loss = lesson.loss(logits, lesson.target[batch])
        if self.settings.head_decay:
            loss = loss + self.settings.head_decay * head_weight(self.model, params).square().sum()
        grads = gradients(loss, list(params.values()))
        self.settings.optimiser().step(params, dict(zip(params, grads, strict=True)), moments)
        return loss.detach()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return the model's logits in eval mode, (samples, M)."""
        predict = predictor(self.model, self.weights, self.channels_last)
        return torch.cat([predict(part) for part in torch.split(x, PREDICTION_BATCH)])


@dataclass(frozen=True)
class FedMDObjective(LocalObjective):
    """Transfer learning, then in every round digest, revisit, communicate."""

    settings: FedMDSettings

    needs_head = True
    needs_public = True

    @property
    def personal(self) -> bool:
        """True: every client predicts with its own model."""
        return True

    def own_model(self, received: Payload, state: State, initial: Weights) -> Weights:
        """Return the client's model; before its first round its architecture's initial weights."""
        return own_model(state, initial)

    def run(self, site: Site) -> Turn:
        """Learn, and upload the logits on this round's public samples."""
        assert site.public is not None
        learner, losses = Learner.of(site, self.settings), list[Tensor]()
        steps, notes = 0, list[str]()
        if not site.state:
            steps += self.learn_public_set(site, learner, notes)
            losses += learner.study(site, self.own_data(site, first=True), learner.private)
        if Kind.LOGITS in site.received:
            steps += len(learner.study(site, self.consensus(site), learner.digest))
            losses += learner.study(site, self.own_data(site), learner.private)
        own = learner.logits(site.public.x[self.subset(site, site.task.round)])
        loss = float(torch.stack(losses).mean()) if losses else 0.0
        return Turn(Payload({Kind.LOGITS: {"logits": own}}), learner.state(), steps + len(losses), loss, tuple(notes))

    def learn_public_set(self, site: Site, learner: Learner, notes: list[str]) -> int:
        """Do the transfer learning's first phase, or take what the cache has of it, and return its steps."""
        lesson = self.public_set(site)

        def learn() -> int:
            return len(learner.study(site, lesson, Adam.start(learner.weights.params)))

        if (folder := self.settings.pretraining_cache) is None:
            return learn()
        # Here, since what writes files needs the configuration, of which this module's settings are a part.
        from fedstill.methods.pretraining import Pretrained, PretrainingCache, key_of, why_not

        if problem := why_not(site.model.module):
            notes.append(f"its phase on the public set is not cached: {problem}")
            return learn()
        cache = PretrainingCache(Path(folder).expanduser())
        cache.make_folder()
        key = key_of(site.model, learner.weights, lesson.x, lesson.target, self.told_by(site, lesson))
        try:
            if (found := cache.load(key)) is not None:
                learner.take(found)
                notes.append(f"its phase on the public set is from {cache.path(key)}")
                return found.steps
        except ValueError as error:
            notes.append(f"{error}; its phase on the public set is done again")
        steps, stream = learn(), own_stream(site.model.module)
        cache.store(
            key, Pretrained(learner.weights.map(channels_outermost), steps, stream.get_state() if stream else None)
        )
        return steps

    def told_by(self, site: Site, lesson: Lesson) -> dict[str, object]:
        """Return what the first phase depends on beside model and samples: keys, and the seed of the order."""
        keys = self.settings
        return {
            "epochs": lesson.epochs,
            "batch_size": lesson.batch_size,
            "patience": lesson.patience and (lesson.patience, keys.min_delta),
            "adam": keys.optimiser(),
            "head_decay": keys.head_decay,
            "order": site.stream(f"fedmd-{lesson.name}").initial_seed(),
            "channels_last": site.channels_last,
        }

    def public_set(self, site: Site) -> Lesson:
        """Return the transfer learning's first phase."""
        assert site.public is not None
        keys = self.settings
        x, y = site.public.x, site.public.y
        return Lesson("public", x, y, F.cross_entropy, keys.public_batch_size, keys.public_epochs, keys.patience)

    def own_data(self, site: Site, first: bool = False) -> Lesson:
        """Return the revisit, or the transfer learning's second phase."""
        keys, x, y = self.settings, site.own.x, site.own.y
        if first:
            return Lesson("private", x, y, F.cross_entropy, keys.private_batch_size, keys.private_epochs, keys.patience)
        return Lesson("revisit", x, y, F.cross_entropy, keys.revisit_batch_size, keys.revisit_epochs)

    def consensus(self, site: Site) -> Lesson:
        """Return the digest: the consensus that was sent, on the samples of the round it was computed in."""
        assert site.public is not None
        keys, x = self.settings, site.public.x[self.subset(site, site.task.round - 1)]
        target, loss = site.received[Kind.LOGITS]["logits"], DIGEST_LOSSES[keys.digest_loss]
        return Lesson("digest", x, target, loss, keys.digest_batch_size, keys.digest_epochs)

    def subset(self, site: Site, round: int) -> Tensor:
        """Return the public samples of a round, on the device."""
        assert site.public is not None
        chosen = alignment_subset(site.public.y, self.settings.align_samples, site.seed, round)
        return chosen.to(site.public.y.device)


@dataclass(frozen=True)
class FedMDFusion:
    """The consensus, in place of a global model.

    Parameters
    ----------
    settings : FedMDSettings
    clients : int
        K.
    """

    settings: FedMDSettings
    clients: int
    needs_label_counts: bool = False
    client_weights: ClientWeights = "uniform"
    across_architectures: bool = True

    def __post_init__(self) -> None:
        given = self.settings.consensus_weights
        if given is not None and len(given) != self.clients:
            raise InputError(
                f"fedmd.consensus_weights: there are {self.clients} clients and {len(given)} weights; give one for each"
            )

    def start(self, weights: Weights, info: FederationInfo) -> ServerState:
        """Return a state without a consensus; what an upload has is known already, N_a and M."""
        shape = torch.tensor([min(self.settings.align_samples, info.public), info.num_classes])
        return ServerState(Weights({}, {}), {"upload": {"shape": shape}})

    def broadcast(self, server: ServerState, client: int, info: FederationInfo) -> Payload:
        """Send the consensus of the last round; nothing in the first."""
        consensus = server.method.get("consensus")
        return Payload({Kind.LOGITS: consensus}) if consensus else Payload()

    def upload_like(self, server: ServerState) -> Payload:
        """Expect the logits on the round's public samples."""
        return Payload({Kind.LOGITS: {"logits": torch.zeros(server.method["upload"]["shape"].tolist())}})

    def fuse(self, server: ServerState, uploads: Sequence[Upload], context: RoundContext) -> ServerState:
        """Return ``f~ = sum_k c_k f_k / sum_k c_k`` over the cohort."""
        given = self.settings.consensus_weights
        weights = [1.0 if given is None else given[upload.client] for upload in uploads]
        shares = [weight / sum(weights) for weight in weights]
        logits = weighted_sum([upload.payload[Kind.LOGITS]["logits"] for upload in uploads], shares)
        return ServerState(server.weights, {**server.method, "consensus": {"logits": logits}})


def own_model(state: State, initial: Weights) -> Weights:
    """Return the model in a client's state, or the initial one."""
    return Weights(state["params"], state.get("buffers", {})) if state else initial


def _moments(name: str, state: State, layout: Layout) -> State:
    """Return a copy of one Adam's state out of a client's."""
    groups = Adam.start({})
    return {group: {key: layout(value) for key, value in state[f"{name}-{group}"].items()} for group in groups}


def head_weight(model: Stateless, params: Tensors) -> Tensor:
    """Return the last layer's weight."""
    name = f"{model.head_name}.weight"
    if name not in params:
        raise InputError(
            f"model.head: the weight of {model.head_name!r} is no parameter of its own; use a plain nn.Linear, "
            f"or set fedmd.head_decay = 0"
        )
    return params[name]


def stalled(means: Sequence[float], patience: int | None, min_delta: float) -> bool:
    """Say whether none of the last ``patience`` means is lower, by ``min_delta``, than the lowest before them."""
    if patience is None or len(means) <= patience:
        return False
    return min(means[-patience:]) > min(means[:-patience]) - min_delta
