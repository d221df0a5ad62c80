"""FedDistill with a mistake."""

from __future__ import annotations

from typing import Any

from fedstill.config import Config
from fedstill.conformance.wrong.registry import wrong
from fedstill.methods.base import (
    LocalTask,
)
from fedstill.methods.feddistill import FedDistillFusion, FedDistillObjective
from fedstill.payload import Payload
from fedstill.training import Trained
from fedstill.weights import State


@wrong("feddistill", "feddistill-rounds-by-hand")
def feddistill_forgets(config: Config) -> Any:
    """FedDistill that counts anew in every round."""

    class Objective(FedDistillObjective):
        def finish(self, received: Payload, state: State, trained: Trained, task: LocalTask) -> tuple[Payload, State]:
            return super().finish(received, {}, trained, task)

    return Objective(config.feddistill), FedDistillFusion(config.feddistill, config.fusion)
