"""Tensors as bytes: the same numbers, types and order of names, or an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fedstill import resume, run
from fedstill.errors import InputError
from fedstill.payload import Kind, Payload
from fedstill.tensor_bytes import dump_tensors, load_tensors
from small import small
from stopping import Stop, stopped

NAMES = [f"layer{number}.{part}" for number in (7, 0, 12, 3, 9, 1) for part in ("weight", "bias", "running_mean")]


def test_names_come_back_in_their_order() -> None:
    shared = torch.arange(6.0)
    tensors = {
        name: shared[place % 3 :].to(torch.float64 if place % 2 else torch.float32) for place, name in enumerate(NAMES)
    }
    found = load_tensors(dump_tensors(tensors))
    assert list(found) == NAMES
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    sent = Payload.from_bytes(Payload({Kind.WEIGHTS: tensors}).to_bytes())
    assert list(sent[Kind.WEIGHTS]) == NAMES
    assert load_tensors(dump_tensors({})) == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nothing of the kind",
        save({"a": torch.zeros(1)}),
        save({"a": torch.zeros(1)}, metadata={"order": json.dumps(["a", "b"])}),
        save({"a": torch.zeros(1)}, metadata={"order": json.dumps(["b"])}),
        save({"a": torch.zeros(1)}, metadata={"order": json.dumps({"a": 1})}),
        save({"a": torch.zeros(1)}, metadata={"order": json.dumps([["a"]])}),
        save({"a": torch.zeros(1)}, metadata={"order": "{"}),
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        load_tensors(data)
    with pytest.raises(InputError, match="not a safetensors message"):
        Payload.from_bytes(data)


def test_a_resumed_run_clips_to_the_same_bits(tmp_path: Path) -> None:
    """The norm of the gradient is a sum over tensors, and the clip carries its rounding into every weight."""
    config = small("model.name=cnn", "model.width=4", "local.clip_norm=0.05", "train.rounds=2")
    whole = run(config)
    for attempt in range(3):
        path = tmp_path / str(attempt)
        stopped(config, path, Stop(after=1))
        resumed = resume(path)
        assert list(resumed.weights.params) == list(whole.weights.params)
        for name, value in whole.weights.params.items():
            assert torch.equal(value, resumed.weights.params[name])
