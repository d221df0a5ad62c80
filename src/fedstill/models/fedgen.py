"""FedGen's small networks: strided convolutions, BatchNorm, and a linear latent that the generator imitates."""

from __future__ import annotations

from torch import nn

from fedstill.models.layers import Backbone, image_shape

LATENT = 32
"""Width of the latent, the features: the output of FedGen's generator."""


def fedgen_cnn(input_shape: tuple[int, ...], num_classes: int) -> Backbone:
    """Return FedGen's CNN for MNIST and EMNIST: conv3x3 of 6 and 16 channels and stride 2, then 32 units.

    On (1, 28, 28) 26,434 parameters with 10 classes and 26,962 with 26. Each convolution is followed by
    BatchNorm and ReLU. No activation follows the 32 units, which are the features. Returns logits, where the
    released code returns their log-softmax.

    Parameters
    ----------
    input_shape : tuple of int
        (C, H, W), at least 4x4.
    num_classes : int
        Number of logits.

    Raises
    ------
    InputError
        The input does not fit.
    """
    shape = image_shape("fedgen-cnn", input_shape, smallest=4)
    return _strided_cnn(shape, num_classes, (6, 16), pool=False)


def fedgen_celeba_cnn(input_shape: tuple[int, ...], num_classes: int) -> Backbone:
    """Return FedGen's CNN for CelebA: as :func:`fedgen_cnn` with 16, 32 and 64 channels, each then pooled.

    25,954 parameters on (3, 84, 84) with 2 classes. A 2x2 max-pool follows each ReLU.

    Parameters
    ----------
    input_shape : tuple of int
        (C, H, W), at least 43x43, of which one pixel is left.
    num_classes : int
        Number of logits.

    Raises
    ------
    InputError
        The input does not fit.
    """
    shape = image_shape("fedgen-celeba-cnn", input_shape, smallest=43)
    return _strided_cnn(shape, num_classes, (16, 32, 64), pool=True)


def _strided_cnn(shape: tuple[int, int, int], num_classes: int, widths: tuple[int, ...], *, pool: bool) -> Backbone:
    channels, *sides = shape
    layers: list[nn.Module] = []
    for out in widths:
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        channels, sides = out, [(side + 1) // 2 for side in sides]
        if pool:
            layers.append(nn.MaxPool2d(2))
            sides = [side // 2 for side in sides]
    height, width = sides
    layers += [nn.Flatten(), nn.Linear(channels * height * width, LATENT)]
    return Backbone(nn.Sequential(*layers), LATENT, num_classes)
