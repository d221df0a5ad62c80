"""Keep the memory that PyTorch frees on a CPU, instead of handing it back to the system after every operation."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large blocks; say whether it did (other C libraries are left as they are).

    glibc maps every block above 128 KiB anew and unmaps it when it is freed, so that each activation of a
    small network costs its page faults again in every step: measured, a third of a CNN's training step. The
    process keeps the memory of its largest step in exchange. Results do not change.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1))
