"""Where the time of a round goes: seconds by phase, and a trace of one round with every operation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, record_function

from fedstill.callbacks import Callback, RunInfo
from fedstill.client import ClientResult
from fedstill.evaluation import Record
from fedstill.federation import FederationState
from fedstill.runs.directory import write_json
from fedstill.runs.environment import environment

PHASES = {
    "sample_cohort": "sample the cohort",
    "work": "broadcast",
    "train": "train the clients",
    "receive": "check the uploads",
    "fuse": "fuse",
    "teachers": "stack the teachers",
    "refine": "refine",
    "evaluate": "evaluate",
}
"""The federation's methods that a round walks through, and what they are called here."""
OTHER, FILES = "everything else", "metrics and checkpoint"
FIRST_WARM_ROUND = 2


class Profiler(Callback):
    """Times a run's phases; the first of a run's callbacks, so that the others do not count.

    Parameters
    ----------
    directory : Path
        The run's directory, which gets ``profile.json`` (rewritten after every round) and ``trace.json.gz``.
    traced : int
        The round that is traced, counted from 1; the last one where there are fewer.
    """

    def __init__(self, directory: Path, traced: int = FIRST_WARM_ROUND) -> None:
        self.directory, self.traced = directory, traced
        self.rounds: list[Record] = []
        self._now: dict[str, float] = {}
        self._clients = 0.0
        self._ended = 0.0
        self._device = torch.device("cpu")

    def on_run_start(self, run: RunInfo) -> None:
        """Put clocks around the federation's methods."""
        federation = run.federation
        self.traced = min(self.traced, federation.config.train.rounds)
        self._device = federation.device
        for method, phase in PHASES.items():
            setattr(federation, method, self._timed(getattr(federation, method), phase))
        around: dict[str, Callable[[Any], Any]] = {"train": self._summed, "run_round": self._round}
        for method, wrapped in around.items():
            setattr(federation, method, wrapped(getattr(federation, method)))

    def on_round_end(self, round: int, record: Record, run: RunInfo) -> None:
        """Note the round, and write what there is."""
        self._now[FILES] = time.perf_counter() - self._ended
        traced = round == self.traced
        self.rounds.append(
            {"round": round, "traced": traced, "seconds": self._now, "seconds_of_clients": self._clients}
        )
        self._now, self._clients = {}, 0.0
        write_json(
            self.directory / "profile.json",
            {
                "environment": environment(self._device.type),
                "typical": self.typical(),
                "over_rounds": [one["round"] for one in self.undisturbed()],
                "rounds": self.rounds,
            },
        )

    def undisturbed(self) -> list[Record]:
        """Return the rounds that the figures are taken from: neither the first nor traced, where there are such."""
        plain = [one for one in self.rounds if not one["traced"]]
        return [one for one in plain if one["round"] > 1] or plain or self.rounds

    def typical(self) -> dict[str, float]:
        """Return each phase's median seconds over the undisturbed rounds."""
        found = [one["seconds"] for one in self.undisturbed()]
        return {phase: statistics.median(one.get(phase, 0.0) for one in found) for phase in found[0]}

    def table(self) -> list[str]:
        """Return the phases with their seconds and shares, as lines of text."""
        typical, rounds = self.typical(), self.undisturbed()
        whole = sum(typical.values())
        width = max(map(len, typical))
        over = ", ".join(str(one["round"]) for one in rounds)
        lines = [f"where a round's {whole:.3f} s go (medians over the rounds {over}):"]
        lines += [f"  {phase:<{width}}  {spent:9.3f} s  {spent / whole:6.1%}" for phase, spent in typical.items()]
        clients = statistics.median(one["seconds_of_clients"] for one in rounds)
        trained = typical[PHASES["train"]]
        return [*lines, f"clients trained for {clients:.3f} s, {clients / max(trained, 1e-9):.2f} of them at a time"]

    @contextmanager
    def _clock(self, phase: str) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        with record_function(f"fedstill: {phase}"):
            yield
            self._wait()
        self._now[phase] = self._now.get(phase, 0.0) + time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*given: Any, **keys: Any) -> Any:
            with self._clock(phase):
                return method(*given, **keys)

        return timed

    def _summed(self, train: Callable[..., list[ClientResult]]) -> Callable[..., list[ClientResult]]:
        def summed(*given: Any) -> list[ClientResult]:
            results = train(*given)
            self._clients = sum(result.seconds for result in results)
            return results

        return summed

    def _round(
        self, run_round: Callable[[FederationState], tuple[FederationState, Record]]
    ) -> Callable[[FederationState], tuple[FederationState, Record]]:
        def timed(state: FederationState) -> tuple[FederationState, Record]:
            if state.round + 1 != self.traced:
                return self._whole(run_round, state)
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            # Clients may train on threads, which PyTorch leaves out of a trace unless it is told not to.
            everyone = _ExperimentalConfig(profile_all_threads=True)
            with torch.profiler.profile(activities=activities, experimental_config=everyone) as trace:
                result = self._whole(run_round, state)
            trace.export_chrome_trace(str(self.directory / "trace.json.gz"))
            self._ended = time.perf_counter()
            return result

        return timed

    def _whole(
        self, run_round: Callable[[FederationState], tuple[FederationState, Record]], state: FederationState
    ) -> tuple[FederationState, Record]:
        began = time.perf_counter()
        result = run_round(state)
        self._wait()
        self._ended = time.perf_counter()
        known = {phase: self._now.get(phase, 0.0) for phase in PHASES.values()}
        self._now = {**known, OTHER: max(0.0, self._ended - began - sum(known.values()))}
        return result
