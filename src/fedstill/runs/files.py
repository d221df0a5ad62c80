"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedstill.errors import RunError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(RunError):
    """A file cannot be written.

    Parameters
    ----------
    what : str
        The file and the reason.
    remedy : str
        What helps.
    then : str
        How to go on after that.
    """

    def __init__(self, what: str, remedy: str, then: str = "give the same command again") -> None:
        super().__init__(what, remedy, then)
        self.what, self.remedy, self.then = what, remedy, then

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy} and {self.then}"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a WriteError that names the file."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in NO_ROOM else "see to it that it can be"
        raise WriteError(f"{path}: cannot be written ({error.strerror or error})", remedy) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under another name and rename it, so that it is there whole or not at all."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


def sha256(data: bytes) -> str:
    """Return the SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
