"""Where the inputs of a distillation come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedstill.data.augment import augment
from fedstill.data.dataset import Samples
from fedstill.models import ConditionalGenerator, FeatureGenerator, initial_weights
from fedstill.rng import torch_stream
from fedstill.weights import State

AnyGenerator = ConditionalGenerator | FeatureGenerator
"""What makes images, or the features that a head reads."""


class Draws(Protocol):
    """The random draws of one refinement."""

    def labels(self, iteration: int) -> Tensor:
        """Return the labels of an iteration, int64 (batch,)."""

    def noise(self, iteration: int, step: int) -> Tensor:
        """Return standard normal noise for the ``step``-th draw of an iteration, (batch, noise_dim)."""


@dataclass(frozen=True)
class StreamDraws:
    """Labels drawn before, noise from a stream of its own."""

    all_labels: Tensor
    generator: torch.Generator
    noise_dim: int
    dtype: torch.dtype = torch.float32

    def labels(self, iteration: int) -> Tensor:
        """Return one row of the labels."""
        return self.all_labels[iteration]

    def noise(self, iteration: int, step: int) -> Tensor:
        """Return the next draw."""
        shape = (self.all_labels.shape[1], self.noise_dim)
        return torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=self.dtype)


class Inputs(Protocol):
    """Gives the batches on which the student learns."""

    def batch(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and their labels; without gradient."""


@dataclass(frozen=True)
class GeneratedInputs:
    """A conditional generator's samples, in eval mode (running statistics) or in train mode (the batch's).

    Its running statistics change in the generator phase alone, whichever mode it is.
    """

    generator: AnyGenerator
    train_mode: bool

    def batch(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``G(z, y)`` and y."""
        self.generator.train(self.train_mode)
        kept = [buffer.clone() for buffer in self.generator.buffers()] if self.train_mode else []
        with torch.no_grad():
            x = self.generator(noise, labels)
            for buffer, before in zip(self.generator.buffers(), kept, strict=False):
                buffer.copy_(before)
        return x, labels


@dataclass(frozen=True)
class NoiseInputs:
    """Standard normal noise in the normalised input space: the control without which no generator is judged."""

    shape: tuple[int, ...]
    stream: torch.Generator
    dtype: torch.dtype = torch.float32

    def batch(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return noise, whatever the label."""
        shape = (len(labels), *self.shape)
        return torch.randn(shape, generator=self.stream, device=labels.device, dtype=self.dtype), labels


@dataclass(frozen=True)
class RealInputs:
    """Stored samples with their own labels: the public set; or the cohort's own data, an oracle in simulation only."""

    samples: Samples
    stream: torch.Generator

    def batch(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples drawn with replacement; the labels given are not used."""
        chosen = torch.randint(len(self.samples), (len(labels),), generator=self.stream, device=self.samples.y.device)
        return self.samples.x[chosen], self.samples.y[chosen]


@dataclass(frozen=True)
class AugmentedInputs:
    """Other inputs, flipped and cropped at random."""

    inputs: Inputs
    kind: str
    stream: torch.Generator

    def batch(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return augmented inputs and their labels."""
        x, y = self.inputs.batch(labels, noise)
        return augment(x, self.kind, self.stream), y


def initial_generator(
    seed: int, noise_dim: int, width: int, num_classes: int, shape: tuple[int, ...], device: torch.device
) -> AnyGenerator:
    """Return a new generator whose weights come from the stream ``generator`` of ``seed``.

    A ``shape`` of one dimension is that of features. ``width`` counts a quarter of the feature generator's hidden
    units, so that one default fits both: 64 are 256 units.
    """
    made: AnyGenerator
    with initial_weights(torch_stream(seed, "generator", "initial-weights")):
        if len(shape) == 1:
            made = FeatureGenerator(noise_dim, num_classes, shape[0], hidden=4 * width)
        else:
            made = ConditionalGenerator(noise_dim, num_classes, shape, width=width)
    return made.to(device)


def kept_generator(made: AnyGenerator, state: State, dtype: torch.dtype) -> AnyGenerator:
    """Return a new generator as it was left in the round before, where ``state`` has one."""
    made = made.to(dtype)  # before the state is loaded, which may be finer than the new generator
    if "generator" in state:
        made.load_state_dict(state["generator"])
    return made
