"""Named tensors as bytes, for files and messages: safetensors, which execute nothing, with the order of the names.

The order matters: a gradient's norm is a sum over the model's tensors, and rounds differently in another order. By
itself safetensors gives the names back in an order of chance.
"""

from __future__ import annotations

import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedstill.weights import Tensors

ORDER = "order"
"""Where the header keeps the names in their order, as JSON."""


def dump_tensors(tensors: Tensors) -> bytes:
    """Return tensors, wherever they lie, as bytes."""
    # Copies: safetensors refuses tensors that share memory, as the global model and SCAFFOLD's fused one may.
    copies = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    return save(copies, metadata={ORDER: json.dumps(list(copies))})


def load_tensors(data: bytes) -> Tensors:
    """Return the tensors that :func:`dump_tensors` wrote, in their order, on the CPU.

    Raises
    ------
    ValueError
        If the bytes are something else, or have a number format that PyTorch lacks.
    """
    try:
        tensors: Tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {name: tensors[name] for name in _order(header, tensors)}
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from error


def _order(header: dict[str, dict[str, str]], tensors: Tensors) -> list[str]:
    names: list[str] = json.loads(header.get("__metadata__", {}).get(ORDER, "null"))
    if not isinstance(names, list) or sorted(map(str, names)) != sorted(tensors):
        raise ValueError("its header does not say in which order its tensors are")
    return names
