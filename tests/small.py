"""Federations small enough for a test: digits, a few hundred samples, a perceptron."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from fedstill.build import build
from fedstill.config import Config, load_config
from fedstill.federation import Federation, FederationState, Record
from fedstill.weights import State, Weights

SMALL: dict[str, Any] = {
    "method": "fedavg",
    "data": {"train_samples": 200, "test_samples": 100, "clients": 4, "partition": "iid"},
    "model": {"name": "mlp"},
    "train": {"rounds": 2},
    "local": {"epochs": 1, "batch_size": 16},
    "fedftg": {"iterations": 2, "generator_width": 4, "noise_dim": 8, "batch_size": 10},
    "execution": {"executor": "serial", "device": "cpu"},
}


def small(*overrides: str) -> Config:
    """Return the small configuration, with overrides such as ``method=scaffold``."""
    return load_config(None, overrides, deepcopy(SMALL))


def play(*overrides: str, rounds: int | None = None) -> tuple[Federation, FederationState, list[Record]]:
    """Run a small federation in memory."""
    federation, _ = build(small(*overrides))
    state, records = federation.start(), []
    for _ in range(rounds or federation.config.train.rounds):
        state, record = federation.run_round(state)
        records.append(record)
    federation.executor.close()
    return federation, state, records


def flat(state: FederationState) -> dict[str, torch.Tensor]:
    """Return every tensor of a state by a name."""
    found = named("server", {"params": state.server.weights.params, "buffers": state.server.weights.buffers})
    found |= named("method", state.server.method)
    for index, own in enumerate(state.refinements):
        found |= named(f"refinement {index}", own)
    for client, own in state.clients.items():
        found |= named(f"client {client}", own)
    return found | {f"label counts {client}": counts for client, counts in state.label_counts.items()}


def named(prefix: str, state: State) -> dict[str, torch.Tensor]:
    return {f"{prefix}/{group}/{name}": value for group, own in state.items() for name, value in own.items()}


def same_state(one: FederationState, other: FederationState) -> bool:
    """Say whether two states are equal to the bit."""
    left, right = flat(one), flat(other)
    return (
        one.round == other.round
        and left.keys() == right.keys()
        and all(torch.equal(value, right[name]) for name, value in left.items())
    )


def same_weights(one: Weights, other: Weights) -> bool:
    """Say whether two models are equal to the bit."""
    left, right = one.params | one.buffers, other.params | other.buffers
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def untimed(records: list[Record]) -> list[Record]:
    """Return records without what the clock gives."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]
