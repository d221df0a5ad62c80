import json

import numpy as np
import pytest
import torch

from fedstill.conformance.replays import folder
from fedstill.errors import InputError
from fedstill.models import ConditionalGenerator, initial_weights, parameter_count

GOLDEN = folder() / "fedftg_server_bn"


@pytest.mark.parametrize(("nz", "classes", "count"), [(100, 10, 682_499), (256, 100, 1_690_115)])
def test_published_sizes(nz, classes, count):
    assert parameter_count(ConditionalGenerator(nz, classes, (3, 32, 32))) == count


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 8, 12)])
def test_images_of_any_shape_are_normalised_in_train_mode(shape):
    model = ConditionalGenerator(5, 3, shape, width=8)
    images = model(torch.randn(12, 5), torch.arange(12) % 3)
    assert images.shape == (12, *shape)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(shape[0]), atol=0.01, rtol=0)


def golden() -> tuple[ConditionalGenerator, dict, dict]:
    about = json.loads(GOLDEN.with_suffix(".json").read_text())
    with np.load(GOLDEN.with_suffix(".npz")) as arrays:
        data = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return ConditionalGenerator(100, 4, (3, 8, 8), width=3), about, data


def test_flat_state_has_the_layout_of_the_released_code():
    model, about, _ = golden()
    layout = about["architectures"]["generator"]["layout"]
    buffers = {name for name, _ in model.named_buffers()}
    state = [
        (list(tensor.shape), "buffer" if name in buffers else "parameter", name.rpartition(".")[2])
        for name, tensor in model.state_dict().items()
    ]
    assert state == [(item["shape"], item["kind"], item["name"].rpartition(".")[2]) for item in layout]
    # Released convolutions: blocks 1.0, 2.0 and 2.3; their place among the layers tells ours.
    names = dict(zip((item["name"] for item in layout), model.state_dict()))
    assert [names[name.removeprefix("generator ")] for name in about["zero_gradient_parameters"]] == (
        model.biases_before_norm()
    )


def test_first_images_of_the_released_code():
    model, about, data = golden()
    model.double()
    state = model.state_dict()
    layout = about["architectures"]["generator"]["layout"]
    for tensor, item in zip(state.values(), layout):
        flat = data["in/generator"][item["offset"] : item["offset"] + item["size"]]
        tensor.copy_(flat.view(item["shape"]))
    images = model.train()(data["in/z"][0].double(), data["in/labels"][0])
    torch.testing.assert_close(images, data["out/fake_first_g"], rtol=1e-7, atol=1e-9)


def test_biases_before_norm_have_no_gradient():
    model = ConditionalGenerator(6, 3, (1, 8, 8), width=4).double()
    images = model(torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3)
    (images * torch.randn_like(images)).sum().backward()
    largest = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    assert {name for name, size in largest.items() if size < 1e-9} == set(model.biases_before_norm())


def test_weights_from_a_named_stream():
    states = []
    for _ in range(2):
        with initial_weights(torch.Generator().manual_seed(3)):
            states.append(ConditionalGenerator(6, 3, (1, 8, 8)).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("shape", [(1, 30, 28), (1, 28, 30), (64,), (3, 0, 4), (1, 2, 8)])
def test_refused_shapes(shape):
    with pytest.raises(InputError, match="multiples of 4"):
        ConditionalGenerator(10, 3, shape)
