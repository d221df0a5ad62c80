"""The twenty different models of FedMD's parties, with the conventions of Keras, in which they were run."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fedstill.models.layers import Backbone, Dropout, image_shape

FEDMD_MODELS: dict[str, tuple[tuple[int, ...], float]] = {
    "fedmd-femnist-0": ((128, 256), 0.2),
    "fedmd-femnist-1": ((128, 384), 0.2),
    "fedmd-femnist-2": ((128, 512), 0.2),
    "fedmd-femnist-3": ((256, 256), 0.3),
    "fedmd-femnist-4": ((256, 512), 0.4),
    "fedmd-femnist-5": ((64, 128, 256), 0.2),
    "fedmd-femnist-6": ((64, 128, 192), 0.2),
    "fedmd-femnist-7": ((128, 192, 256), 0.2),
    "fedmd-femnist-8": ((128, 128, 128), 0.3),
    "fedmd-femnist-9": ((128, 128, 192), 0.3),
    "fedmd-cifar-0": ((128, 256), 0.2),
    "fedmd-cifar-1": ((128, 128, 192), 0.2),
    "fedmd-cifar-2": ((64, 64, 64), 0.2),
    "fedmd-cifar-3": ((128, 64, 64), 0.3),
    "fedmd-cifar-4": ((64, 64, 128), 0.4),
    "fedmd-cifar-5": ((64, 128, 256), 0.2),
    "fedmd-cifar-6": ((64, 128, 192), 0.2),
    "fedmd-cifar-7": ((128, 192, 256), 0.2),
    "fedmd-cifar-8": ((128, 128, 128), 0.3),
    "fedmd-cifar-9": ((64, 64, 64, 64), 0.2),
}
"""Channels of the convolutions and dropout: the paper's Tables 1 and 2. The released code has Table 1 for both."""


class SameAveragePool(nn.Module):
    """Average over 2x2 windows of stride 1 that keeps the size of the map.

    The windows of the last row and column reach beyond the map, at the bottom and at the right; what lies
    outside does not count in the mean.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        # Of a row or column that is repeated beyond the border, the mean is that of what lies inside.
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1), mode="replicate"), 2, stride=1)


def fedmd_cnn(input_shape: tuple[int, ...], num_classes: int, *, widths: tuple[int, ...], dropout: float) -> Backbone:
    """Return a model of a FedMD party: two, three or four convolutions and a linear head without bias.

    Every convolution is followed by BatchNorm, ReLU and dropout. With two: conv3x3, average pool 2x2 of
    stride 1 that keeps the size, conv3x3 of stride 2. With three: conv3x3, the same pool, conv2x2 of stride 2,
    average pool 2x2, conv3x3 of stride 2. The first convolution is padded to keep the size, strided ones are
    not padded. The features are the last map, flattened: 169 ``widths[-1]`` or 9 ``widths[-1]`` on 28x28.

    No layout is known for the four convolutions of the paper's last CIFAR model, and the released code cannot
    build it. Here it is the model of three with one more conv3x3 that keeps the size, before the last one.

    As in Keras: weights start Glorot-uniform and biases from 0; BatchNorm has momentum 0.01 in PyTorch's sense
    and eps 1e-3. The paper's L2 penalty on the head belongs to FedMD's losses and not to the model.

    Parameters
    ----------
    input_shape : tuple of int
        (C, H, W), at least 3x3 with two convolutions and 12x12 with more.
    num_classes : int
        Number of logits, 16 in the paper: the public and the private classes.
    widths : tuple of int
        Channels of the convolutions, two to four.
    dropout : float
        Probability of dropout.

    Raises
    ------
    InputError
        The input or ``dropout`` does not fit.
    """
    channels, height, width = image_shape("fedmd-*", input_shape, smallest=3 if len(widths) == 2 else 12)
    layers = [*_block(channels, widths[0], dropout, kernel=3, padding=1), SameAveragePool()]
    if len(widths) > 2:
        layers += [*_block(widths[0], widths[1], dropout, kernel=2, stride=2), nn.AvgPool2d(2)]
        height, width = height // 4, width // 4
    if len(widths) > 3:
        layers += _block(widths[1], widths[2], dropout, kernel=3, padding=1)
    layers += [*_block(widths[-2], widths[-1], dropout, kernel=3, stride=2), nn.Flatten()]
    features = widths[-1] * ((height - 1) // 2) * ((width - 1) // 2)
    model = Backbone(nn.Sequential(*layers), features, num_classes, bias=False)
    for part in model.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(part.weight)
        if isinstance(part, nn.Conv2d) and part.bias is not None:
            nn.init.zeros_(part.bias)
    return model


def _block(
    channels: int, out: int, dropout: float, *, kernel: int, stride: int = 1, padding: int = 0
) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out, kernel, stride, padding),
        nn.BatchNorm2d(out, eps=1e-3, momentum=0.01),
        nn.ReLU(),
        Dropout(dropout),
    ]
