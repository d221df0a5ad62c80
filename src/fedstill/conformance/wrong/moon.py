"""MOON with a mistake."""

from __future__ import annotations

from typing import Any

import torch

from fedstill.config import Config
from fedstill.conformance.wrong.registry import wrong
from fedstill.methods.base import (
    LocalTask,
)
from fedstill.methods.fedavg import FedAvgFusion
from fedstill.methods.moon import MoonObjective
from fedstill.payload import Payload
from fedstill.weights import State


def moon(config: Config, objective: type[MoonObjective] = MoonObjective, **keys: Any) -> Any:
    """Return MOON with its client's half or with keys exchanged."""
    return objective(config.moon.model_copy(update=keys)), FedAvgFusion(config.fusion)


@wrong("moon", "moon-steps-by-hand", "agrees-with-reference-cases")
def moon_wrong_positive(config: Config) -> Any:
    """MOON that pulls to the client's old model and pushes the global one away."""

    class Objective(MoonObjective):
        def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
            right = super().prepare(received, state, task)
            return {group: {name: value.flip(0) for name, value in own.items()} for group, own in right.items()}

    return moon(config, Objective)


@wrong("moon", "moon-steps-by-hand")
def moon_without_temperature(config: Config) -> Any:
    """MOON whose cosines are not divided by tau."""
    return moon(config, tau=1.0)


@wrong("moon", "moon-without-mu-is-fedavg")
def moon_mu_or_default(config: Config) -> Any:
    """MOON that takes mu = 0 for a mu that was not given."""
    return moon(config, mu=config.moon.mu or 1.0)


@wrong("moon", "moon-first-participation-is-fedavg")
def moon_negative_from_nowhere(config: Config) -> Any:
    """MOON that compares with a model of noise at the first participation, where there is no old one."""

    class Objective(MoonObjective):
        def prepare(self, received: Payload, state: State, task: LocalTask) -> State:
            sent = received.weights()
            noise = {name: torch.linspace(-1, 1, value.numel()).to(value).view(1, *value.shape)
                     for name, value in sent.params.items()}  # fmt: skip
            buffers = {name: value[None] for name, value in sent.buffers.items()}
            return super().prepare(received, state or {"previous": noise, "previous-buffers": buffers}, task)

    return moon(config, Objective)
