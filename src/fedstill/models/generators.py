"""The class-conditional image generator of FedFTG."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedstill.errors import InputError


class ConditionalGenerator(nn.Module):
    """Map noise and labels to normalised images: two joined linear maps, two upsamplings, three conv3x3.

    Noise and one-hot labels each become ``ngf`` maps of a quarter of the image's size; these pass BN, x2,
    conv - BN - LeakyReLU 0.2, x2, conv - BN - LeakyReLU 0.2, conv, tanh and a BN without weights, which
    brings every channel to mean 0 and variance 1. Initialisation is PyTorch's.

    682,499 parameters for nz 100, 10 classes and (3, 32, 32); 1,690,115 for nz 256 and 100 classes.

    Parameters
    ----------
    nz : int
        Width of the noise.
    num_classes : int
        Number of labels.
    image_shape : tuple of int
        (C, H, W), H and W multiples of 4.
    ngf : int
        Channels of the last hidden convolution, half of the widest; by default 64.

    Raises
    ------
    InputError
        ``image_shape`` is not (C, H, W), or H or W is not a multiple of 4.
    """

    def __init__(self, nz: int, num_classes: int, image_shape: tuple[int, ...], ngf: int = 64) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1 or image_shape[1] % 4 or image_shape[2] % 4:
            raise InputError(
                "the generator makes images (C, H, W) with H and W multiples of 4, "
                f"but one sample of the data has shape {tuple(image_shape)}"
            )
        channels, height, width = image_shape
        self.nz = nz
        self.num_classes = num_classes
        self._base = (2 * ngf, height // 4, width // 4)
        half = ngf * (height // 4) * (width // 4)
        # The order of definition is the order of the flat state, that of the released code.
        self.from_noise = nn.Linear(nz, half)
        self.from_label = nn.Linear(num_classes, half)
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(2 * ngf),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * ngf, 2 * ngf, 3, padding=1),
            nn.BatchNorm2d(2 * ngf),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * ngf, ngf, 3, padding=1),
            nn.BatchNorm2d(ngf),
            nn.LeakyReLU(0.2),
            nn.Conv2d(ngf, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Return images (B, C, H, W) for noise ``z`` (B, nz) and int64 labels ``y`` (B,)."""
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
