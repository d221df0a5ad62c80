"""The registry of client models: by name, or by the import path of a user's factory."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import nn

from fedstill.errors import InputError
from fedstill.models.cnn import feddyn_cnn, mcmahan_cnn, moon_cnn, small_cnn
from fedstill.models.fedgen import fedgen_celeba_cnn, fedgen_cnn
from fedstill.models.fedmd import FEDMD_MODELS, fedmd_cnn
from fedstill.models.layers import Backbone, initial_weights, with_projection
from fedstill.models.mlp import mlp
from fedstill.models.resnet import cifar_resnet, resnet18


@dataclass(frozen=True)
class _Entry:
    summary: str
    build: Callable[..., nn.Module]
    options: frozenset[str] = frozenset()


_REGISTRY = {
    "cnn": _Entry(
        "small CNN for a CPU, two or three conv3x3 blocks by image size, GroupNorm by default",
        small_cnn,
        frozenset({"norm", "norm_groups", "width"}),
    ),
    "resnet18": _Entry(
        "ResNet-18 with the ImageNet or the CIFAR stem, GroupNorm(2) by default",
        resnet18,
        frozenset({"norm", "norm_groups", "stem"}),
    ),
    **{
        f"resnet{depth}": _Entry(
            f"FedDF's ResNet-{depth} for small images, BatchNorm by default",
            partial(cifar_resnet, depth=depth),
            frozenset({"norm", "norm_groups"}),
        )
        for depth in (8, 20, 32)
    },
    "feddyn-cnn": _Entry("FedDyn's CNN: two conv5x5(64), then 384 and 192 units", feddyn_cnn),
    "mcmahan-cnn": _Entry("the FedAvg paper's CNN: conv5x5(32), conv5x5(64), then 512 units", mcmahan_cnn),
    "moon-cnn": _Entry(
        "MOON's CNN: conv5x5(6), conv5x5(16), then 120 and 84 units; the paper projects to 256", moon_cnn
    ),
    "fedgen-cnn": _Entry("FedGen's CNN for MNIST and EMNIST: two strided conv3x3 with BatchNorm, 32 units", fedgen_cnn),
    "fedgen-celeba-cnn": _Entry("FedGen's CNN for CelebA, images of at least 43x43", fedgen_celeba_cnn),
    "mlp": _Entry("fully connected, one hidden layer of 200 by default", mlp, frozenset({"hidden"})),
    **{
        name: _Entry(
            f"FedMD's party {name[-1]}: convolutions {'-'.join(map(str, widths))} with BatchNorm, dropout {dropout}",
            partial(fedmd_cnn, widths=widths, dropout=dropout),
        )
        for name, (widths, dropout) in FEDMD_MODELS.items()
    },
}


def list_models() -> dict[str, str]:
    """Return the registered models: name to one-line summary."""
    return {name: entry.summary for name, entry in _REGISTRY.items()}


def build_model(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    norm: str | None = None,
    norm_groups: int | None = None,
    stem: str | None = None,
    width: int | None = None,
    hidden: tuple[int, ...] | None = None,
    projection: int | None = None,
    generator: torch.Generator,
) -> nn.Module:
    """Return a freshly initialised model on the CPU.

    Initial weights depend on ``generator`` alone, which advances by one draw; the global stream is neither
    read nor moved. Not thread safe.

    Parameters
    ----------
    name : str
        A name of :func:`list_models`, or ``package.module:factory``, called with the keywords
        ``input_shape`` and ``num_classes`` and returning an ``nn.Module``.
    input_shape : tuple of int
        Shape of one sample, (C, H, W) for the convolutional models.
    num_classes : int
        Number of logits, at least 2.
    norm, norm_groups, stem, width, hidden
        Options of the registered models; None, the default, is the model's own default.
    projection : int, optional
        Width of MOON's projection between body and head, for every registered model, as
        :func:`fedstill.models.layers.with_projection` builds it; None, the default, for none.
    generator : torch.Generator
        Source of the initial weights.

    Raises
    ------
    InputError
        Unknown model, an option that the model does not have, a value or an input shape that does not fit,
        a projection for a factory, or a factory that cannot be imported or called.
    """
    if num_classes < 2:
        raise InputError(f"model: a classifier needs at least 2 classes, not {num_classes}")
    given = {"norm": norm, "norm_groups": norm_groups, "stem": stem, "width": width, "hidden": hidden}
    options = {key: value for key, value in given.items() if value is not None}
    entry = _Entry("", _import_factory(name)) if ":" in name else _lookup(name)
    if ":" in name and projection is not None:
        raise InputError(
            f"model.projection: only registered models take one; remove it, and let {name!r} build its own projection"
        )
    if "norm" not in entry.options and norm == "none":
        del options["norm"]
    if unused := sorted(options.keys() - entry.options):
        raise InputError(
            f"model.{unused[0]}: model {name!r} has no such option; remove it "
            f"(its options: {', '.join(sorted(entry.options)) or 'none'})"
        )
    with initial_weights(generator):
        model = entry.build(input_shape=tuple(input_shape), num_classes=num_classes, **options)
        if projection is not None and isinstance(model, Backbone):
            model = with_projection(model, projection)
    if not isinstance(model, nn.Module):
        raise InputError(f"model.name: {name!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _lookup(name: str) -> _Entry:
    if name in _REGISTRY:
        return _REGISTRY[name]
    nearest = get_close_matches(name.lower(), _REGISTRY, n=1, cutoff=0.0)[0]
    raise InputError(
        f"model.name: no model {name!r}; did you mean {nearest!r}? There are {', '.join(_REGISTRY)}, "
        "or an import path package.module:factory"
    )


def _import_factory(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    try:
        factory: object = getattr(importlib.import_module(module_name), attribute)
    # Importing runs the user's module, which may fail in any way.
    except Exception as error:
        raise InputError(
            f"model.name: cannot import {path!r}: {type(error).__name__}: {error}; is it installed or on PYTHONPATH?"
        ) from error
    if not callable(factory):
        raise InputError(f"model.name: {path!r} is a {type(factory).__name__}, not a callable")
    try:
        inspect.signature(factory).bind(input_shape=(), num_classes=0)
    except ValueError:
        pass  # Some builtins and extension types have no signature to look at.
    except TypeError as error:
        raise InputError(
            f"model.name: {path!r} must accept the keywords input_shape and num_classes: {error}"
        ) from error
    return factory
