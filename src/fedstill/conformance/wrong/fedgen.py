"""FedGen with a mistake."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedstill.config import Config
from fedstill.conformance.wrong.registry import wrong
from fedstill.methods.base import (
    LocalTask,
)
from fedstill.methods.fedgen import FedGenFusion, FedGenObjective, imitate
from fedstill.models.stateless import Stateless
from fedstill.payload import Payload
from fedstill.weights import State, Tensors


def fedgen(config: Config, objective: type[FedGenObjective] = FedGenObjective, **keys: Any) -> Any:
    """Return FedGen with its client's half or with keys exchanged."""
    own = config.fedgen.model_copy(update=keys)
    return objective(own, config.local.batch_size), FedGenFusion(own, config.fusion)


@wrong("fedgen", "fedgen-label-weights-act-per-sample")
def fedgen_lost_weights(config: Config) -> Any:
    """FedGen whose label weights are lost by broadcasting, as in the authors' code: a product of two means."""
    return fedgen(config, teacher="product-of-means")


@wrong("fedgen", "fedgen-teacher-is-the-mean-of-the-logits")
def fedgen_sum_of_losses(config: Config) -> Any:
    """FedGen whose generator follows the sum of the heads' losses in place of their ensemble's."""
    return fedgen(config, teacher="per-sample")


@wrong("fedgen", "fedgen-generated-batch-reaches-the-head-alone")
def fedgen_trains_the_body(config: Config) -> Any:
    """FedGen that also pulls the model's own features to the generated ones."""

    class Objective(FedGenObjective):
        def loss(
            self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
        ) -> Tensor:
            loss, draws = super().loss(model, params, buffers, x, y, extras), extras.get("draws")
            if draws is None:
                return loss
            _, z = model.with_features(params, {name: value.clone() for name, value in buffers.items()}, x, train=True)
            made = imitate(extras["generator"], draws["noise"], draws["labels"])
            return loss + draws["alpha"] * F.mse_loss(z.mean(0), made.mean(0))

    return fedgen(config, Objective)


@wrong("fedgen", "fedgen-client-steps-by-hand")
def fedgen_other_labels(config: Config) -> Any:
    """FedGen whose generated features are learnt under labels that they were not generated for."""

    class Objective(FedGenObjective):
        def loss(
            self, model: Stateless, params: Tensors, buffers: Tensors, x: Tensor, y: Tensor, extras: State
        ) -> Tensor:
            if "draws" not in extras:
                return super().loss(model, params, buffers, x, y, extras)
            draws = extras["draws"]
            made = imitate(extras["generator"], draws["noise"], draws["labels"])
            answer = F.cross_entropy(model.head(params, made), draws["labels"].roll(1))
            return F.cross_entropy(model(params, buffers, x, train=True), y) + draws["alpha"] * answer

    return fedgen(config, Objective)


@wrong("fedgen", "fedgen-first-round-is-plain")
def fedgen_untrained_generator(config: Config) -> Any:
    """FedGen that regularises from the first round on, with a generator that has learnt nothing."""

    class Objective(FedGenObjective):
        def draws(self, received: Payload, task: LocalTask, stream: torch.Generator) -> Tensors:
            return super().draws(received, replace(task, round=max(1, task.round)), stream)

    return fedgen(config, Objective)


@wrong("fedgen", "fedgen-labels-are-those-counted")
def fedgen_uniform_labels(config: Config) -> Any:
    """FedGen that never learns which labels there are, and generates all alike."""
    return fedgen(config, labels="uniform")
