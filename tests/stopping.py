"""Runs that are stopped on their way, what they leave, and that they go on to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedstill.build import build
from fedstill.callbacks import Callback, RunInfo
from fedstill.config import Config
from fedstill.experiment import resume, run
from fedstill.federation import FederationState, Record
from fedstill.runs import RunDirectory
from fedstill.runs.checkpoint import CheckpointStore
from small import same_weights, untimed


class Stop(Callback):
    """Presses Ctrl-C: after a client of a round (counted from 0), or after a round (counted from 1)."""

    def __init__(self, client_of: int | None = None, after: int | None = None) -> None:
        self.client_of, self.after = client_of, after

    def on_client_end(self, round: int, done: int, of: int) -> None:
        if round - 1 == self.client_of and done == 1:
            raise KeyboardInterrupt

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        if record["round"] == self.after:
            raise KeyboardInterrupt


def stopped(config: Config, path: Path, stop: Stop) -> None:
    """Run until the stop comes."""
    with pytest.raises(KeyboardInterrupt):
        run(config, directory=path, callbacks=[stop])


def store_of(path: Path) -> CheckpointStore:
    federation, _ = build(RunDirectory.read_config(path))
    federation.executor.close()
    return RunDirectory.open(path, federation).store


def last_state(path: Path) -> FederationState:
    state = store_of(path).load()
    assert state is not None
    return state


def assert_goes_on_to_the_same_bits(config: Config, folder: Path, stop: Stop) -> None:
    """The weights and the records of a run that was stopped and resumed are those of one that was not stopped."""
    whole = run(config, directory=folder / "whole")
    stopped(config, folder / "stopped", stop)
    again = resume(folder / "stopped")
    assert same_weights(again.weights, whole.weights)
    assert untimed(again.records) == untimed(whole.records)
