"""Clients without a federation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedstill.build import build
from fedstill.errors import InputError
from fedstill.evaluation import evaluate
from small import play, same_weights, small


def test_the_first_round_is_fedavgs_clients_and_they_go_on_from_it() -> None:
    federation, state, records = play("method=alone", "local.lr_decay=1.0")
    fedavg, _ = build(small("method=fedavg", "local.lr_decay=1.0"))
    start = fedavg.start()
    uploads = fedavg.train(0, [fedavg.work(start, client) for client in range(4)])
    once = play("method=alone", "local.lr_decay=1.0", rounds=1)[1]
    for upload in uploads:
        own = once.clients[upload.client]["params"]
        assert all(torch.equal(own[name], value) for name, value in upload.payload.weights().params.items())
    test = federation.evaluation.sets["test"]
    scores = [evaluate(model, weights, test, 10, 100).accuracy for model, weights in federation.own_models(state)]
    found: Any = records[-1]["fused"]
    assert found["test"]["per_client"] == scores
    assert found["test"]["accuracy"] == pytest.approx(sum(scores) / 4)
    assert scores != [
        evaluate(model, weights, test, 10, 100).accuracy for model, weights in federation.own_models(once)
    ]


def test_nothing_travels_and_nobody_absent_moves() -> None:
    federation, state, records = play("method=alone", "train.participation=0.5", "train.rounds=1")
    found: Any = records[0]
    assert sum(found["bytes"]["down"].values()) == sum(found["bytes"]["up"].values()) == 0
    models = federation.own_models(state)
    for client in range(4):
        moved = not same_weights(models[client][1], federation.initial)
        assert moved == (client in found["cohort"])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (("method=alone+fedftg",), "no global model for 'fedftg' to refine"),
        (("method=alone", 'eval.models=["all"]'), "eval.models"),
    ],
)
def test_what_needs_a_global_model_is_refused(keys: tuple[str, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build(small(*keys))
