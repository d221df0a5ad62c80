"""The class-conditional generator of features, for FedFTG at feature level."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedstill.errors import InputError


class FeatureGenerator(nn.Module):
    """Map noise and labels to pseudo features, the input of a model's head: two embeddings, two linear layers.

    Noise and one-hot labels are each embedded linearly in ``hidden`` / 2 dimensions and joined; then linear -
    BN - LeakyReLU 0.2 twice. This is our reading of FedFTG's Table 5; its code was not released.

    The last BN ties the scale of the features to its weights, one per feature; an adversarial generator could
    otherwise make any teachers disagree by making features large. LeakyReLU after it excludes no feature, so
    it serves heads after a ReLU and heads after a linear layer alike. All linear layers are without
    bias: a BN follows, which would take it away.

    Parameters
    ----------
    noise_dim : int
        Width of the noise.
    num_classes : int
        Number of labels.
    width : int
        Width D of the features.
    hidden : int
        Units of the first linear layer, even; by default 256.

    Raises
    ------
    InputError
        A width is below 1, or ``hidden`` is odd.
    """

    def __init__(self, noise_dim: int, num_classes: int, width: int, hidden: int = 256) -> None:
        super().__init__()
        if min(noise_dim, num_classes, width, hidden) < 1 or hidden % 2:
            raise InputError(
                "the feature generator needs noise_dim, num_classes, width and hidden of at least 1, "
                f"and an even hidden, not {noise_dim}, {num_classes}, {width} and {hidden}"
            )
        self.noise_dim = noise_dim
        self.num_classes = num_classes
        self.from_noise = nn.Linear(noise_dim, hidden // 2, bias=False)
        self.from_label = nn.Linear(num_classes, hidden // 2, bias=False)
        self.blocks = nn.Sequential(
            nn.Linear(hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, width, bias=False),
            nn.BatchNorm1d(width),
            nn.LeakyReLU(0.2),
        )

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Return features (B, width) for noise ``z`` (B, noise_dim) and int64 labels ``y`` (B,)."""
        one_hot = F.one_hot(y, self.num_classes).to(z.dtype)
        out: Tensor = self.blocks(torch.cat([self.from_noise(z), self.from_label(one_hot)], dim=1))
        return out

    def biases_before_norm(self) -> list[str]:
        """Return the names of the biases that a BN takes away: none, by construction."""
        return []
