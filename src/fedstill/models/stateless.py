"""Run one module on many sets of weights without copying them into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from fedstill.errors import InputError

_Slots = list[tuple[dict[str, Tensor | None], str]]


class Stateless:
    """Call a module on given parameters and buffers, as ``torch.func.functional_call`` but far cheaper.

    The tensors are put straight into the module's slots for the time of the call, so that gradients flow to
    them, ``torch.func`` transforms apply, and buffers updated by the module (BatchNorm in train mode) are
    updated in place in the tensors given. Afterwards the module holds its own tensors again.

    Not thread safe: each thread needs its own :meth:`clone`. Activation checkpointing inside the module is
    not supported, since it would recompute with the module's own weights.

    Parameters
    ----------
    module : nn.Module
        The module to run; kept, not copied. Only its training flag is changed, by the calls.
    head : str, optional
        Dotted name of the linear layer that gives the logits, as :func:`fedstill.models.find_head` tells it;
        :meth:`with_features` and :meth:`head` need it.

    Raises
    ------
    InputError
        The module has recurrent layers, which keep a second list of their weights; or ``head`` is not one of
        its linear layers.
    """

    def __init__(self, module: nn.Module, head: str | None = None) -> None:
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):
            raise InputError(f"model.name: recurrent layers in {type(module).__name__} are not supported")
        self.module = module
        self.head_name = head
        self._head_params = None if head is None else _linear_params(module, head)
        persistent = module.state_dict().keys()
        self._params = _slots(module, dict(module.named_parameters()), "_parameters")
        buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
        self._buffers = _slots(module, buffers, "_buffers")

    def __call__(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *inputs: Tensor,
        train: bool,
        method: str = "forward",
    ) -> Tensor:
        """Return the output of the module on ``inputs`` with the given state.

        Parameters
        ----------
        params : mapping of str to Tensor
            Every parameter by its name in ``named_parameters()`` (a tied weight by its first name).
        buffers : mapping of str to Tensor
            Every persistent buffer by its name in ``named_buffers()``; updated in place where the module
            updates its buffers.
        *inputs : Tensor
            Arguments of the method, usually one batch.
        train : bool
            Train or eval mode.
        method : str
            What to call, "forward" by default; dotted names reach submodules ("features", "head").

        Raises
        ------
        ValueError
            A parameter or buffer is missing, or unknown.
        """
        if self.module.training is not train:
            self.module.train(train)
        call = self.module if method == "forward" else attrgetter(method)(self.module)
        with _swapped(self._params, params), _swapped(self._buffers, buffers):
            out: Tensor = call(*inputs)
        return out

    def with_features(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, *, train: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the output of the module on a batch, and its features: what the head was given.

        Gradients flow through both. Works for any module that calls its head once.

        Parameters
        ----------
        params, buffers, train
            As in a plain call.
        x : Tensor
            One batch.

        Returns
        -------
        logits : Tensor
            What the plain call returns.
        features : Tensor
            The input (B, D) of the head.

        Raises
        ------
        InputError
            No head is known, or the module does not call it exactly once.
        ValueError
            A parameter or buffer is missing, or unknown.
        """
        name = self._known_head()
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            seen.append(args[0] if args else kwargs["input"])

        handle = self.module.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
        try:
            logits = self(params, buffers, x, train=train)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise InputError(
                f"model.head: {type(self.module).__name__} calls {name!r} {len(seen)} times in a forward pass, "
                "so that its features are not known; set model.head to a layer that is called once, as a module"
            )
        return logits, seen[0]

    def head(self, params: Mapping[str, Tensor], z: Tensor) -> Tensor:
        """Return the head's output (B, classes) for features ``z`` (B, D), with the head's weights in ``params``.

        Nothing else of ``params`` is read, and the module is not touched.

        Raises
        ------
        InputError
            No head is known, or its weights are not parameters of the module.
        """
        name = self._known_head()
        if self._head_params is None:
            raise InputError(
                f"model.head: the weights of {name!r} are computed from other parameters; use a plain nn.Linear"
            )
        weight, bias = self._head_params
        return F.linear(z, params[weight], None if bias is None else params[bias])

    def clone(self) -> Stateless:
        """Return an independent copy, for another thread."""
        return Stateless(copy.deepcopy(self.module), self.head_name)

    def _known_head(self) -> str:
        if self.head_name is None:
            raise InputError(
                f"model.head: which linear layer of {type(self.module).__name__} gives the logits is not known; "
                "set model.head to its dotted name"
            )
        return self.head_name


def _linear_params(module: nn.Module, name: str) -> tuple[str, str | None] | None:
    """Return the names of weight and bias of a linear layer, None where its weight is not a parameter."""
    layer = dict(module.named_modules()).get(name)
    if not isinstance(layer, nn.Linear):
        raise InputError(
            f"model.head: {name!r} is not a linear layer of {type(module).__name__}; set model.head to the dotted "
            "name of the one that gives the logits"
        )
    # By identity: a tied weight goes by its first name, which may be another layer's.
    names = {id(parameter): key for key, parameter in module.named_parameters()}
    weight = names.get(id(layer.weight))
    if weight is None:
        return None
    return weight, None if layer.bias is None else names[id(layer.bias)]


def _slots(module: nn.Module, tensors: Mapping[str, Tensor], kind: str) -> dict[str, _Slots]:
    """Return for each named tensor every place in the tree of modules that holds it."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    found: dict[str, _Slots] = {name: [] for name in tensors}
    for part in module.modules():
        slot = cast("dict[str, Tensor | None]", getattr(part, kind))
        for key, tensor in slot.items():
            if id(tensor) in names:
                found[names[id(tensor)]].append((slot, key))
    return found


@contextmanager
def _swapped(slots: Mapping[str, _Slots], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold ``tensors`` in their slots within the block."""
    if tensors.keys() != slots.keys():
        raise ValueError(
            f"state does not match the module: missing {sorted(slots.keys() - tensors.keys())}, "
            f"unknown {sorted(tensors.keys() - slots.keys())}"
        )
    own = [(slot, key, slot[key]) for places in slots.values() for slot, key in places]
    try:
        for name, places in slots.items():
            for slot, key in places:
                slot[key] = tensors[name]
        yield
        for name, places in slots.items():
            for slot, key in places:
                # A module may assign a new buffer instead of updating the old one in place.
                if (new := slot[key]) is not None and new is not tensors[name]:
                    tensors[name].copy_(new.detach())
    finally:
        for slot, key, tensor in own:
            slot[key] = tensor
