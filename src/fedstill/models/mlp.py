"""Fully connected networks."""

from __future__ import annotations

from math import prod

from torch import nn

from fedstill.errors import InputError
from fedstill.models.layers import Backbone


def mlp(input_shape: tuple[int, ...], num_classes: int, *, hidden: tuple[int, ...] = (200,)) -> Backbone:
    """Return a multilayer perceptron with ReLU on the flattened input.

    Parameters
    ----------
    input_shape : tuple of int
        Shape of one sample, of any number of dimensions.
    num_classes : int
        Number of logits.
    hidden : tuple of int
        Hidden widths, by default (200,); without any it is logistic regression on the input.

    Raises
    ------
    InputError
        A dimension of the input or a hidden width is below 1.
    """
    if not input_shape or min(input_shape) < 1:
        raise InputError(f"model.name: 'mlp' needs samples that are not empty, not of shape {input_shape}")
    if any(units < 1 for units in hidden):
        raise InputError(f"model.hidden: widths must be at least 1, not {hidden}")
    width = prod(input_shape)
    layers: list[nn.Module] = [nn.Flatten()]
    for units in hidden:
        layers += [nn.Linear(width, units), nn.ReLU()]
        width = units
    return Backbone(nn.Sequential(*layers), width, num_classes)
