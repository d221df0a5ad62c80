"""Adam on plain tensors against PyTorch's, and against Keras' rule by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedstill.adam import Adam


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_it_is_pytorchs_adam(weight_decay: float) -> None:
    stream = torch.Generator().manual_seed(0)
    start = {name: torch.randn(3, 2, generator=stream, dtype=torch.float64) for name in ("a", "b")}
    own, leaves = {name: value.clone() for name, value in start.items()}, [value.clone() for value in start.values()]
    theirs = torch.optim.Adam(leaves, lr=0.1, weight_decay=weight_decay)
    ours, state = Adam(0.1, weight_decay=weight_decay), Adam.start(own)
    for _ in range(5):
        grads = {name: torch.randn(3, 2, generator=stream, dtype=torch.float64) for name in own}
        for leaf, grad in zip(leaves, grads.values(), strict=True):
            leaf.grad = grad.clone()
        theirs.step()
        ours.step(own, grads, state)
    for value, leaf in zip(own.values(), leaves, strict=True):
        torch.testing.assert_close(value, leaf, rtol=1e-12, atol=1e-12)
    assert int(state["count"]["steps"]) == 5


def test_keras_epsilon_stands_beside_the_uncorrected_root() -> None:
    params = {"w": torch.zeros(1, dtype=torch.float64)}
    grad = 1e-6
    Adam(1.0, epsilon=1e-7, keras=True).step(params, {"w": torch.tensor([grad]).double()}, Adam.start(params))
    # lr sqrt(1 - b2) / (1 - b1) * m / (sqrt(v) + eps) with m = (1 - b1) g, v = (1 - b2) g^2
    by_hand = -math.sqrt(0.001) * grad / (math.sqrt(0.001) * grad + 1e-7)
    assert float(params["w"]) == pytest.approx(by_hand, rel=1e-6)
