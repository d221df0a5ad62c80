"""The class-conditional image generator of FedFTG."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedstill.errors import InputError


class ConditionalGenerator(nn.Module):
    """Map noise and labels to normalised images: two joined linear maps, two upsamplings, three conv3x3.

    Noise and one-hot labels each become ``width`` maps of a quarter of the image's size; these pass BN, x2,
    conv - BN - LeakyReLU 0.2, x2, conv - BN - LeakyReLU 0.2, conv, tanh and a BN without weights, which
    brings every channel to mean 0 and variance 1. Initialisation is PyTorch's.

    682,499 parameters for noise_dim 100, 10 classes and (3, 32, 32); 1,690,115 for noise_dim 256 and 100 classes.

    Parameters
    ----------
    noise_dim : int
        Width of the noise.
    num_classes : int
        Number of labels.
    image_shape : tuple of int
        (C, H, W), H and W multiples of 4.
    width : int
        Channels of the last hidden convolution, half of the widest; by default 64.

    Raises
    ------
    InputError
        ``image_shape`` is not (C, H, W), or H or W is not a multiple of 4.
    """

    def __init__(self, noise_dim: int, num_classes: int, image_shape: tuple[int, ...], width: int = 64) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1 or image_shape[1] % 4 or image_shape[2] % 4:
            raise InputError(
                "the generator makes images (C, H, W) with H and W multiples of 4, "
                f"but one sample of the data has shape {tuple(image_shape)}"
            )
        channels, *image = image_shape
        self.noise_dim = noise_dim
        self.num_classes = num_classes
        high, wide = (side // 4 for side in image)
        self._base = (2 * width, high, wide)
        half = width * high * wide
        # The order of definition is the order of the flat state, that of the released code.
        self.from_noise = nn.Linear(noise_dim, half)
        self.from_label = nn.Linear(num_classes, half)
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Return images (B, C, H, W) for noise ``z`` (B, noise_dim) and int64 labels ``y`` (B,)."""
        one_hot = F.one_hot(y, self.num_classes).to(z.dtype)
        joined = torch.cat([self.from_noise(z), self.from_label(one_hot)], dim=1)
        out: Tensor = self.blocks(joined.view(-1, *self._base))
        return out

    def biases_before_norm(self) -> list[str]:
        """Return the names of the convolution biases that a BN follows directly.

        The BN takes their effect away: in train mode their true gradient is zero, and what a scale-free
        optimiser such as Adam makes of it is rounding noise.
        """
        layers = list(self.blocks)
        return [
            f"blocks.{index}.bias"
            for index, (layer, following) in enumerate(pairwise(layers))
            if isinstance(layer, nn.Conv2d) and isinstance(following, nn.BatchNorm2d)
        ]
