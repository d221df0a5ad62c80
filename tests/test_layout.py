"""How a client's training is computed: the layout of images and kernels, products in bfloat16, finite or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedstill import build, run
from fedstill.client import ClientWork
from fedstill.errors import InputError
from fedstill.execution.executors import SerialExecutor, ThreadExecutor
from fedstill.federation import Federation
from fedstill.methods.base import LocalObjective
from fedstill.models import Stateless, build_model, split_state
from fedstill.training import SGD, channels_innermost, train_locally
from fedstill.weights import Weights, finite
from small import small


def trained(model: nn.Module, x: torch.Tensor, channels_last: bool) -> Weights:
    y = torch.arange(len(x)) % 10
    order = [torch.arange(0, 6), torch.arange(4, 10), torch.arange(9, 12)]
    start = Weights(*split_state(model))
    sgd = SGD(0.1, 0.9, 1e-3, 1.0)
    done = train_locally(Stateless(model), LocalObjective(), start, {}, x, y, order, sgd, channels_last=channels_last)
    return done.weights


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("name", "keys"),
    [("cnn", {"width": 4}), ("mcmahan-cnn", {}), ("resnet18", {"norm": "bn"}), ("resnet18", {})],
)
def test_the_layout_moves_nothing_but_the_last_bits(name: str, keys: dict[str, Any], channels: int) -> None:
    side = {"mcmahan-cnn": 28, "cnn": 16}.get(name, 8)
    stream = torch.Generator().manual_seed(3)
    model = build_model(name, input_shape=(channels, side, side), num_classes=10, generator=stream, **keys).double()
    x = torch.randn(12, channels, side, side, dtype=torch.float64, generator=stream)
    usual, other = (trained(model, x, channels_last) for channels_last in (False, True))
    for name, value in {**usual.params, **usual.buffers}.items():
        found = {**other.params, **other.buffers}[name]
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)
        assert found.stride() == torch.empty(value.shape).stride(), "what leaves a client has the usual layout"


def test_one_channel_is_innermost_too() -> None:
    images = channels_innermost(torch.arange(24.0).view(2, 1, 3, 4))
    assert torch.equal(images, torch.arange(24.0).view(2, 1, 3, 4))
    assert F.conv2d(images, torch.ones(5, 1, 2, 2)).stride(1) == 1, "a convolution follows the layout"
    assert channels_innermost(torch.ones(2, 3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("model", "resolved"),
    [
        (["model.name=mlp"], "contiguous"),
        (["model.name=cnn", "model.width=4", "model.norm=bn"], "channels_last"),
        (["model.name=cnn", "model.width=4", "model.norm=gn"], "channels_last"),
        (["model.name=resnet18", "model.norm=gn", "model.stem=cifar"], "contiguous"),
        (["model.name=mlp", "execution.memory_format=channels_last"], "channels_last"),
    ],
)
def test_what_auto_means(model: list[str], resolved: str) -> None:
    federation, _ = build(small(*model, "execution.device=cpu"))
    assert federation.config.execution.memory_format == resolved
    assert federation.trainer.channels_last is (resolved == "channels_last")


def bf16_by_hand(federation: Federation, client: int) -> list[torch.Tensor]:
    """Train a client by the recipe of PyTorch's documentation: autocast around each forward pass."""
    module = federation.model.clone().module
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(federation.initial.params[name])
    work = federation.work(federation.start(), client)
    site = federation.trainer.site([federation.model], work)
    federation.trainer.stop.clear()
    optimizer = torch.optim.SGD(module.parameters(), lr=site.task.lr)
    module.train()
    for batch in site.order():
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(module(site.own.x[batch]), site.own.y[batch])
        loss.backward()
        optimizer.step()
    return [value.detach() for value in module.parameters()]


@pytest.mark.parametrize("executor", ["serial", "threads", "vectorized"])
def test_bf16_is_pytorchs_own(executor: str) -> None:
    plain = ["local.weight_decay=0", "local.clip_norm=none", "local.lr=0.05", "execution.device=cpu"]
    keys = ["model.name=mlp", "execution.precision=bf16", f"execution.executor={executor}", *plain]
    federation, _ = build(small(*keys))
    full, _ = build(small(*keys, "execution.precision=float32"))
    state = federation.start()
    works = [federation.work(state, client) for client in range(2)]
    results = federation.train(0, works)
    exact = full.train(0, works)
    for result, other in zip(results, exact, strict=True):
        by_hand = torch.cat([value.flatten() for value in bf16_by_hand(federation, result.client)])
        ours = torch.cat([value.flatten() for value in result.payload.weights().params.values()])
        rough = torch.cat([value.flatten() for value in other.payload.weights().params.values()])
        start = torch.cat([value.flatten() for value in federation.initial.params.values()])
        assert ours.dtype == torch.float32
        # Batched products round in another order, but not as far away as those of float32.
        part = 0.5 if executor == "vectorized" else 0.05
        assert (ours - by_hand).norm() < part * (rough - by_hand).norm() + 1e-7 * start.norm()
        assert 0 < (rough - ours).norm() < 0.05 * (rough - start).norm()
    federation.executor.close()
    full.executor.close()


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(InputError, match=r"execution\.precision: tf32 needs a GPU"):
        build(small("execution.precision=tf32", "execution.device=cpu"))


def test_serial_and_threads_agree_in_every_layout_and_precision() -> None:
    keys = ["model.name=cnn", "model.width=4", "execution.memory_format=channels_last", "execution.precision=bf16"]
    one, other = (
        run(small(*keys, f"execution.executor={name}", "execution.device=cpu")) for name in ("serial", "threads")
    )
    assert isinstance(one.federation.executor, SerialExecutor)
    assert isinstance(other.federation.executor, ThreadExecutor)
    for name, value in one.weights.params.items():
        assert torch.equal(value, other.weights.params[name])


def test_a_share_is_never_copied_for_training() -> None:
    federation, _ = build(small("execution.device=cpu"))
    state = federation.start()
    site = federation.trainer.site([federation.model], federation.work(state, 1))
    assert isinstance(federation.work(state, 1), ClientWork)
    x, y, at = site.own.source([torch.tensor([2, 0])])
    assert x is federation.trainer.samples.x
    (rows,) = at
    assert torch.equal(x[rows], site.own.x[[2, 0]])
    assert torch.equal(y[rows], site.own.y[[2, 0]])
    assert len(site.own) == len(site.own.x) == len(federation.trainer.shares[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_sees_one_bad_number_anywhere(dtype: torch.dtype, bad: float) -> None:
    for size in (1, 7, 64, 5001):
        good = torch.full((size,), 3e38).to(dtype)
        assert finite([good, torch.tensor([1, 2]), torch.zeros(0)])
        for place in {0, size // 3, size - 1}:
            wrong = good.clone()
            wrong[place] = bad
            assert not finite([good, wrong])
