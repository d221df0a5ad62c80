"""ResNet-18 with either stem and either normalisation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fedstill.errors import InputError
from fedstill.models.layers import Backbone, Norm, check_norm, image_shape, make_norm


class BasicBlock(nn.Module):
    """Two conv3x3 with normalisation around a shortcut, projected where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int, norm: Norm, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = make_norm(norm, out, groups)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, out, groups)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), make_norm(norm, out, groups))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, out, H / stride, W / stride), rounded up."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    norm: Norm = "gn",
    norm_groups: int | None = None,
    stem: str = "imagenet",
) -> Backbone:
    """Return a ResNet-18 with 512 features.

    Convolutions start from Kaiming's normal distribution over the fan-out, norms from 1 and 0.

    Parameters
    ----------
    input_shape : tuple of int
        (C, H, W), at least 8x8.
    num_classes : int
        Number of logits.
    norm : {"gn", "bn"}
        Normalisation, by default "gn". Both have the same number of parameters.
    norm_groups : int, optional
        Groups of "gn", by default 2.
    stem : {"imagenet", "cifar"}
        conv7x7 of stride 2 and a max-pool (the default), or conv3x3 of stride 1.

    Raises
    ------
    InputError
        The input does not fit, or an option has no such value.
    """
    check_norm("resnet18", norm, norm_groups, ("gn", "bn"))
    channels, _, _ = image_shape("resnet18", input_shape, smallest=8)
    groups = 2 if norm_groups is None else norm_groups
    layers: list[nn.Module]
    if stem == "imagenet":
        layers = [nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False), make_norm(norm, 64, groups)]
        layers += [nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    elif stem == "cifar":
        layers = [nn.Conv2d(channels, 64, 3, padding=1, bias=False), make_norm(norm, 64, groups), nn.ReLU()]
    else:
        raise InputError(f"model.stem: 'resnet18' takes imagenet or cifar, not {stem!r}")
    channels = 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [
            BasicBlock(channels, out, stride, norm, groups),
            BasicBlock(out, out, 1, norm, groups),
        ]
        channels = out
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Backbone(body, channels, num_classes)
