"""What travels between server and clients: named tensors of a declared kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from fedstill.errors import InputError
from fedstill.tensor_bytes import dump_tensors, load_tensors
from fedstill.weights import Tensors, Weights, finite


class Kind(StrEnum):
    """What a tensor in a payload is; traffic is counted by kind."""

    WEIGHTS = "weights"
    BUFFERS = "buffers"
    CONTROL_VARIATE = "control-variate"
    REFERENCE = "reference-weights"
    LOGITS = "logits"
    LABEL_COUNTS = "label-counts"
    GENERATOR = "generator"
    SCALARS = "scalars"


@dataclass(frozen=True)
class Payload:
    """Named tensors by kind; one message down to a client or up from it."""

    parts: Mapping[Kind, Tensors] = field(default_factory=dict)

    def __getitem__(self, kind: Kind) -> Tensors:
        return self.parts[kind]

    def __contains__(self, kind: Kind) -> bool:
        return kind in self.parts

    def scalar(self, name: str) -> float:
        """Return one number of the kind ``scalars``."""
        return float(self.parts[Kind.SCALARS][name])

    def also(self, kind: Kind, tensors: Tensors) -> Payload:
        """Return this payload with ``tensors`` of ``kind`` added."""
        return Payload({**self.parts, kind: {**self.parts.get(kind, {}), **tensors}})

    def weights(self) -> Weights:
        """Return the model in this payload."""
        return Weights(self.parts[Kind.WEIGHTS], self.parts.get(Kind.BUFFERS, {}))

    def bytes_by_kind(self) -> dict[str, int]:
        """Return the size of the tensors in bytes, by kind."""
        return {
            kind.value: sum(value.numel() * value.element_size() for value in tensors.values())
            for kind, tensors in self.parts.items()
        }

    def to_bytes(self) -> bytes:
        """Serialise as safetensors; names are ``kind/name``."""
        return dump_tensors(
            {f"{kind.value}/{name}": value for kind, tensors in self.parts.items() for name, value in tensors.items()}
        )

    @staticmethod
    def from_bytes(data: bytes) -> Payload:
        """Read what :meth:`to_bytes` wrote.

        Raises
        ------
        InputError
            If the bytes are not safetensors or name an unknown kind.
        """
        try:
            flat = load_tensors(data)
        except ValueError as error:
            raise InputError(f"payload is not a safetensors message: {error}") from error
        parts: dict[Kind, Tensors] = {}
        for key, value in flat.items():
            kind, _, name = key.partition("/")
            if kind not in set(Kind):
                raise InputError(f"payload holds a tensor of unknown kind {kind!r}")
            parts.setdefault(Kind(kind), {})[name] = value
        return Payload(parts)


def model_payload(weights: Weights) -> Payload:
    """Return a payload with a model's parameters and, where there are any, its buffers."""
    payload = Payload({Kind.WEIGHTS: weights.params})
    return payload.also(Kind.BUFFERS, weights.buffers) if weights.buffers else payload


def scalars(**values: float) -> Tensors:
    """Return numbers as float64 tensors of no dimension."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def problem_with(payload: Payload, like: Payload) -> str | None:
    """Say what is wrong with an upload, or None: its kinds, names, shapes, dtypes, and whether it is finite.

    Parameters
    ----------
    payload : Payload
        What came from a client.
    like : Payload
        What should have come; only names, shapes and dtypes count.
    """
    for kind, want in like.parts.items():
        if kind not in payload:
            return f"it holds no {kind.value}"
        if problem := _mismatch(kind.value, payload[kind], want):
            return problem
    for kind, tensors in payload.parts.items():
        if kind not in like:
            return f"it holds {kind.value}, which was not asked for"
        if not finite(tensors.values()):
            name = next(name for name, value in tensors.items() if not finite([value]))
            return f"{kind.value} {name!r} is not finite"
    return None


def problem_with_counts(counts: Tensor, samples: int) -> str | None:
    """Say what is wrong with a client's label counts, or None: they must add up to its samples."""
    if bool((counts < 0).any()) or int(counts.sum()) != samples:
        return f"its label counts {counts.tolist()} are not those of its {samples} samples"
    return None


def _mismatch(kind: str, have: Tensors, want: Tensors) -> str | None:
    if missing := sorted(want.keys() - have.keys()):
        return f"{kind} lack {missing[0]!r}"
    if extra := sorted(have.keys() - want.keys()):
        return f"{kind} have an unknown tensor {extra[0]!r}"
    for name, value in have.items():
        if value.shape != want[name].shape or value.dtype != want[name].dtype:
            return f"{kind} {name!r} is {describe(value)}, expected {describe(want[name])}"
    return None


def describe(value: Tensor) -> str:
    """Return dtype and shape in words."""
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
