"""Residual networks of basic blocks: ResNet-18 with either stem, and the small ones for CIFAR."""

from __future__ import annotations

from collections.abc import Sequence

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
    layers += _stages((64, 128, 256, 512), 2, norm, groups)
    return _classifier(layers, 512, num_classes)


def cifar_resnet(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    depth: int,
    norm: Norm = "bn",
    norm_groups: int | None = None,
) -> Backbone:
    """Return FedDF's ResNet-8, -20 or -32 for small images, with 64 features.

    conv3x3(16) and three stages of (``depth`` - 2) / 6 basic blocks with 16, 32 and 64 channels. Where the
    shape changes the shortcut is a conv1x1 with normalisation. Convolutions start as those of
    :func:`resnet18`. With 10 classes and (3, 32, 32): 78,042, 272,474 and 466,906 parameters.

    Parameters
    ----------
    input_shape : tuple of int
        (C, H, W), at least 8x8.
    num_classes : int
        Number of logits.
    depth : {8, 20, 32}
        Layers with weights on the longest path; any 6 n + 2 is possible.
    norm : {"bn", "gn"}
        Normalisation, by default "bn", that of FedDF's results. Both have the same number of parameters.
    norm_groups : int, optional
        Groups of "gn", by default 2.

    Raises
    ------
    InputError
        The input does not fit, or an option has no such value.
    """
    name = f"resnet{depth}"
    check_norm(name, norm, norm_groups, ("gn", "bn"))
    channels, _, _ = image_shape(name, input_shape, smallest=8)
    groups = 2 if norm_groups is None else norm_groups
    layers = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), make_norm(norm, 16, groups), nn.ReLU()]
    layers += _stages((16, 32, 64), (depth - 2) // 6, norm, groups)
    return _classifier(layers, 64, num_classes)


def _stages(widths: Sequence[int], blocks: int, norm: Norm, groups: int) -> list[nn.Module]:
    """Return ``blocks`` blocks of each width; every stage but the first halves the map."""
    layers: list[nn.Module] = []
    channels = widths[0]
    for out in widths:
        for index in range(blocks):
            stride = 2 if index == 0 and out != widths[0] else 1
            layers.append(BasicBlock(channels, out, stride, norm, groups))
            channels = out
    return layers


def _classifier(layers: Sequence[nn.Module], features: int, num_classes: int) -> Backbone:
    """Return ``layers``, the global average and a head; convolutions start from Kaiming's normal distribution."""
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Backbone(body, features, num_classes)
