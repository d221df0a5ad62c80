import pytest
import torch

from fedstill.errors import InputError
from fedstill.models import FeatureGenerator, initial_weights, parameter_count


def make(*args, **options) -> FeatureGenerator:
    with initial_weights(torch.Generator().manual_seed(3)):
        return FeatureGenerator(*args, **options)


def draw(model: FeatureGenerator, batch: int) -> torch.Tensor:
    z = torch.randn(batch, model.noise_dim, generator=torch.Generator().manual_seed(1))
    return model(z, torch.arange(batch) % model.num_classes)


def test_size_by_hand():
    # Embeddings 5 x 4 and 3 x 4, linear 8 x 8 and 8 x 6, BatchNorm 2 x 8 and 2 x 6.
    model = make(5, 3, 6, hidden=8)
    assert parameter_count(model) == 20 + 12 + 64 + 48 + 16 + 12
    assert (model.noise_dim, model.num_classes) == (5, 3)


def test_features_start_centred_and_scaled_before_the_last_activation():
    features = draw(make(10, 4, 32), 64)
    assert features.shape == (64, 32)
    before = torch.where(features < 0, features / 0.2, features)
    torch.testing.assert_close(before.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(before.var(0, correction=0), torch.ones(32), atol=0.01, rtol=0)


def test_noise_and_label_both_matter_and_every_parameter_has_a_gradient():
    model = make(6, 3, 5, hidden=8).double().eval()
    z, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    assert not torch.allclose(model(z, y), model(z, (y + 1) % 3))
    assert not torch.allclose(model(z, y), model(z + 1, y))
    out = model.train()(z, y)
    (out * torch.randn_like(out)).sum().backward()
    assert all(parameter.grad.abs().max() > 1e-9 for parameter in model.parameters())
    assert model.biases_before_norm() == []


@pytest.mark.parametrize("sizes", [(0, 3, 4, 8), (5, 3, 0, 8), (5, 3, 4, 7), (5, 3, 4, 0)])
def test_refused_sizes(sizes):
    with pytest.raises(InputError, match="even hidden"):
        FeatureGenerator(*sizes)
