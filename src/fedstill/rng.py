"""Named random streams: every draw belongs to a (seed, purpose, round, client), never to a global state.

No stream depends on the method or on the executor, so two methods of one seed share their partition,
initial weights, cohorts and batch order, and a resumed run needs no generator state from the killed one.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def seed_of(seed: int, *name: str | int) -> int:
    """Return the 63-bit seed of the stream called ``name`` under the experiment's ``seed``."""
    key = "\x1f".join([str(int(seed)), *(f"{type(part).__name__}:{part}" for part in name)])
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def torch_stream(seed: int, *name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh ``torch.Generator`` at the start of the stream called ``name``."""
    return torch.Generator(device=device).manual_seed(seed_of(seed, *name))


def numpy_stream(seed: int, *name: str | int) -> np.random.Generator:
    """Return a fresh ``numpy.random.Generator`` at the start of the stream called ``name``."""
    return np.random.default_rng(seed_of(seed, *name))
