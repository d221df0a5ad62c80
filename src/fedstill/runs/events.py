"""TensorBoard events, written in the caller's thread: an error of the disk reaches the one who asked to write."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


class EventFile:
    """One file of scalars; no handle is kept between calls.

    Parameters
    ----------
    folder : Path
    first_step : int
        Where this file begins; what an older file has from there on is outdated (a run that was resumed).
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self.path = next(path for number in range(10**6) if not (path := folder / f"{stem}.{number}").exists())
        now = time.time()
        session = SessionLog(status=SessionLog.START)
        self._append(
            [
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(wall_time=now, step=first_step, session_log=session),
            ]
        )

    def add(self, scalars: Sequence[tuple[str, float]], step: int) -> None:
        """Write the scalars of one step."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars]
        self._append([Event(wall_time=time.time(), step=step, summary=Summary(value=values))])

    def _append(self, events: Sequence[Event]) -> None:
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        with self.path.open("ab") as file:
            file.write(records.getvalue())
