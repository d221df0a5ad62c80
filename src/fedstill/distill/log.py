"""What a refinement measures on its way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Log:
    """Values by name, kept where they were computed until they are asked for."""

    trace: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def add(self, **values: Tensor) -> None:
        """Note values; they are not read back to the host here."""
        for name, value in values.items():
            self.trace[name].append(value.detach())

    def means(self) -> dict[str, float]:
        """Return the mean of each value over the refinement."""
        return {name: float(torch.stack(values).double().mean()) for name, values in self.trace.items()}

    @contextmanager
    def into(self, other: Log) -> Iterator[None]:
        """Let what is added within the block go to another log."""
        own, self.trace = self.trace, other.trace
        try:
            yield
        finally:
            self.trace = own
