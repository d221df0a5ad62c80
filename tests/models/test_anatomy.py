import pytest
import torch
from torch import nn

from fedstill.errors import InputError
from fedstill.models import batch_norms, build_model, check_width, find_head, parameter_count, split_state


def cnn(norm="bn") -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    return build_model("cnn", input_shape=(1, 8, 8), num_classes=10, norm=norm, generator=generator)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("fixed", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.b(self.a(x))


def test_head_is_found_by_name_by_attribute_or_by_width():
    assert find_head(cnn(), 10) == "head"
    assert find_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), 3) == "2"
    assert find_head(Tied(), 4, "b") == "b"
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 3)), nn.Linear(3, 3))
    assert find_head(nested, 3, "0.0") == "0.0"


def test_head_attribute_of_another_width_does_not_count():
    model = nn.ModuleDict({"head": nn.Linear(4, 2), "fc": nn.Linear(4, 3)})
    assert find_head(model, 3) == "fc"


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (Tied(), None, r"2 linear layers with 4 outputs \(a, b\); set model.head"),
        (nn.Linear(4, 5), None, "0 linear layers with 4 outputs; set model.head"),
        (Tied(), "c", r"'c' is not a linear layer with 4 outputs of Tied \(those are: a, b\)"),
        (nn.Sequential(nn.Linear(4, 5)), "0", "those are: none"),
    ],
)
def test_head_refusals(model, name, message):
    with pytest.raises(InputError, match=message):
        find_head(model, 4, name)


def test_check_width_accepts_and_leaves_the_model_alone():
    model = cnn().train()
    model.head.eval()
    before = split_state(model)[1]
    check_width(model, (1, 8, 8), 10)
    assert model.training
    assert not model.head.training
    assert all(torch.equal(before[name], tensor) for name, tensor in split_state(model)[1].items())
    check_width(cnn().double(), (1, 8, 8), 10)
    check_width(nn.Flatten(), (4,), 4)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Linear(4, 3), (4,), "model.name: the output of Linear is 3 per sample, but the data has 10"),
        (nn.Linear(4, 10), (2, 4), r"of shape \(2, 10\) per sample"),
        (nn.Linear(4, 10), (5,), r"rejects samples of shape \(5,\)"),
        (nn.LSTM(4, 10), (4,), "returns a tuple"),
    ],
)
def test_check_width_refusals(model, shape, message):
    with pytest.raises(InputError, match=message):
        check_width(model, shape, 10)
    assert model.training


def test_split_state_is_an_independent_copy():
    model = cnn()
    params, buffers = split_state(model)
    assert {**params, **buffers}.keys() == model.state_dict().keys()
    assert not any(tensor.requires_grad for tensor in params.values())
    params["head.bias"].add_(1)
    buffers["body.2.running_mean"].add_(1)
    assert not torch.equal(params["head.bias"], model.head.bias)
    assert not model.body[2].running_mean.any()


def test_tied_weights_and_scratch_buffers():
    params, buffers = split_state(Tied())
    assert list(params) == ["a.weight", "a.bias", "b.bias"]
    assert buffers == {}
    assert parameter_count(Tied()) == 24


def test_batch_norms():
    assert batch_norms(cnn()) == ["body.2", "body.6"]
    assert batch_norms(cnn("gn")) == []
