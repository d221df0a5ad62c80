import copy
import threading

import pytest
import torch
from torch import nn

from fedstill.errors import InputError
from fedstill.models.layers import Dropout
from fedstill.models.randomness import layers_draw_from, random_layers

CPU = torch.device("cpu")


def network() -> nn.Module:
    return nn.Sequential(Dropout(0.5), nn.Identity(), Dropout(0.25))


def drawn(module: nn.Module, seed: int, times: int = 3) -> list[torch.Tensor]:
    with layers_draw_from(module, CPU, seed):
        return [module(torch.ones(8, 5)) for _ in range(times)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_seed_gives_its_masks_whatever_the_global_stream():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = drawn(network(), 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(drawn(network(), 3), first)
    assert not same(drawn(network(), 4), first)
    assert not torch.equal(first[0], first[1])


def test_mask_does_not_depend_on_the_dtype():
    layer = Dropout(0.3)
    with layers_draw_from(layer, CPU, 0):
        single = layer(torch.ones(100))
    with layers_draw_from(layer, CPU, 0):
        double = layer(torch.ones(100, dtype=torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(single > 0, double > 0)


def test_layers_share_one_stream_and_lose_it_after_the_block():
    model = nn.Sequential(Dropout(0.5), Dropout(0.5))
    with layers_draw_from(model, CPU, 0):
        first, second = model[0](torch.ones(64)), model[1](torch.ones(64))
        assert model[0].generator is model[1].generator
    assert not torch.equal(first, second)
    assert model[0].generator is None
    with pytest.raises(ZeroDivisionError), layers_draw_from(model, CPU, 0):
        1 / 0  # noqa: B018
    assert model[0].generator is None


def test_without_a_generator_masks_come_from_the_global_stream():
    layer = Dropout(0.5)
    torch.manual_seed(1)
    first = layer(torch.ones(64))
    second = layer(torch.ones(64))
    torch.manual_seed(1)
    assert torch.equal(layer(torch.ones(64)), first)
    assert not torch.equal(first, second)


def test_threads_give_the_bits_of_serial():
    model = network()
    wanted = [drawn(model, seed, 50) for seed in range(2)]
    got: list[list[torch.Tensor]] = [[], []]

    def work(seed: int, own: nn.Module) -> None:
        got[seed] = drawn(own, seed, 50)

    threads = [threading.Thread(target=work, args=(seed, copy.deepcopy(model))) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for a, b in zip(wanted, got))


def test_a_copy_continues_with_a_copy_of_the_stream():
    model = network()
    with layers_draw_from(model, CPU, 0):
        model(torch.ones(8, 5))
        twin = copy.deepcopy(model)
        assert twin[0].generator is twin[2].generator
        assert twin[0].generator is not model[0].generator
        assert torch.equal(twin(torch.ones(8, 5)), model(torch.ones(8, 5)))
    assert not model.state_dict()


def test_identity_in_eval_mode_and_without_dropout():
    x = torch.randn(4, 3)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_mean_is_kept_and_kept_elements_are_scaled(p):
    layer = Dropout(p)
    x = torch.ones(200_000, requires_grad=True)
    with layers_draw_from(layer, CPU, 0):
        out = layer(x)
    # The standard error of the mean is sqrt(p / (1 - p) / n), below 0.007 here.
    assert out.mean().item() == pytest.approx(1, abs=0.03)
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    assert out[out > 0].unique().item() == pytest.approx(1 / (1 - p))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out.detach())


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_refused_probabilities(p):
    with pytest.raises(InputError, match=r"must be in \[0, 1\)"):
        Dropout(p)


def test_stock_layers_draw_from_a_forked_global_stream():
    model = nn.Sequential(Dropout(0.5), nn.Dropout(0.5), nn.RReLU())
    assert random_layers(model) == ["Dropout", "RReLU"]
    assert random_layers(network()) == []
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = drawn(model, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(drawn(model, 3), first)
