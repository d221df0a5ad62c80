"""FedAvgM: the server's velocity by hand, and nothing at all where it is off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedstill.errors import InputError
from fedstill.methods.averaging import FusionSettings
from fedstill.methods.base import FederationInfo, RoundContext, ServerState, Upload
from fedstill.methods.fedavg import FedAvgFusion
from fedstill.methods.registry import compose
from fedstill.payload import model_payload
from fedstill.weights import Weights
from small import play, same_state, small
from stopping import Stop, assert_goes_on_to_the_same_bits

INFO = FederationInfo((10, 30), 3, (2,))


def model(value: float, seen: float = 0.0) -> Weights:
    return Weights({"w": torch.tensor([value, 2 * value])}, {"norm": torch.tensor([seen])})


def fused(fusion: FedAvgFusion, server: ServerState, first: Weights, second: Weights) -> ServerState:
    sent = [Upload(client, model_payload(one), INFO.samples[client], 1) for client, one in enumerate((first, second))]
    return fusion.fuse(server, sent, RoundContext(0, INFO))


def test_two_rounds_by_hand() -> None:
    fusion = FedAvgFusion(FusionSettings(server_momentum=0.5))
    server = fusion.start(model(8.0), INFO)
    # The mean of 0 and 8, by 10 and 30 samples, is 6: v = 8 - 6 = 2, w = 8 - 2 = 6.
    server = fused(fusion, server, model(0.0, 1.0), model(8.0, 5.0))
    assert server.weights.params["w"].tolist() == [6.0, 12.0]
    assert server.method["velocity"]["w"].tolist() == [2.0, 4.0]
    assert server.weights.buffers["norm"].tolist() == [4.0]
    # The mean of 4 and 4 is 4: v = 1 + 2 = 3, w = 6 - 3 = 3. Buffers have no momentum.
    server = fused(fusion, server, model(4.0, 2.0), model(4.0, 2.0))
    assert server.weights.params["w"].tolist() == [3.0, 6.0]
    assert server.method["velocity"]["w"].tolist() == [3.0, 6.0]
    assert server.weights.buffers["norm"].tolist() == [2.0]


def test_the_step_is_measured_from_the_model_that_was_sent_down() -> None:
    fusion = FedAvgFusion(FusionSettings(server_momentum=0.5))
    server = fused(fusion, fusion.start(model(8.0), INFO), model(6.0), model(6.0))
    server = replace(server, weights=model(10.0))  # a refinement
    # v = 0.5 * 2 + (10 - 9) = 2, w = 10 - 2 = 8.
    server = fused(fusion, server, model(9.0), model(9.0))
    assert server.weights.params["w"].tolist() == [8.0, 16.0]


def test_without_momentum_nothing_is_kept_and_nothing_changes() -> None:
    fusion = FedAvgFusion()
    server = fused(fusion, fusion.start(model(8.0), INFO), model(0.1), model(0.2))
    assert server.method == {}
    # (10 * 0.1 + 30 * 0.2) / 40 in float32's nearest: no step from 8 is in it.
    assert torch.equal(server.weights.params["w"], torch.tensor([0.175, 0.35]))
    _, off, _ = play("fusion.server_momentum=0.0")
    _, plain, _ = play()
    assert same_state(off, plain)
    assert off.server.method == {}


def test_momentum_shows_from_the_second_round_on() -> None:
    for base in ("fedavg", "fedprox"):
        _, plain, _ = play(f"method={base}")
        _, moved, _ = play(f"method={base}", "fusion.server_momentum=0.9")
        change = [moved.server.weights.params[name] - value for name, value in plain.server.weights.params.items()]
        assert max(float(value.abs().max()) for value in change) > 1e-3
        _, first, _ = play(f"method={base}", rounds=1)
        _, same, _ = play(f"method={base}", "fusion.server_momentum=0.9", rounds=1)
        for name, value in first.server.weights.params.items():
            torch.testing.assert_close(same.server.weights.params[name], value, rtol=0, atol=1e-6)


def test_a_method_that_averages_otherwise_refuses_it() -> None:
    with pytest.raises(InputError, match=r"server_momentum.*'scaffold'"):
        compose(small("method=scaffold", "fusion.server_momentum=0.5"))


def test_the_velocity_survives_a_stop(tmp_path: Path) -> None:
    config = small("fusion.server_momentum=0.9", "train.rounds=3")
    assert_goes_on_to_the_same_bits(config, tmp_path, Stop(after=1))
