"""Objects with many tensors on their way between two processes: a pickle, and shared memory for the tensors' bytes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedstill.errors import RunError


@dataclass(frozen=True)
class Parcel:
    """Something on its way: all but its tensors' bytes, where in the memory those lie, and the memory if it is new."""

    head: bytes
    at: Sequence[tuple[int, int]]
    memory: Tensor | None


class Outbox:
    """Memory that another process reads; what is put there stays until it is cleared.

    PyTorch's own way between processes opens a file for each tensor, which takes longer than a small model's step, and
    a pipe holds less than a small model.
    """

    def __init__(self) -> None:
        self.memory, self.used = torch.empty(0, dtype=torch.uint8), 0

    def clear(self) -> None:
        """Begin anew; the other side has taken everything."""
        self.used = 0

    def put(self, content: object) -> Parcel:
        """Return what to send so that the other side has the content; a tensor that stands in it twice goes once."""
        buffers: list[pickle.PickleBuffer] = []
        head = pickled(content, buffers.append)
        raws = [buffer.raw() for buffer in buffers]
        need = sum(aligned(raw.nbytes) for raw in raws)
        fresh = self.used + need > len(self.memory)
        if fresh:
            self.memory, self.used = shared(2 * (self.used + need)), 0
        memory, at = self.memory.numpy().data, []
        for raw in raws:
            memory[self.used : self.used + raw.nbytes] = raw
            at.append((self.used, self.used + raw.nbytes))
            self.used += aligned(raw.nbytes)
        return Parcel(head, at, self.memory if fresh else None)


class Inbox:
    """The other side of an :class:`Outbox`."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def take(self, parcel: Parcel) -> Any:
        """Return a copy of what was put."""
        if parcel.memory is not None:
            self.memory = parcel.memory
        memory = self.memory.numpy().data
        # From a process of this program, through its pipe; what comes from a client or a file is never unpickled.
        return pickle.loads(parcel.head, buffers=[memory[first:last] for first, last in parcel.at])


def shared(size: int) -> Tensor:
    """Return bytes that another process can be given.

    Raises
    ------
    RunError
        Where the system has no room for them.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    try:
        memory.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise RunError(
            f"no shared memory for {size / 2**20:,.0f} MiB of weights ({str(error).splitlines()[0]}); give the machine "
            f"more (docker run --shm-size), or set execution.executor = 'threads'"
        ) from error
    return memory


def aligned(size: int) -> int:
    """Return a size rounded up to whole cache lines."""
    return -(-size // 64) * 64


def pickled(content: object, take_buffer: Callable[[pickle.PickleBuffer], object] | None = None) -> bytes:
    """Pickle something with its tensors' bytes in line, or given to ``take_buffer``."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5, buffer_callback=take_buffer).dump(content)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, content: object) -> Any:
        if type(content) is not Tensor:
            return NotImplemented
        raw = content.detach().contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(raw.data), content.dtype, tuple(content.shape))


def _tensor(raw: bytearray | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(raw):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(shape).clone()
