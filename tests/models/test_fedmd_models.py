import json

import numpy as np
import pytest
import torch
from torch import nn

from fedstill.conformance.replays import folder
from fedstill.models import Backbone, build_model, parameter_count
from fedstill.models.fedmd import SameAveragePool, fedmd_cnn
from fedstill.models.layers import Dropout

GOLDEN = folder() / "fedmd_rounds"


def build(name: str, shape: tuple[int, ...], classes: int = 16) -> Backbone:
    model = build_model(name, input_shape=shape, num_classes=classes, generator=torch.Generator().manual_seed(0))
    assert isinstance(model, Backbone)
    return model


@pytest.mark.parametrize(
    ("party", "count"),
    list(enumerate([989440, 1483392, 1977344, 1285888, 2568704, 366464, 283328, 580416, 233728, 316864])),
)
def test_published_sizes(party, count):
    assert parameter_count(build(f"fedmd-femnist-{party}", (1, 28, 28))) == count


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", ["fedmd-femnist-0", "fedmd-cifar-0", "fedmd-cifar-2", "fedmd-cifar-9"])
def test_shapes(name, shape):
    model = build(name, shape).eval()
    x = torch.randn(2, *shape)
    features = model.features(x)
    side = (13 if shape[1] == 28 else 15) if name.endswith("0") else 3
    assert features.shape == (2, {"0": 256, "2": 64, "9": 64}[name[-1]] * side**2)
    assert model(x).shape == (2, 16)
    assert torch.equal(model.head(features), model(x))


def test_average_pool_by_hand():
    x = torch.tensor([[[[1.0, 2.0, 3.0], [5.0, 6.0, 8.0]]]])
    wanted = torch.tensor([[[[3.5, 4.75, 5.5], [5.5, 7.0, 8.0]]]])
    assert torch.equal(SameAveragePool()(x), wanted)


def test_keras_conventions():
    model = build("fedmd-cifar-9", (3, 32, 32))
    assert model.head.bias is None
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    assert len(convolutions) == 4
    assert not any(part.bias.any() for part in convolutions)
    # Glorot-uniform: sqrt(6 / (fan in + fan out)), here of conv3x3 from 64 to 64 channels.
    bound = (6 / (9 * 128)) ** 0.5
    assert 0.99 * bound < convolutions[-1].weight.abs().max() <= bound
    bound = (6 / (576 + 16)) ** 0.5
    assert 0.99 * bound < model.head.weight.abs().max() <= bound
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    assert {(part.momentum, part.eps) for part in norms} == {(0.01, 1e-3)}
    assert [part.p for part in model.modules() if isinstance(part, Dropout)] == [0.2] * 4


@pytest.mark.parametrize(("party", "widths"), [(0, (3, 4)), (1, (4, 3)), (2, (3, 5, 4))])
def test_logits_of_the_released_code(party, widths):
    layout = json.loads(GOLDEN.with_suffix(".json").read_text())["architectures"][f"party_{party}"]["layout"]
    model = fedmd_cnn((1, 12, 12), 6, widths=widths, dropout=0.0).double().eval()
    state = [tensor for name, tensor in model.state_dict().items() if "num_batches" not in name]
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        flat, x, logits = arrays[f"in/w0_{party}"], arrays["in/x_public"][0], arrays["out/party_logits"][0, party]
    for tensor, item in zip(state, layout, strict=True):
        values = flat[item["offset"] : item["offset"] + item["size"]]
        tensor.copy_(torch.from_numpy(values).view(item["shape"]))
    torch.testing.assert_close(model(torch.from_numpy(x).double()), torch.from_numpy(logits), rtol=1e-8, atol=1e-10)
