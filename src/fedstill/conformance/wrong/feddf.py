"""FedDF with a mistake."""

from __future__ import annotations

from typing import Any

from fedstill.config import Config
from fedstill.conformance.wrong.registry import wrong
from fedstill.methods.feddf import FedDF


@wrong("feddf", "feddf-average-of-logits", "refinement-agrees-with-reference-cases")
def feddf_average_of_probabilities(config: Config) -> Any:
    """FedDF that averages the teachers' probabilities instead of their logits."""
    return FedDF(config.feddf.model_copy(update={"average": "probabilities"}))


@wrong("feddf", "feddf-without-steps-is-its-base")
def feddf_at_least_once(config: Config) -> Any:
    """FedDF that takes one step where none is asked for."""
    return FedDF(config.feddf.model_copy(update={"steps": max(1, config.feddf.steps)}))
