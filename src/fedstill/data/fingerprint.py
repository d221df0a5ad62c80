"""Which samples and labels a run uses, as digests by which two runs can be told apart later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

from fedstill.data.dataset import ByteArray, IntArray

Fingerprints = Mapping[str, str]
"""Part of the data (a key of :data:`PARTS`) -> its digest; a part without samples has none."""

PARTS = {
    "train": "training samples",
    "validation": "server's validation samples",
    "test": "test samples",
    "public": "public samples",
}
AT_A_TIME = 4096


def fingerprint(x: ByteArray, y: IntArray, rows: IntArray, constants: Sequence[float] = ()) -> str:
    """Return a digest of the images and labels at some positions, in that order.

    It is of what is stored, before normalisation and augmentation, so that it does not depend on the machine. Images
    are read a few thousand at a time: ``x`` may be larger than the memory (a ``numpy.memmap``).

    Parameters
    ----------
    x : uint8 array, (N, ...)
        Images as stored.
    y : int64 array, (N,)
        Their labels.
    rows : int64 array, (n,)
        Positions.
    constants : sequence of float
        What the images are normalised by.

    Returns
    -------
    str
        BLAKE2b with 32 bytes, in hex.
    """
    digest = blake2b(repr((len(rows), x.shape[1:], [float(value) for value in constants])).encode(), digest_size=32)
    digest.update(y[rows].astype("<i8").tobytes())
    for first in range(0, len(rows), AT_A_TIME):
        digest.update(x[rows[first : first + AT_A_TIME]].tobytes())
    return digest.hexdigest()


def differing(one: Fingerprints, other: Fingerprints, parts: Iterable[str] = PARTS) -> str:
    """Return in words which parts of two runs' data differ; empty where none does."""
    return " and ".join(PARTS[part] for part in parts if one.get(part) != other.get(part))
