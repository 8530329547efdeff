"""What a training says while it runs: a line a step in metrics.jsonl, TensorBoard, and progress for people."""

import json
import os
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from pipelines import storage
from pipelines.disk_errors import disk_errors
from trainer.events import Events

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
SECONDS_BETWEEN_LINES = 10.0
"""Where standard error is not a terminal."""


class Metrics:
    """Appends to metrics.jsonl; lines of steps after `num_steps_done` are cut off first, so a resumed run has
    each step once. A line is handed to the system as it is written, and on the disk after `sync`.
    """

    def __init__(self, folder: Path, *, num_steps_done: int, num_steps: int, num_tokens_left: int) -> None:
        self._path = folder / METRICS_NAME
        with disk_errors(self._path):
            storage.make_folder(folder)
            keep_steps(self._path, num_steps_done)
            self._file = self._path.open("a", encoding="utf-8")
        self._events = _events(folder / TENSORBOARD_FOLDER, num_steps_done)
        self._progress = _Progress(num_steps=num_steps, num_tokens_left=num_tokens_left)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        with self._events, disk_errors(self._path):
            self._file.close()

    def log_step(self, record: dict[str, Any]) -> None:
        """One optimiser step; "step" counts from 1."""
        self._write(record)
        self._progress.show(record)

    def log_validation(self, record: dict[str, Any]) -> None:
        """Loss on the validation side after that many steps."""
        self._write(record)
        loss, bits = record["validation_loss"], record["validation_bits_per_byte"]
        report(f"step {record['step']}: validation loss {_number(loss)}, bits per byte {_number(bits)}")

    def log_checkpoint(self, record: dict[str, Any]) -> None:
        """How long training has waited for a checkpoint after that many steps."""
        self._write(record)

    def sync(self) -> None:
        """Before a checkpoint is published, from its thread: its steps' lines are on the disk."""
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def _write(self, record: dict[str, Any]) -> None:
        with disk_errors(self._path):
            self._file.write(json.dumps(record, sort_keys=True, allow_nan=False) + "\n")
            self._file.flush()
        if isinstance(self._events, Events):
            numbers = {name: value for name, value in record.items() if isinstance(value, (int, float))}
            self._events.add(numbers, int(numbers.pop("step")))


class NoMetrics:
    """In the place of Metrics where another rank writes them."""

    def __enter__(self) -> "NoMetrics":
        return self

    def __exit__(self, *error: object) -> None:
        return

    def log_step(self, record: dict[str, Any]) -> None: ...

    def log_validation(self, record: dict[str, Any]) -> None: ...

    def log_checkpoint(self, record: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...


def keep_steps(path: Path, num_steps_done: int) -> None:
    """Drop the lines of later steps, a last line that was cut by a kill, and what a disk has made unreadable."""
    if not path.exists():
        return
    data = path.read_bytes()
    lines = data.split(b"\n")[:-1]
    steps = [_step_of(line) for line in lines]
    if num_damaged := steps.count(None):
        report(f"{path}: {num_damaged} of {len(lines)} lines can't be read and are left out")
    kept = [
        line + b"\n"
        for line, step in zip(lines, steps, strict=True)
        if step is not None and step <= num_steps_done
    ]
    if b"".join(kept) != data:
        storage.write_bytes(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def report(message: str) -> None:
    """One line for people."""
    print(message, file=sys.stderr, flush=True)


def memory_gib(device: torch.device) -> float:
    """Most memory held so far: the allocator's on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class _Progress:
    """A line that renews itself on a terminal; elsewhere one now and then."""

    def __init__(self, *, num_steps: int, num_tokens_left: int) -> None:
        self._num_steps = num_steps
        self._num_tokens_left = num_tokens_left
        self._shown_at = -SECONDS_BETWEEN_LINES
        self._started_at = time.monotonic()
        self._num_tokens_done = 0

    def show(self, record: dict[str, Any]) -> None:
        self._num_tokens_done += record["num_tokens"]
        now = time.monotonic()
        is_last = record["step"] >= self._num_steps
        is_terminal = sys.stderr.isatty()
        if not is_last and not is_terminal and now - self._shown_at < SECONDS_BETWEEN_LINES:
            return
        self._shown_at = now
        line = _step_line(record, self._num_steps, self._seconds_left(now))
        if is_terminal:
            print(f"\r\x1b[2K{line}", end="\n" if is_last else "", file=sys.stderr, flush=True)
        else:
            report(line)

    def _seconds_left(self, now: float) -> float:
        seconds_per_token = (now - self._started_at) / max(self._num_tokens_done, 1)
        return seconds_per_token * max(self._num_tokens_left - self._num_tokens_done, 0)


def _step_line(record: dict[str, Any], num_steps: int, seconds_left: float) -> str:
    hours, rest = divmod(round(seconds_left), 3600)
    return (
        f"step {record['step']}/{num_steps}  loss {_number(record['loss'])}  "
        f"lr {record['learning_rate']:.2e}  grad {_number(record['grad_norm'])}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {record['memory_gib']:.1f} GiB  "
        f"{hours}:{rest // 60:02d}:{rest % 60:02d} left"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _events(folder: Path, num_steps_done: int) -> AbstractContextManager[Any]:
    """Nothing where TensorBoard is not installed."""
    try:
        return Events(folder, num_steps_done=num_steps_done)
    except ImportError:
        return nullcontext()
