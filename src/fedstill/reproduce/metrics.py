"""What a cell of a paper's table measures, and how it is taken from a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from fedstill.experiment import accuracies
from fedstill.settings import Settings
from fedstill.studies.results import RunData

Scale = Literal["paper", "small"]
BEST = 5
"""How many rounds FedGen's metric takes."""


class Final(Settings):
    """Test accuracy after the last round."""

    kind: Literal["final"]

    def words(self, scale: Scale) -> str:
        """Return the metric in words."""
        return "test accuracy after the last round"

    def of(self, run: RunData, scale: Scale) -> list[float]:
        """Return a whole run's value."""
        return [_last(accuracies(run.records))]


class AtRound(Settings):
    """Test accuracy after one of the rounds."""

    kind: Literal["round"]
    round: int = Field(ge=1)
    """From 1."""
    small_round: int = Field(ge=1)
    """The one that stands for it in the small form."""

    def at(self, scale: Scale) -> int:
        """Return the round."""
        return self.round if scale == "paper" else self.small_round

    def words(self, scale: Scale) -> str:
        """Return the metric in words."""
        return f"test accuracy after round {self.at(scale):,}"

    def instead(self, scale: Scale) -> str:
        """Return what the small form measures in the place of this, where it is something else."""
        return f"round {self.small_round}" if scale == "small" else ""

    def of(self, run: RunData, scale: Scale) -> list[float]:
        """Return a whole run's value; nothing where the round was not measured."""
        found = accuracies(run.records)
        return [found[self.at(scale)]] if self.at(scale) in found else []


class RoundsTo(Settings):
    """The first round with at least some test accuracy."""

    kind: Literal["rounds"]
    target: float = Field(gt=0, lt=100)
    """Per cent."""
    small_target: float = Field(gt=0, lt=100)
    """What stands for it in the small form, which does not get that far."""

    def at(self, scale: Scale) -> float:
        """Return the accuracy in per cent."""
        return self.target if scale == "paper" else self.small_target

    def words(self, scale: Scale) -> str:
        """Return the metric in words."""
        return f"rounds to {self.at(scale):g} % test accuracy"

    def instead(self, scale: Scale) -> str:
        """Return what the small form measures in the place of this, where it is something else."""
        return f"to {self.small_target:g} %" if scale == "small" else ""

    def of(self, run: RunData, scale: Scale) -> list[float]:
        """Return a whole run's value; nothing where it never gets there."""
        goal = self.at(scale) / 100
        reached = [round for round, accuracy in accuracies(run.records).items() if accuracy >= goal]
        return [float(reached[0])] if reached else []


class BestFive(Settings):
    """Test accuracy in each of the five best rounds, FedGen's metric: mean and deviation are over all seeds' values."""

    kind: Literal["top5"]
    source: Literal["model", "ensemble"] = "model"
    """The model, or the mean of the logits of a round's clients (FedEnsemble)."""

    def words(self, scale: Scale) -> str:
        """Return the metric in words."""
        return f"test accuracy in the {BEST} best rounds, mean"

    def of(self, run: RunData, scale: Scale) -> list[float]:
        """Return a whole run's five values, the best first."""
        if self.source == "ensemble":
            found = [float(record["ensembles"]["logits"]) for record in run.records if "ensembles" in record]
        else:
            found = list(accuracies(run.records).values())
        return sorted(found, reverse=True)[:BEST]


class Validated(Settings):
    """Test accuracy in the round that is best on the server's validation samples, the first of equals."""

    kind: Literal["validated"]

    def words(self, scale: Scale) -> str:
        """Return the metric in words."""
        return "test accuracy in the round that is best on the server's validation samples"

    def of(self, run: RunData, scale: Scale) -> list[float]:
        """Return a whole run's value."""
        held = accuracies(run.records, "validation")
        return [accuracies(run.records)[max(held, key=lambda round: (held[round], -round))]] if held else []


class Participant(Settings):
    """Test accuracy of one participant's own model."""

    kind: Literal["participant"]
    participant: int = Field(ge=0)
    round: int | None = Field(None, ge=1)
    """After which round; by default the last."""

    def words(self, scale: Scale) -> str:
        """Return the metric in words."""
        return "test accuracy of each participant's own model"

    def of(self, run: RunData, scale: Scale) -> list[float]:
        """Return a whole run's value; nothing where it is not known."""
        by_round = {record["round"]: record["fused"]["test"] for record in run.records if "fused" in record}
        scores: Mapping[str, Any] = by_round.get(self.round or max(by_round), {})
        values = scores.get("per_client")
        known = isinstance(values, list) and self.participant < len(values) and values[self.participant] is not None
        return [float(values[self.participant])] if values is not None and known else []


class Gain(Settings):
    """Test accuracy of the last round less that of the first, which in FedMD is the one before collaboration."""

    kind: Literal["gain"]

    def words(self, scale: Scale) -> str:
        """Return the metric in words."""
        return "test accuracy after the last round less that after the first"

    def of(self, run: RunData, scale: Scale) -> list[float]:
        """Return a whole run's value."""
        found = accuracies(run.records)
        return [_last(found) - found[1]]


Metric = Annotated[Final | AtRound | RoundsTo | BestFive | Validated | Participant | Gain, Field(discriminator="kind")]


def _last(found: Mapping[int, float]) -> float:
    return found[max(found)]
