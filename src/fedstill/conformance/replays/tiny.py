"""The tiny models of the reference cases and their flat states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedstill.conformance.replays.registry import Case, Disagrees, must
from fedstill.models import ConditionalGenerator, Stateless
from fedstill.weights import Tensors, Weights


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
        """Return the logits."""
        x = self.conv(x)
        if self.norm:
            x = self.bn(x)
        x = nn.functional.max_pool2d(x.relu(), 2).flatten(1)
        logits: Tensor = self.fc(self.fc1(x).relu())
        return logits


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
        """Return the logits."""
        x = nn.functional.max_pool2d(self.features["conv"](x).relu(), 2).flatten(1)
        h = self.features["fc1"](x).relu()
        logits: Tensor = self.l3(self.l2(self.l1(h).relu()))
        return logits


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
        channels, width = shape["conv_blocks2.3.weight"][:2]
        side = 4 * round((shape["l1.0.weight"][0] / width) ** 0.5)
        return ConditionalGenerator(
            shape["l1.0.weight"][1], shape["l2.0.weight"][1], (channels, side, side), width=width
        )
    raise Disagrees(f"there is no tiny model {name!r} to replay it with")


@dataclass(frozen=True)
class Architecture:
    """A model of a case: the module in float64 and the order of its flat state.

    The released code's names differ in the generator; there the order and the shapes tie the two together.
    """

    module: nn.Module
    kinds: Mapping[str, str]

    @staticmethod
    def of(case: Case, name: str = "model") -> Architecture:
        """Return an architecture of a case."""
        description = case.meta["architectures"][name]
        with torch.random.fork_rng(devices=[]):  # nobody's stream is to pay for weights that are replaced
            module = _module(description).double()
        layout, own = description["layout"], module.state_dict()
        shapes = [list(value.shape) for value in own.values()]
        must(shapes == [entry["shape"] for entry in layout], f"the {name} is laid out otherwise")
        named = name != "model" or list(own) == [entry["name"] for entry in layout]
        must(named, f"the {name} has other names")
        kinds = dict(zip(own, (entry["kind"] for entry in layout), strict=True))
        parameters = {key for key, kind in kinds.items() if kind == "parameter"}
        must(parameters == {name for name, _ in module.named_parameters()}, f"the {name} has other parameters")
        return Architecture(module, kinds)

    @property
    def stateless(self) -> Stateless:
        """The module; its last linear layer is the head."""
        linear = [name for name, part in self.module.named_modules() if isinstance(part, nn.Linear)]
        return Stateless(self.module, linear[-1])

    @property
    def conditional(self) -> ConditionalGenerator:
        """The module, where it is a generator."""
        assert isinstance(self.module, ConditionalGenerator)
        return self.module

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
