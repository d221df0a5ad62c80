"""A device that is not the CPU, for machines that have none: it refuses what a GPU refuses and counts what waits.

A tensor on it is a wrapper around one in the CPU's memory; PyTorch takes it for a tensor on ``meta``. Every operation
arrives at :func:`compute`, which refuses to mix devices as CUDA does, notes every value that has to reach the host
(on a GPU the host then waits for all work before it), and computes on the CPU: the numbers are the CPU's.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

FAR = torch.device("meta")

COPIES = ("_to_copy", "copy_")
INDEXED = ("index", "index_put_", "index_put", "_index_put_impl_")
"""Operations that take indices from the CPU too, also on CUDA."""
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount")
"""Operations whose result the host must know before it can go on."""


class MixedDevices(AssertionError):
    """An operation on tensors of two devices."""


class FarTensor(Tensor):
    """A tensor on the far device."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> FarTensor:
        made: FarTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=FAR, requires_grad=False,
        )  # fmt: skip
        made.held = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FarTensor({self.held})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class RefusedInAGraph(RuntimeError):
    """Something that cannot be recorded."""


class FarDevice(TorchDispatchMode):
    """The device while it is there.

    ``waited`` counts, by the line of fedstill, what made the host wait; ``graphs`` are those that were recorded.
    """

    current: FarDevice | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waited: Counter[str] = Counter()
        self.graphs: list[FarGraph] = []
        self.recording: FarGraph | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class FarGenerator(torch.Generator):
    """A stream of random numbers that lives on the far device, or on the CPU.

    An operation is given another object for the same stream, so a stream is known again by its seed.
    """

    places: ClassVar[dict[int, set[torch.device]]] = {}

    def __new__(cls, device: torch.device | str = "cpu") -> FarGenerator:
        made = super().__new__(cls)
        made.where = torch.device(device)  # type: ignore[attr-defined]
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where  # type: ignore[attr-defined, no-any-return]

    def manual_seed(self, seed: int) -> FarGenerator:
        self.places.setdefault(seed, set()).add(self.device)
        super().manual_seed(seed)
        return self


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation."""
    name = func.overloadpacket.__name__
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    far = [isinstance(one, FarTensor) for one in tensors]
    target = kwargs.get("device")
    on_far = any(far) if target is None else torch.device(target) == FAR
    if name == "copy_":
        on_far = far[0]
    mixed = any(far) and any(not is_far and one.dim() for one, is_far in zip(tensors, far, strict=True))
    if name in INDEXED:  # the indices may lie on the CPU, the values and what is indexed may not
        mixed = any(far) and not (far[0] and all(isinstance(one, FarTensor) or not one.dim() for one in args[2:3]))
    if mixed and name not in COPIES:
        raise MixedDevices(f"{func}: {[str(one.device) for one in tensors]}")
    for stream in (leaf for leaf in leaves if isinstance(leaf, torch._C.Generator)):
        if not {FAR if on_far else torch.device("cpu")} <= FarGenerator.places.get(stream.initial_seed(), {FAR}):
            raise MixedDevices(f"{func}: a stream of another device")
    crosses = name in COPIES and far and far[-1] is not on_far and not kwargs.get("non_blocking")
    by_mask = name in INDEXED and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    waits = crosses or (any(far) and (name in WAITS or by_mask))
    here = FarDevice.current
    if here is not None and waits:
        here.waited[caller()] += 1
    if target is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if here is not None and here.recording is not None and (on_far or waits):
        draws = torch.Tag.nondeterministic_seeded in func.tags
        copies = any(not isinstance(one, FarTensor) and one.dim() for one in tensors)
        if waits or draws or copies:
            why = "draws random numbers" if draws else "makes the host wait" if waits else "copies from the host"
            raise RefusedInAGraph(f"{func} {why}")
        found = here.recording.record(func, near(args), near(kwargs))
    else:
        found = func(*near(args), **near(kwargs))
    if name == "copy_":
        return args[0]
    if not on_far:
        return found
    wrapped = pytree.tree_map_only(Tensor, FarTensor, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if any(far) else wrapped


def near(values: Any) -> Any:
    """Return values with the tensors inside the wrappers."""
    return pytree.tree_map_only(FarTensor, lambda one: one.held, values)


@dataclass(eq=False)
class FarGraph:
    """A CUDA graph on the device: what is recorded is not computed, and a replay knows nothing but the recording.

    While it is recorded every operation is carried out, as its result's shape is needed, and undone: what it has
    changed is put back, what it has made is filled with NaN. A replay carries out the same operations with the same
    Python numbers on the same tensors. So a number that should change from call to call, or a tensor that has been
    swapped for another, gives wrong results, as on a GPU.
    """

    operations: list[tuple[Any, Any, Any, list[Tensor]]] = field(default_factory=list)
    before: dict[int, tuple[Tensor, torch.UntypedStorage]] = field(default_factory=dict)
    made: set[int] = field(default_factory=set)
    replays: int = 0

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Carry out an operation, keep it, and return what it gives."""
        read = {place_of(leaf): leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for place, tensor in read.items():
            if place not in self.made and place not in self.before:
                self.before[place] = tensor, tensor.untyped_storage().clone()
        found = func(*args, **kwargs)
        results = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
        self.made |= {place_of(one) for one in results} - read.keys()
        self.operations.append((func, args, kwargs, results))
        return found

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what runs within the block, and undo it."""
        device = FarDevice.current
        assert device is not None
        device.graphs.append(self)
        device.recording = self
        try:
            yield
        except Exception as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        finally:
            device.recording = None
            for tensor, storage in self.before.values():
                tensor.untyped_storage().copy_(storage)
            for *_, results in self.operations:
                for one in results:
                    if place_of(one) in self.made and one.is_floating_point():
                        one.fill_(float("nan"))

    def replay(self) -> None:
        """Carry out all operations again, into the same memory."""
        self.replays += 1
        for func, args, kwargs, results in self.operations:
            found = [leaf for leaf in pytree.tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for own, value in zip(results, found, strict=True):
                if place_of(own) != place_of(value):  # else it is a view, or what was changed in place
                    own.copy_(value)


class FarStream:
    """A stream of work on the device, which does everything at once."""

    def wait_stream(self, other: FarStream) -> None:
        """Wait for nothing."""


def place_of(tensor: Tensor) -> int:
    """Return where a tensor's memory begins."""
    return tensor.untyped_storage().data_ptr()


def caller() -> str:
    """Return the innermost line of fedstill that is running."""
    frames = [frame for frame in traceback.extract_stack() if "/fedstill/" in frame.filename]
    return f"{frames[-1].filename.split('/fedstill/')[-1]}:{frames[-1].name}" if frames else "elsewhere"


@contextmanager
def far_device() -> Iterator[FarDevice]:
    """Let federations with ``execution.device = "cuda"`` that are built within the block run on the far device."""
    autocast = torch.autocast
    with pytest.MonkeyPatch.context() as patch, FarDevice() as device:
        patch.setattr(FarDevice, "current", device)
        patch.setattr(torch, "Generator", FarGenerator)
        patch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs))
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(import_module("fedstill.build"), "device_of", lambda config: FAR)
        patch.setattr(import_module("fedstill.build"), "set_products_of_float32", lambda config: None)
        patch.setattr(torch.cuda, "CUDAGraph", FarGraph)
        patch.setattr(torch.cuda, "graph", lambda graph, stream: graph.recorded())
        patch.setattr(torch.cuda, "Stream", FarStream)
        patch.setattr(torch.cuda, "current_stream", FarStream)
        patch.setattr(torch.cuda, "stream", nullcontext)
        patch.setattr(import_module("torch.optim.adam"), "_get_capturable_supported_devices", lambda: ["meta"])
        for name in ("tensor", "as_tensor"):  # which make a tensor of a device where no mode sees it
            patch.setattr(torch, name, on_device(getattr(torch, name)))
        yield device


def on_device(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``torch.tensor`` or ``torch.as_tensor`` so that the way to the device is a copy that is seen."""

    def made(data: Any, *, device: torch.device | str | None = None, **kwargs: Any) -> Tensor:
        found = data if isinstance(data, FarTensor) else make(data, **kwargs)
        return found if device is None else found.to(device)

    return made
