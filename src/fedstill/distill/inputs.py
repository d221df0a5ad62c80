"""Where the inputs of a distillation come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedstill.data.dataset import Samples
from fedstill.models import ConditionalGenerator, initial_weights
from fedstill.rng import torch_stream


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

    generator: ConditionalGenerator
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
    """The cohort's own data with their own labels: the oracle, in simulation only."""

    samples: Samples
    stream: torch.Generator

    def batch(self, labels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return samples drawn with replacement; the labels given are not used."""
        chosen = torch.randint(len(self.samples), (len(labels),), generator=self.stream, device=self.samples.y.device)
        return self.samples.x[chosen], self.samples.y[chosen]


def initial_generator(
    seed: int, noise_dim: int, width: int, num_classes: int, shape: tuple[int, ...], device: torch.device
) -> ConditionalGenerator:
    """Return a new generator whose weights come from the stream ``generator`` of ``seed``."""
    with initial_weights(torch_stream(seed, "generator", "initial-weights")):
        made = ConditionalGenerator(noise_dim, num_classes, shape, ngf=width)
    return made.to(device)
