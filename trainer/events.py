"""Numbers for TensorBoard, as a file of events.

Written in the caller's thread: SummaryWriter of torch writes in one of its own, whose errors (a full disk) come out
as a traceback there and reach the caller much later.
"""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.disk_errors import disk_errors

FILE_VERSION = "brain.Event:2"
"""The first event of a file, by which TensorBoard knows the format."""


class Events:
    """One file of events. Those that an earlier run wrote for steps after `num_steps_done` are marked as void.

    Raises ImportError where TensorBoard is not installed.
    """

    def __init__(self, folder: Path, *, num_steps_done: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._path = folder / name
        with disk_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
        self._records = RecordWriter(self._file)
        self._write(file_version=FILE_VERSION)
        self._write(step=num_steps_done + 1, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        with disk_errors(self._path):
            self._file.close()

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Several curves at one step. They are the system's before this returns; no fsync."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with disk_errors(self._path):
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()
