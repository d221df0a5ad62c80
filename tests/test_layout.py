"""How a client's training is computed: the layout of images and kernels, products in bfloat16, finite or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedstill import build, run
from fedstill.adam import Adam
from fedstill.client import ClientWork
from fedstill.data.dataset import Samples
from fedstill.distill.teachers import StackedTeachers
from fedstill.errors import InputError
from fedstill.evaluation import Parts, evaluate
from fedstill.execution.executors import SerialExecutor, ThreadExecutor
from fedstill.federation import Federation
from fedstill.methods.base import FederationInfo, LocalObjective, RoundContext
from fedstill.methods.feddf import FedDF, FedDFSettings
from fedstill.methods.fedftg import FedFTG, FedFTGSettings
from fedstill.methods.fedmd import FedMDSettings, Learner, Lesson
from fedstill.models import Stateless, build_model, split_state
from fedstill.models.fedmd import fedmd_cnn
from fedstill.models.layers import Dropout
from fedstill.models.layout import channels_innermost, layout_of
from fedstill.models.randomness import layers_draw_from
from fedstill.training import SGD, train_locally
from fedstill.weights import State, Weights, finite
from small import small


def average_pooled(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A FedMD participant's model for digits: its pools are average ones."""
    return fedmd_cnn(input_shape, num_classes, widths=(3, 4), dropout=0.0)


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


REFINEMENTS: dict[str, FedFTG | FedDF] = {
    "paper": FedFTG(FedFTGSettings(iterations=3, generator_width=4, noise_dim=6, batch_size=8)),
    "code": FedFTG(
        FedFTGSettings(mode="code", iterations=3, generator_width=4, batch_size=8, freeze_unused_biases=True)
    ),
    "noise": FedFTG(FedFTGSettings(inputs="noise", iterations=3, batch_size=8)),
    "feddf, unlabelled": FedDF(FedDFSettings(steps=4, batch_size=8, validate_every=2, patience=4)),
    "feddf, data-free": FedDF(
        FedDFSettings(inputs="generator", steps=3, generator_steps=3, generator_width=4, batch_size=8, patience=0)
    ),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", REFINEMENTS)
def test_a_refinement_gives_the_same_in_both_layouts(case: str, channels: int) -> None:
    stream = torch.Generator().manual_seed(7)
    shape = (channels, 16, 16)
    modules = [
        build_model("cnn", input_shape=shape, num_classes=4, generator=stream, width=4, norm="bn").double()
        for _ in range(3)
    ]
    model, student, *others = Stateless(modules[0]), *(Weights(*split_state(module)) for module in modules)
    teachers = StackedTeachers.of(model, others, torch.tensor([[9, 1, 0, 5], [0, 3, 7, 2]]))
    public = Samples(torch.randn(20, *shape, dtype=torch.float64, generator=stream), torch.arange(20) % 4)
    strides = set[tuple[int, ...]]()
    found = []
    for channels_last in (False, True):
        strides.clear()
        given = RoundContext(
            0, FederationInfo((15, 12), 4, shape), public=public, validation=public, channels_last=channels_last
        )
        hook = (
            modules[0]
            .get_submodule("body.0")
            .register_forward_pre_hook(lambda module, args: strides.add(args[0].stride()[1:]))
        )
        found.append(REFINEMENTS[case].refine(model, student, teachers, {}, given))
        hook.remove()
        assert strides == {(1, 16 * channels, channels) if channels_last else (16 * 16, 16, 1)}
    for parts in ("params", "buffers"):
        for name, value in getattr(found[0].weights, parts).items():
            other = getattr(found[1].weights, parts)[name]
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9)
            assert other.stride() == torch.empty(value.shape).stride()
    for name, value in found[0].state.get("generator", {}).items():
        torch.testing.assert_close(found[1].state["generator"][name], value, rtol=1e-9, atol=1e-9)
    assert found[0].metrics == pytest.approx(found[1].metrics, rel=1e-9)


def test_the_layout_reaches_the_server_step() -> None:
    federation, _ = build(small("method=fedavg+fedftg", "model.name=cnn", "execution.memory_format=channels_last"))
    assert federation.context(0, federation.info, []).channels_last
    federation, _ = build(small("method=fedavg+fedftg", "model.name=cnn", "execution.memory_format=contiguous"))
    assert not federation.context(0, federation.info, []).channels_last


@pytest.mark.parametrize("channels", [1, 3])
def test_a_fedmd_participant_learns_the_same_in_both_layouts(channels: int) -> None:
    stream = torch.Generator().manual_seed(5)
    module = fedmd_cnn((channels, 12, 12), 5, widths=(3, 4, 6), dropout=0.3).double()
    model, start = Stateless(module, "head"), Weights(*split_state(module))
    x = torch.randn(9, channels, 12, 12, dtype=torch.float64, generator=stream)
    lesson = Lesson("revisit", x, torch.arange(9) % 5, F.cross_entropy, 4, 1)
    states, logits = list[State](), list[torch.Tensor]()
    for channels_last in (False, True):
        weights = start.map(layout_of(channels_last))
        digest, private = Adam.start(weights.params), Adam.start(weights.params)
        learner = Learner(model, weights, FedMDSettings(), digest, private, channels_last)
        with layers_draw_from(module, torch.device("cpu"), 8):
            for batch in ([0, 3, 5, 8], [1, 2, 4, 6], [7, 8]):
                learner.step(lesson, torch.tensor(batch), private)
        states.append(learner.state())
        logits.append(learner.logits(x))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-9, atol=1e-9)
    for group, tensors in states[0].items():
        for name, value in tensors.items():
            found = states[1][group][name]
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)
            assert found.is_contiguous(), "what a participant keeps has the usual layout"


@pytest.mark.parametrize(("name", "channels"), [("cnn", 1), ("cnn", 3), ("mlp", 1)])
def test_the_layout_does_not_change_what_is_measured(name: str, channels: int) -> None:
    stream = torch.Generator().manual_seed(3)
    module = build_model(name, input_shape=(channels, 16, 16), num_classes=10, generator=stream).double()
    model, weights = Stateless(module), Weights(*split_state(module))
    x = torch.randn(40, channels, 16, 16, dtype=torch.float64, generator=stream)
    with torch.no_grad():
        y = module.eval()(x).argmax(-1)
    y[:13] = (y[:13] + 1) % 10
    samples = Samples(x, y)
    usual, other = (evaluate(model, weights, samples, 10, 16, channels_last=last) for last in (False, True))
    assert usual.accuracy == other.accuracy == 27 / 40
    assert torch.equal(usual.right, other.right)
    assert other.loss == pytest.approx(usual.loss, rel=1e-9)
    clients = Parts(samples, [np.arange(0, 13), np.arange(13, 40)])
    for last in (False, True):
        right, seen = clients.right(model, weights, 16, channels_last=last)
        assert (right.tolist(), seen.tolist()) == ([0, 27], [13, 27])


def test_a_dropout_mask_does_not_depend_on_the_layout() -> None:
    layer, x = Dropout(0.4), torch.rand(3, 2, 4, 5) + 1
    kept = []
    for layout in (torch.clone, channels_innermost):
        layer.generator = torch.Generator().manual_seed(1)
        kept.append(layer(layout(x)))
    assert torch.equal(*kept)
    assert kept[1].stride(1) == 1, "what follows is computed in the same layout"
    assert 0 < int((kept[0] == 0).sum()) < x.numel()


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
        (["model.name=resnet18", "model.norm=bn", "model.stem=cifar"], "contiguous"),
        ([f"model.name={__name__}:average_pooled"], "channels_last"),
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
