"""The program ``fedstill``: it hears Ctrl-C and SIGTERM from the first moment on, also while torch is imported."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

STOPPED = b"stopped; nothing had been written\n"
INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Import the command line, which hears the signals itself from then on, and run it."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a job in the background inherits it
            signal.signal(number, _leave)
    from fedstill.cli import main as command

    try:
        command()
    finally:
        for number in SIGNALS:  # all is done and said; only the interpreter is still to be put away
            signal.signal(number, signal.SIG_IGN)


def _leave(number: int, frame: object) -> NoReturn:
    # Not as an exception: what is being imported might take that for its own, and there is nothing to be put in order.
    os.write(2, STOPPED)
    os._exit(INTERRUPTED)
