"""Small convolutional networks."""

from __future__ import annotations

from math import gcd

from torch import nn

from fedstill.errors import InputError
from fedstill.models.layers import Backbone, Norm, check_norm, image_shape, make_norm


def small_cnn(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    norm: Norm = "gn",
    norm_groups: int | None = None,
    width: int = 32,
) -> Backbone:
    """Return a CNN that trains quickly on a CPU.

    Blocks of conv3x3 - maxpool2 - norm - ReLU (pooling first spares norm and ReLU three quarters of their
    work) and one hidden fully connected layer: two blocks (``width``, 2 ``width``) and 64 features below
    16x16, three (``width``, 2 ``width``, 2 ``width``) and 128 features from 16x16 on. Convolutions have a
    bias only without normalisation.

    Parameters
    ----------
    input_shape : tuple of int
        (C, H, W), at least 8x8.
    num_classes : int
        Number of logits.
    norm : {"gn", "bn", "none"}
        Normalisation after each convolution, by default "gn".
    norm_groups : int, optional
        Groups of "gn"; by default the largest common divisor of 8 and ``width``.
    width : int
        Channels of the first block, by default 32.

    Raises
    ------
    InputError
        The input does not fit, or ``norm_groups`` does not divide ``width``.
    """
    check_norm("cnn", norm, norm_groups, ("gn", "bn", "none"))
    if width < 1:
        raise InputError(f"model.width: must be at least 1, not {width}")
    channels, height, breadth = image_shape("cnn", input_shape, smallest=8)
    groups = gcd(8, width) if norm_groups is None else norm_groups
    large = min(height, breadth) >= 16
    layers: list[nn.Module] = []
    for out in (width, 2 * width, 2 * width) if large else (width, 2 * width):
        layers += [
            nn.Conv2d(channels, out, 3, padding=1, bias=norm == "none"),
            nn.MaxPool2d(2),
            make_norm(norm, out, groups),
            nn.ReLU(),
        ]
        channels, height, breadth = out, height // 2, breadth // 2
    features = 128 if large else 64
    layers += [nn.Flatten(), nn.Linear(channels * height * breadth, features), nn.ReLU()]
    return Backbone(nn.Sequential(*layers), features, num_classes)


def feddyn_cnn(input_shape: tuple[int, ...], num_classes: int) -> Backbone:
    """Return FedDyn's CNN: two unpadded conv5x5(64) with pooling, then 384 and 192 hidden units.

    797,962 parameters on (3, 32, 32) with 10 classes. It has no normalisation.

    Parameters
    ----------
    input_shape : tuple of int
        (C, H, W), at least 16x16.
    num_classes : int
        Number of logits.

    Raises
    ------
    InputError
        The input does not fit.
    """
    return _unpadded("feddyn-cnn", input_shape, num_classes, (64, 64), (384, 192))


def moon_cnn(input_shape: tuple[int, ...], num_classes: int) -> Backbone:
    """Return MOON's encoder for CIFAR-10: two unpadded conv5x5 (6, 16) with pooling, then 120 and 84 units.

    62,006 parameters on (3, 32, 32) with 10 classes, and 92,626 with the paper's ``projection`` of 256, which
    :func:`fedstill.models.build_model` adds to any model. It has no normalisation.

    Parameters
    ----------
    input_shape : tuple of int
        (C, H, W), at least 16x16.
    num_classes : int
        Number of logits.

    Raises
    ------
    InputError
        The input does not fit.
    """
    return _unpadded("moon-cnn", input_shape, num_classes, (6, 16), (120, 84))


def _unpadded(
    name: str, input_shape: tuple[int, ...], num_classes: int, convolved: tuple[int, int], hidden: tuple[int, int]
) -> Backbone:
    """Return two unpadded conv5x5 with pooling, then two layers of hidden units."""
    channels, height, width = image_shape(name, input_shape, smallest=16)
    (first, second), (wide, narrow) = convolved, hidden
    body = nn.Sequential(
        nn.Conv2d(channels, first, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * (((height - 4) // 2 - 4) // 2) * (((width - 4) // 2 - 4) // 2), wide),
        nn.ReLU(),
        nn.Linear(wide, narrow),
        nn.ReLU(),
    )
    return Backbone(body, narrow, num_classes)


def mcmahan_cnn(input_shape: tuple[int, ...], num_classes: int) -> Backbone:
    """Return the CNN of the FedAvg paper: padded conv5x5 of 32 and 64 channels with pooling, 512 units.

    1,663,370 parameters on (1, 28, 28) with 10 classes. It has no normalisation.

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
    channels, height, width = image_shape("mcmahan-cnn", input_shape, smallest=4)
    body = nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.ReLU(),
    )
    return Backbone(body, 512, num_classes)
