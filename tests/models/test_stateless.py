import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fedstill.errors import InputError
from fedstill.models import Stateless, build_model, split_state

SHAPE = (1, 8, 8)


def build(name="cnn", seed=0, shape=SHAPE, **options) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    return build_model(name, input_shape=shape, num_classes=10, generator=generator, **options)


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.again = self.a
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x):
        self.steps = self.steps + 1
        if x.shape[0] == 0:
            raise RuntimeError("empty")
        return self.again(self.b(self.a(x))) * self.scratch


@pytest.mark.parametrize("norm", ["gn", "bn"])
@pytest.mark.parametrize("train", [True, False])
def test_agrees_with_functional_call_in_value_gradient_and_buffers(norm, train):
    module, x = build(norm=norm), batch(4, *SHAPE)
    own = split_state(module)
    params, buffers = split_state(build(norm=norm, seed=1))
    for tensor in params.values():
        tensor.requires_grad_()
    twin = {name: tensor.clone() for name, tensor in buffers.items()}
    expected = functional_call(build(norm=norm, seed=2).train(train), (params, twin), (x,))
    got = Stateless(module)(params, buffers, x, train=train)
    assert torch.equal(got, expected)
    leaves = list(params.values())
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves)
    ):
        assert torch.equal(a, b)
    assert all(torch.equal(buffers[name], twin[name]) for name in twin)
    if norm == "bn":
        assert buffers["body.2.num_batches_tracked"] == int(train)
    after = split_state(module)
    for old, new in zip(own, after):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert all(isinstance(parameter, nn.Parameter) for parameter in module.parameters())


@pytest.mark.parametrize("name", ["cnn", "resnet18", "feddyn-cnn", "mlp"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_vmap_over_stacked_models_with_gradients_through_parameters_and_input(name, channels_last):
    shape = (3, 16, 16)
    states = [split_state(build(name, seed, shape)) for seed in range(3)]
    stateless = Stateless(build(name, 7, shape))
    stacked = {key: torch.stack([params[key] for params, _ in states]) for key in states[0][0]}
    x = batch(4, *shape)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)

    def loss(params, x):
        return stateless(params, {}, x, train=True).square().sum()

    def logits(params, x):
        return stateless(params, {}, x, train=True)

    x_leaf = x.clone().requires_grad_()
    for tensor in stacked.values():
        tensor.requires_grad_()
    out = vmap(logits, in_dims=(0, None))(stacked, x_leaf)
    together = torch.autograd.grad(out.square().sum(), [x_leaf, *stacked.values()])
    per_model, per_input = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(stacked, x)
    x_sum = torch.zeros_like(x)
    for k, (params, _) in enumerate(states):
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in params.items()}
        x_own = x.clone().requires_grad_()
        one = logits(leaves, x_own)
        torch.testing.assert_close(out[k], one, rtol=1e-3, atol=1e-4)
        gradients = torch.autograd.grad(one.square().sum(), [x_own, *leaves.values()])
        x_sum += gradients[0]
        torch.testing.assert_close(per_input[k], gradients[0], rtol=1e-3, atol=1e-3)
        for key, want, both in zip(leaves, gradients[1:], together[1:]):
            tolerance = 1e-3 * float(want.abs().max()) + 1e-5
            torch.testing.assert_close(per_model[key][k], want, rtol=1e-3, atol=tolerance)
            torch.testing.assert_close(both[k], want, rtol=1e-3, atol=tolerance)
    torch.testing.assert_close(together[0], x_sum, rtol=1e-3, atol=1e-3)


def test_methods_reach_features_and_head():
    module, x = build(), batch(2, *SHAPE)
    stateless, (params, buffers) = Stateless(module), split_state(build(seed=1))
    features = stateless(params, buffers, x, train=False, method="features")
    assert features.shape == (2, 64)
    logits = stateless(params, buffers, features, train=False, method="head")
    assert torch.equal(logits, stateless(params, buffers, x, train=False))


def test_mode_changes_only_on_demand():
    module = build(norm="bn")
    stateless, (params, buffers) = Stateless(module), split_state(module)
    x = batch(2, *SHAPE)
    stateless(params, buffers, x, train=False)
    assert not any(part.training for part in module.modules())
    module.head.train()
    stateless(params, buffers, x, train=False)
    assert module.head.training


def test_tied_weights_reassigned_buffers_and_errors():
    module = Tied()
    params, buffers = split_state(module)
    stateless = Stateless(module)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in params.items()}
    assert not stateless(zeros, buffers, torch.ones(2, 4), train=True).any()
    assert buffers["steps"] == 1
    assert module.steps == 0
    with pytest.raises(RuntimeError, match="empty"):
        stateless(zeros, buffers, torch.ones(0, 4), train=True)
    assert torch.equal(module.a.weight, params["a.weight"])
    assert module.b.weight is module.a.weight
    assert module.steps == 0


def test_state_must_match():
    stateless, (params, buffers) = Stateless(build(norm="bn")), split_state(build(norm="bn"))
    x = batch(2, *SHAPE)
    with pytest.raises(ValueError, match=r"missing .*running_mean"):
        stateless(params, {}, x, train=True)
    with pytest.raises(ValueError, match=r"missing \['head.bias'\], unknown \['b'\]"):
        stateless({("b" if k == "head.bias" else k): v for k, v in params.items()}, buffers, x, train=True)


def test_recurrent_layers_are_refused():
    with pytest.raises(InputError, match="recurrent"):
        Stateless(nn.Sequential(nn.GRU(3, 4)))


def test_clones_run_in_threads():
    stateless = Stateless(build())
    states = [split_state(build(seed=seed)) for seed in range(2)]
    x = batch(8, *SHAPE)
    wanted = [stateless(*state, x, train=False) for state in states]
    results: list[list[bool]] = [[], []]

    def work(k: int, own: Stateless) -> None:
        for _ in range(20):
            results[k].append(torch.allclose(own(*states[k], x, train=False), wanted[k], atol=1e-6))

    threads = [threading.Thread(target=work, args=(k, stateless.clone())) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True] * 20] * 2
