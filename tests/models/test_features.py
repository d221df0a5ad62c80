import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F

from fedstill.errors import InputError
from fedstill.models import Stateless, build_model, split_state

SHAPE = (1, 8, 8)


class Foreign(nn.Module):
    """A user's model: no Backbone, its last layer has another name and is called with a keyword."""

    def __init__(self, calls=1):
        super().__init__()
        self.calls = calls
        self.net = nn.ModuleDict(
            {"conv": nn.Conv2d(1, 3, 3), "norm": nn.BatchNorm2d(3), "out": nn.Linear(108, 5, bias=False)}
        )

    def forward(self, x):
        h = self.net["norm"](self.net["conv"](x)).relu().flatten(1)
        if self.calls == 0:
            return F.linear(h, self.net["out"].weight)
        return sum(self.net["out"](input=h) for _ in range(self.calls))


def foreign(seed: int = 0, calls: int = 1) -> Foreign:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Foreign(calls)


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("train", [True, False])
def test_features_of_a_foreign_model_and_the_gradients_of_a_plain_call(train):
    module, x = foreign(7), batch(4, *SHAPE)
    model = Stateless(module, "net.out")
    params, buffers = split_state(foreign(1))
    twin = {name: tensor.clone() for name, tensor in buffers.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in params.items()}
    plain = model(params, twin, x, train=train)
    logits, features = model.with_features(params, buffers, x, train=train)
    assert torch.equal(logits, plain)
    assert all(torch.equal(buffers[name], twin[name]) for name in twin)
    assert features.shape == (4, 108)
    assert features.min() == 0
    torch.testing.assert_close(features @ params["net.out.weight"].T, logits)
    assert torch.equal(model.head(params, features), logits)
    wanted = torch.autograd.grad(plain.square().sum(), list(leaves.values()))
    through_head = model.head(params, features).square().sum()
    for loss in (logits.square().sum(), through_head):
        got = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    assert not module.net["out"]._forward_pre_hooks


def test_features_of_a_backbone_are_its_features():
    module = build_model("cnn", input_shape=SHAPE, num_classes=5, generator=torch.Generator().manual_seed(0))
    model, (params, buffers), x = Stateless(module, "head"), split_state(module), batch(3, *SHAPE)
    logits, features = model.with_features(params, buffers, x, train=False)
    assert torch.equal(features, module.eval().features(x))
    assert torch.equal(model.head(params, features), logits)


def test_under_vmap_with_gradients():
    model, x = Stateless(foreign(7), "net.out"), batch(4, *SHAPE)
    states = [split_state(foreign(seed)) for seed in range(3)]
    params, buffers = ({key: torch.stack([state[i][key] for state in states]) for key in states[0][i]} for i in (0, 1))

    def both(params, buffers, x):
        return model.with_features(params, buffers, x, train=False)

    def loss(params, buffers, x):
        logits, features = both(params, buffers, x)
        return logits.square().sum() + model.head(params, features.sin()).sum()

    logits, features = vmap(both, in_dims=(0, 0, None))(params, buffers, x)
    from_features = vmap(model.head)(params, features)
    gradients = vmap(grad(loss), in_dims=(0, 0, None))(params, buffers, x)
    for k, state in enumerate(states):
        one_logits, one_features = both(*state, x)
        torch.testing.assert_close(logits[k], one_logits)
        torch.testing.assert_close(features[k], one_features)
        torch.testing.assert_close(from_features[k], one_logits)
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in state[0].items()}
        wanted = torch.autograd.grad(loss(leaves, state[1], x), list(leaves.values()))
        for key, tensor in zip(leaves, wanted):
            torch.testing.assert_close(gradients[key][k], tensor, rtol=1e-4, atol=1e-4)


def test_a_clone_keeps_the_head_and_has_a_module_of_its_own():
    model = Stateless(foreign(), "net.out")
    twin = model.clone()
    assert twin.head_name == "net.out"
    assert twin.module is not model.module
    params, buffers = split_state(model.module)
    x = batch(2, *SHAPE)
    for a, b in zip(
        model.with_features(params, buffers, x, train=False), twin.with_features(params, buffers, x, train=False)
    ):
        assert torch.equal(a, b)


def test_head_with_a_bias_and_with_a_tied_weight():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    model = Stateless(module, "1")
    params, buffers = split_state(module)
    z = batch(2, 3)
    torch.testing.assert_close(model.head(params, z), z @ params["0.weight"].T + params["1.bias"])
    logits, features = model.with_features(params, buffers, z, train=False)
    torch.testing.assert_close(model.head(params, features), logits)


def test_the_hook_goes_even_if_the_module_fails():
    module = foreign()
    params, buffers = split_state(module)
    with pytest.raises(RuntimeError):
        Stateless(module, "net.out").with_features(params, buffers, batch(2, 1, 9, 9), train=False)
    assert not module.net["out"]._forward_pre_hooks


def test_without_a_head():
    model = Stateless(foreign())
    params, buffers = split_state(foreign())
    with pytest.raises(InputError, match=r"set model\.head to its dotted name"):
        model.with_features(params, buffers, batch(2, *SHAPE), train=False)
    with pytest.raises(InputError, match=r"set model\.head"):
        model.head(params, batch(2, 108))


@pytest.mark.parametrize("name", ["net.conv", "nowhere", "net"])
def test_refused_heads(name):
    with pytest.raises(InputError, match=f"model.head: '{name}' is not a linear layer of Foreign"):
        Stateless(foreign(), name)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_head_that_is_not_called_once(calls):
    module = foreign(calls=calls)
    with pytest.raises(InputError, match=f"calls 'net.out' {calls} times"):
        Stateless(module, "net.out").with_features(*split_state(module), batch(2, *SHAPE), train=False)


def test_a_head_whose_weight_is_computed():
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    model = Stateless(module, "0")
    params, buffers = split_state(module)
    logits, features = model.with_features(params, buffers, batch(2, 3), train=False)
    assert torch.equal(features, batch(2, 3))
    assert logits.shape == (2, 2)
    with pytest.raises(InputError, match="computed from other parameters"):
        model.head(params, features)
