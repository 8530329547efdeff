"""What a training says while it runs: a line a step in metrics.jsonl, its trackers, and progress for people."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.disk_errors import disk_errors
from trainer.trackers import TrackedRun, open_trackers

METRICS_NAME = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 10.0
"""Where standard error is not a terminal."""


class Metrics:
    """Appends to metrics.jsonl; lines of steps after the run's `num_steps_done` are cut off first, so a resumed run
    has each step once. A line is handed to the system as it is written, and on the disk after `sync`.

    The same numbers go to `trackers`, one after the other, and a line for people to standard error.
    """

    def __init__(
        self, run: TrackedRun, *, num_steps: int, num_tokens_left: int, trackers: Sequence[str] = ()
    ) -> None:
        self._path = run.folder / METRICS_NAME
        with disk_errors(self._path):
            storage.make_folder(run.folder)
            keep_steps(self._path, run.num_steps_done)
            self._file = self._path.open("a", encoding="utf-8")
        self._trackers = open_trackers(trackers, run)
        self._progress = _Progress(num_steps=num_steps, num_tokens_left=num_tokens_left)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        with ExitStack() as closed, disk_errors(self._path):
            for tracker in self._trackers:
                closed.callback(tracker.close)
            self._file.close()

    def log_step(self, record: dict[str, Any]) -> None:
        """One optimiser step; "step" counts from 1. Adds how long the rest will take."""
        record = record | {"seconds_left": self._progress.seconds_left(record)}
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
        numbers = dict(flat_numbers(record))
        step = int(numbers.pop("step"))
        numbers.pop("unix_time", None)  # trackers have clocks of their own
        for tracker in self._trackers:
            tracker.add(numbers, step)


def flat_numbers(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of a record's numbers; those of a record inside it as "outer/inner"."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, f"{before}{name}/")
        elif isinstance(value, (int, float)):
            yield f"{before}{name}", value


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


class _Progress:
    """A line that renews itself on a terminal; elsewhere one now and then."""

    def __init__(self, *, num_steps: int, num_tokens_left: int) -> None:
        self._num_steps = num_steps
        self._num_tokens_left = num_tokens_left
        self._shown_at = -SECONDS_BETWEEN_LINES
        self._started_at = time.monotonic()
        self._num_tokens_done = 0

    def seconds_left(self, record: Mapping[str, Any]) -> float:
        """After this step, at the pace of all since the start: validation and checkpoints count."""
        self._num_tokens_done += record["num_tokens"]
        seconds_per_token = (time.monotonic() - self._started_at) / max(self._num_tokens_done, 1)
        return seconds_per_token * max(self._num_tokens_left - self._num_tokens_done, 0)

    def show(self, record: Mapping[str, Any]) -> None:
        now = time.monotonic()
        is_last = record["step"] >= self._num_steps
        is_terminal = sys.stderr.isatty()
        if not is_last and not is_terminal and now - self._shown_at < SECONDS_BETWEEN_LINES:
            return
        self._shown_at = now
        line = step_line(record, self._num_steps)
        if is_terminal:
            print(f"\r\x1b[2K{line}", end="\n" if is_last else "", file=sys.stderr, flush=True)
        else:
            report(line)


def step_line(record: Mapping[str, Any], num_steps: int) -> str:
    """For people."""
    hours, rest = divmod(round(record["seconds_left"]), 3600)
    mfu = "" if record["mfu"] is None else f"MFU {record['mfu']:.1%}  "
    padding = f"padding {record['padding_share']:.0%}  " if "padding_share" in record else ""
    used = "" if record["device_memory_gib"] is None else f" of {record['device_memory_gib']:.1f} in use"
    return (
        f"step {record['step']}/{num_steps}  loss {_number(record['loss'])}  "
        f"lr {record['learning_rate']:.2e}  grad {_number(record['grad_norm'])}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {padding}{mfu}{record['memory_gib']:.1f} GiB{used}  "
        f"{hours}:{rest // 60:02d}:{rest % 60:02d} left"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
