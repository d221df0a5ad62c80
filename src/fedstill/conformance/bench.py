"""Tiny problems, and the rounds that are played on them: float64, known optima, named streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedstill.client import ClientResult, ClientWork, LocalTrainer
from fedstill.config import LocalSettings
from fedstill.conformance.subject import Subject
from fedstill.data.dataset import Samples
from fedstill.methods.base import FederationInfo, RoundContext, ServerState, Upload
from fedstill.models import Backbone, Stateless, initial_weights, split_state
from fedstill.payload import Kind, Payload
from fedstill.rng import torch_stream
from fedstill.weights import State, Tensors, Weights

SEED = 7
SHAPE = (1, 4, 4)


@dataclass(frozen=True)
class Problem:
    """An architecture, its initial weights, and who holds what."""

    model: Stateless
    initial: Weights
    clients: tuple[Samples, ...]
    classes: int
    public: Samples | None = None

    @property
    def info(self) -> FederationInfo:
        """What the server knows."""
        sizes = tuple(len(own) for own in self.clients)
        shape = tuple(self.clients[0].x.shape[1:])
        known = len(self.public) if self.public else 0
        return FederationInfo(sizes, self.classes, shape, self.model.head_name, public=known)


class Square(nn.Module):
    """Logits whose cross-entropy with label 0 is ``(a . w - b)^2 / 2 + 1`` for the sample (a, b).

    With ``e^s = e^q - 1`` the cross-entropy of the logits (0, s) is ``log(1 + e^s) = q``: any positive loss can be
    had so, from any objective that minimises cross-entropy, without a change to it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the two logits (B, 2)."""
        q: Tensor = 0.5 * (x[:, :-1] @ self.w - x[:, -1]).square() + 1
        s = q + torch.log(-torch.expm1(-q))
        return torch.stack([torch.zeros_like(s), s], 1)


def quadratics(sizes: Sequence[int] = (3, 5, 8, 24)) -> Problem:
    """Return clients that disagree: each has its own curvature, between 1/2 and 3/2, and its own minimum."""
    clients = []
    for client, size in enumerate(sizes):
        draw = torch_stream(SEED, "quadratics", client)
        q, _ = torch.linalg.qr(torch.randn(size, 2, generator=draw, dtype=torch.float64))
        turn, _ = torch.linalg.qr(torch.randn(2, 2, generator=draw, dtype=torch.float64))
        a = size**0.5 * q @ torch.tensor([0.5, 1.5], dtype=torch.float64).sqrt().diag() @ turn
        b = a @ (3 * torch.randn(2, generator=draw, dtype=torch.float64))
        clients.append(Samples(torch.cat([a, b[:, None]], 1), torch.zeros(size, dtype=torch.int64)))
    module = Square(2)
    return Problem(Stateless(module), Weights(*split_state(module)), tuple(clients), 2)


def slope(own: Samples, w: Tensor) -> Tensor:
    """Return the gradient of a client's mean square."""
    a, b = own.x[:, :-1], own.x[:, -1]
    found: Tensor = a.T @ (a @ w - b) / len(b)
    return found


def optimum(problem: Problem, by_samples: bool) -> Tensor:
    """Return the minimum of the pooled data's squares, or of the mean of the clients' mean squares."""
    left, right = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for own in problem.clients:
        a, b = own.x[:, :-1], own.x[:, -1]
        weight = 1.0 if by_samples else 1.0 / len(b)
        left, right = left + weight * a.T @ a, right + weight * a.T @ b
    best: Tensor = torch.linalg.solve(left, right)
    return best


