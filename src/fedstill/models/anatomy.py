"""Questions one can ask of any model: where its head is, what it outputs, what its state is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedstill.errors import InputError


def find_head(model: nn.Module, num_classes: int, name: str | None = None) -> str:
    """Return the dotted name of the last linear layer, the one that outputs the logits.

    Parameters
    ----------
    model : nn.Module
        Any model.
    num_classes : int
        Number of logits.
    name : str, optional
        Where the user says it is. By default the attribute ``head``, or else the only ``nn.Linear`` with
        ``num_classes`` outputs.

    Raises
    ------
    InputError
        ``name`` is not a linear layer with ``num_classes`` outputs; or without it none or several are.
    """
    fits: list[str] = [
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    ]
    if name is not None:
        if name in fits:
            return name
        raise InputError(
            f"model.head: {name!r} is not a linear layer with {num_classes} outputs of "
            f"{type(model).__name__} (those are: {', '.join(fits) or 'none'})"
        )
    if "head" in fits:
        return "head"
    if len(fits) == 1:
        return fits[0]
    raise InputError(
        f"model.head: {type(model).__name__} has {len(fits)} linear layers with {num_classes} outputs"
        f"{' (' + ', '.join(fits) + ')' if fits else ''}; set model.head to the dotted name of its last layer"
    )


def check_width(model: nn.Module, input_shape: tuple[int, ...], num_classes: int) -> None:
    """Run one batch of zeros in eval mode and check that the output is (B, ``num_classes``).

    Training flags are left as they were.

    Raises
    ------
    InputError
        The model rejects the input, or its output has another shape.
    """
    first = next(model.parameters(), None)
    batch = torch.zeros(
        (2, *input_shape),
        device=None if first is None else first.device,
        dtype=None if first is None else first.dtype,
    )
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            out = model(batch)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"model.name: {type(model).__name__} rejects samples of shape {input_shape}: {error}"
        ) from error
    finally:
        for module, training in flags:
            module.training = training
    if not isinstance(out, Tensor):
        raise InputError(f"model.name: {type(model).__name__} returns a {type(out).__name__}, not a tensor")
    if out.ndim != 2 or out.shape[1] != num_classes:
        width = out.shape[1] if out.ndim == 2 else f"of shape {tuple(out.shape[1:])}"
        raise InputError(
            f"model.name: the output of {type(model).__name__} is {width} per sample, "
            f"but the data has {num_classes} classes"
        )


def split_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return detached clones of the parameters and of the persistent buffers, by dotted name.

    A tied weight appears once, under its first name.
    """
    persistent = model.state_dict().keys()
    params = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    buffers = {name: tensor.detach().clone() for name, tensor in model.named_buffers() if name in persistent}
    return params, buffers


def parameter_count(model: nn.Module) -> int:
    """Return the number of scalars in the parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def batch_norms(model: nn.Module) -> list[str]:
    """Return the dotted names of the BatchNorm modules, in definition order."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
