"""The tiny models of the reference cases, their flat states, and one client's turn in a round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from registry import Case
from torch import Tensor, nn

from fedstill.methods.base import FederationInfo, LocalObjective, LocalTask, ServerFusion, ServerState, Upload
from fedstill.models import ConditionalGenerator, Stateless
from fedstill.payload import Payload, problem_with
from fedstill.training import SGD, Trained, train_locally
from fedstill.weights import State, Tensors, Weights


class TinyCNN(nn.Module):
    """conv3x3 (BN) - ReLU - pool - linear - ReLU - linear."""

    def __init__(self, channels: int, maps: int, flat: int, hidden: int, classes: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, maps, 3, padding=1, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(maps)
        self.norm = norm
        self.fc1 = nn.Linear(flat, hidden)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm:
            x = self.bn(x)
        x = nn.functional.max_pool2d(x.relu(), 2).flatten(1)
        return self.fc(self.fc1(x).relu())


class TinyFedCon(nn.Module):
    """The MOON base code's small model: features, two projection layers, and the classifier on the projection."""

    def __init__(self, channels: int, maps: int, flat: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {"conv": nn.Conv2d(channels, maps, 3, padding=1), "fc1": nn.Linear(flat, widths[0])}
        )
        self.l1 = nn.Linear(widths[0], widths[1])
        self.l2 = nn.Linear(widths[1], widths[2])
        self.l3 = nn.Linear(widths[2], widths[3])

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.features["conv"](x).relu(), 2).flatten(1)
        h = self.features["fc1"](x).relu()
        return self.l3(self.l2(self.l1(h).relu()))


def _module(description: Mapping[str, Any]) -> nn.Module:
    shape = {entry["name"]: entry["shape"] for entry in description["layout"]}
    name = description["name"]
    if name in ("TinyCNN", "TinyCNNBN"):
        maps, channels = shape["conv.weight"][:2]
        hidden, flat = shape["fc1.weight"]
        return TinyCNN(channels, maps, flat, hidden, shape["fc.weight"][0], norm=name == "TinyCNNBN")
    if name == "TinyFedCon":
        maps, channels = shape["features.conv.weight"][:2]
        hidden, flat = shape["features.fc1.weight"]
        widths = [hidden, *(shape[f"l{layer}.weight"][0] for layer in (1, 2, 3))]
        return TinyFedCon(channels, maps, flat, widths)
    if name == "ConditionalGeneratorA":
        channels, ngf = shape["conv_blocks2.3.weight"][:2]
        side = 4 * round((shape["l1.0.weight"][0] / ngf) ** 0.5)
        return ConditionalGenerator(shape["l1.0.weight"][1], shape["l2.0.weight"][1], (channels, side, side), ngf=ngf)
    raise NotImplementedError(name)


@dataclass(frozen=True)
class Architecture:
    """A model of a case: the module in float64 and the order of its flat state.

    The released code's names differ in the generator; there the order and the shapes tie the two together.
    """

    module: nn.Module
    kinds: Mapping[str, str]

    @staticmethod
    def of(case: Case, name: str = "model") -> Architecture:
        description = case.meta["architectures"][name]
        module = _module(description).double()
        layout, own = description["layout"], module.state_dict()
        assert [list(value.shape) for value in own.values()] == [entry["shape"] for entry in layout]
        if name == "model":
            assert list(own) == [entry["name"] for entry in layout]
        kinds = dict(zip(own, (entry["kind"] for entry in layout), strict=True))
        assert {key for key, kind in kinds.items() if kind == "parameter"} == {n for n, _ in module.named_parameters()}
        return Architecture(module, kinds)

    @property
    def stateless(self) -> Stateless:
        """The module; its last linear layer is the head."""
        linear = [name for name, part in self.module.named_modules() if isinstance(part, nn.Linear)]
        return Stateless(self.module, linear[-1])

    def state(self, flat: Tensor) -> Tensors:
        """Return the whole state that a vector holds."""
        return _cut(flat, self.module.state_dict())

    def weights(self, flat: Tensor) -> Weights:
        """Return a whole flat state as weights."""
        state = self.state(flat)
        return Weights(
            {name: value for name, value in state.items() if self.kinds[name] == "parameter"},
            {name: value for name, value in state.items() if self.kinds[name] == "buffer"},
        )

    def trainable(self, flat: Tensor) -> Tensors:
        """Return what a vector over the trainable parameters alone holds, such as a control variate."""
        return _cut(flat, dict(self.module.named_parameters()))

    def flat(self, weights: Weights) -> Tensor:
        """Return weights as a flat state."""
        return _join({**weights.params, **weights.buffers}, self.kinds)

    def flat_trainable(self, tensors: Tensors) -> Tensor:
        """Return tensors of the trainable parameters as a vector."""
        return _join(tensors, [name for name, kind in self.kinds.items() if kind == "parameter"])

    def flat_module(self) -> Tensor:
        """Return the module's own state as a vector."""
        return _join(self.module.state_dict(), self.kinds)


def _cut(flat: Tensor, like: Mapping[str, Tensor]) -> Tensors:
    parts = torch.split(flat, [value.numel() for value in like.values()])
    return {
        name: part.reshape(value.shape).to(value.dtype).clone()
        for (name, value), part in zip(like.items(), parts, strict=True)
    }


def _join(tensors: Mapping[str, Tensor], names: Mapping[str, str] | Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].detach().double().reshape(-1) for name in names])


def batch_order(rows: Tensor) -> list[Tensor]:
    """Return recorded batches without their padding; rows of padding alone are steps that do not exist."""
    return [row[row >= 0] for row in rows if bool((row >= 0).any())]


def over_the_wire(payload: Payload) -> Payload:
    """Return what arrives when ``payload`` is sent as bytes."""
    return Payload.from_bytes(payload.to_bytes())


@dataclass(frozen=True)
class Turn:
    """What one client's turn gave, and what it began with."""

    upload: Upload
    state: State
    trained: Trained
    extras: State
    received: Payload


def client_turn(
    model: Stateless,
    objective: LocalObjective,
    fusion: ServerFusion,
    server: ServerState,
    info: FederationInfo,
    task: LocalTask,
    data: tuple[Tensor, Tensor],
    order: Sequence[Tensor],
    sgd: SGD,
    state: State,
    label_counts: Tensor | None = None,
) -> Turn:
    """Send the model to a client, train there, and take its upload; both messages travel as bytes."""
    received = over_the_wire(fusion.broadcast(server, task.client, info))
    extras = objective.prepare(received, state, task)
    sgd = replace(sgd, lr=task.lr, weight_decay=sgd.weight_decay + objective.extra_weight_decay(received, task))
    trained = train_locally(model, objective, received.weights(), extras, *data, order, sgd)
    payload, state = objective.finish(received, state, trained, task)
    sent = over_the_wire(payload)
    assert problem_with(sent, fusion.upload_like(server)) is None
    upload = Upload(task.client, sent, task.samples, trained.steps, label_counts)
    return Turn(upload, state, trained, extras, received)