def network(
    sizes: Sequence[int] = (4, 6, 10), *, norm: bool = True, classes: int = 3, dtype: torch.dtype = torch.float64
) -> Problem:
    """Return a perceptron with one hidden layer, with or without BatchNorm, on small images with skewed labels."""
    with initial_weights(torch_stream(SEED, "network")):
        layers: list[nn.Module] = [nn.Flatten(), nn.Linear(16, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.ReLU()]
        module = Backbone(nn.Sequential(*layers), 5, classes).to(dtype)
    return Problem(
        Stateless(module, "head"),
        Weights(*split_state(module)),
        tuple(images(size, classes, dtype, "client", number) for number, size in enumerate(sizes)),
        classes,
        images(8, classes, dtype, "public"),
    )


def linear(sizes: Sequence[int] = (4, 6, 10), classes: int = 3) -> Problem:
    """Return a linear model of the same images: logits ``x W' + b``."""
    with initial_weights(torch_stream(SEED, "linear")):
        module = Backbone(nn.Flatten(), 16, classes).double()
    return replace(
        network(sizes, classes=classes), model=Stateless(module, "head"), initial=Weights(*split_state(module))
    )


def images(size: int, classes: int, dtype: torch.dtype, *name: str | int) -> Samples:
    """Return small images; their labels begin with the client's number, so that clients differ."""
    draw = torch_stream(SEED, "images", *name)
    first = int(name[-1]) if isinstance(name[-1], int) else 0
    y = (first + torch.randint(2, (size,), generator=draw)) % classes
    return Samples(torch.randn(size, *SHAPE, generator=draw, dtype=torch.float64).to(dtype), y)


class Play:
    """Rounds of a method on a problem, by the library's own client and message classes.

    Parameters
    ----------
    subject : Subject
    problem : Problem
    wire : bool
        Whether every message travels as bytes.
    **local
        Keys of ``[local]``; by default full batches, three steps, learning rate 0.1, no decay, no clip.
    """

    def __init__(self, subject: Subject, problem: Problem, *, wire: bool = False, **local: Any) -> None:
        if problem.model.head_name is None:
            subject.must({"fusion.head": "mean"})
        self.objective, self.fusion = subject.parts()
        self.problem, self.info, self.wire = problem, problem.info, wire
        plain = {"steps": 3, "batch_size": 64, "lr_decay": 1.0, "weight_decay": 0.0, "clip_norm": None}
        self.local = LocalSettings.model_validate({**plain, **local})
        x, y = (torch.cat([getattr(own, part) for own in problem.clients]) for part in ("x", "y"))
        shares = list(torch.split(torch.arange(len(y)), list(self.info.samples)))
        self.trainer = LocalTrainer(
            self.objective, Samples(x, y), shares, self.local, problem.classes, SEED, [problem.initial],
            public=problem.public,
        )  # fmt: skip
        shared = not self.fusion.across_architectures
        self.server = self.fusion.start(problem.initial if shared else Weights({}, {}), self.info)
        self.states: dict[int, State] = {}
        self.known: dict[int, Tensor] = {}
        self.round = 0

    @property
    def params(self) -> Tensors:
        """The global model."""
        return self.server.weights.params

    def begin_at(self, params: Tensors) -> None:
        """Let the next round start from another model."""
        self.server = replace(self.server, weights=Weights(params, self.server.weights.buffers))

    def sent(self, client: int) -> Payload:
        """Return what the server sends to a client."""
        payload = self.fusion.broadcast(self.server, client, self.info)
        return Payload.from_bytes(payload.to_bytes()) if self.wire else payload

    def work(self, client: int, *, sent: Payload | None = None, state: State | None = None) -> ClientWork:
        """Return what a client gets for this round."""
        ask = self.fusion.needs_label_counts and client not in self.known
        own = self.states.get(client, {}) if state is None else state
        return ClientWork(self.round, client, self.sent(client) if sent is None else sent, own, ask)

    def turn(self, client: int, *, sent: Payload | None = None, state: State | None = None) -> ClientResult:
        """Let a client do its round; nothing is kept here."""
        result = self.trainer([self.problem.model], self.work(client, sent=sent, state=state))
        return replace(result, payload=Payload.from_bytes(result.payload.to_bytes())) if self.wire else result

    def upload(self, result: ClientResult) -> Upload:
        """Return a turn's result as the fusion gets it."""
        counts = self.known.get(result.client)
        if Kind.LABEL_COUNTS in result.payload and "counts" in result.payload[Kind.LABEL_COUNTS]:
            counts = result.payload[Kind.LABEL_COUNTS]["counts"].long()
        return Upload(result.client, result.payload, self.info.samples[result.client], result.steps, counts)

    def fused(self, uploads: Sequence[Upload]) -> ServerState:
        """Return what the fusion makes of uploads; nothing is kept here."""
        return self.fusion.fuse(self.server, uploads, self.context())

    def context(self) -> RoundContext:
        """Return what the server may use."""
        return context(self.info, self.round, self.local.lr_decay, self.problem.public)

    def play(self, cohort: Sequence[int]) -> list[Upload]:
        """Play a round."""
        results = [self.turn(client) for client in cohort]
        uploads = [self.upload(result) for result in results]
        self.server = self.fused(uploads)
        self.states |= {result.client: result.state for result in results}
        self.known |= {one.client: one.label_counts for one in uploads if one.label_counts is not None}
        self.round += 1
        return uploads


def context(info: FederationInfo, round: int, decay: float = 1.0, public: Samples | None = None) -> RoundContext:
    """Return what the server may use in a round."""

    def stream(purpose: str) -> torch.Generator:
        return torch_stream(SEED, purpose, round)

    return RoundContext(round, info, decay**round, stream, torch.device("cpu"), public, public)


def descend(
    params: Tensors,
    gradient: Callable[[Tensors], Tensors],
    steps: int,
    lr: float,
    decay: float = 0.0,
    clip: float = float("inf"),
) -> Tensors:
    """Take plain gradient steps: clip the norm, add weight decay, go."""
    for _ in range(steps):
        slopes = gradient(params)
        norm = sum(float(value.square().sum()) for value in slopes.values()) ** 0.5
        scale = min(1.0, clip / (norm + 1e-6))
        params = {name: value - lr * (scale * slopes[name] + decay * value) for name, value in params.items()}
    return params


def differentiated(loss: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Tensors]:
    """Return the gradient of a loss that is written out as a formula."""

    def gradient(params: Tensors) -> Tensors:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        found = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    return gradient


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean of ``log sum_c e^{l_c} - l_y``."""
    return (logits.logsumexp(1) - logits[torch.arange(len(y)), y]).mean()
