"""Writes checkpoints beside the training: what it holds is copied at the border of a step, and a thread does the rest.

Training waits for the copy alone, and for the checkpoint before if that is still being written. Each rank writes its
own part, the first one waits for all of them and publishes: no rank waits for another in a thread. What goes wrong
there ends the training at its next step.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint, folders
from trainer.checkpoint import Progress
from trainer.memory import free_machine_bytes
from trainer.optimizers import Optimizer
from trainer.pieces import Piece, stored_bytes
from trainer.ranks import Ranks

MAX_MEMORY_SHARE = 0.5
"""Of the free memory, for the copies of all ranks of this machine; a larger state is written while training waits."""


class CheckpointWriter:
    """One checkpoint at a time. All ranks call the same methods in the same order."""

    def __init__(
        self, folder: Path, ranks: Ranks, *, facts: dict[str, Any], keep: int, keep_best: bool = False
    ) -> None:
        self._folder = folder
        self._ranks = ranks
        self._facts = facts
        self._keep = keep
        self._keep_best = keep_best
        self._owner = ranks.largest(os.getpid() if ranks.is_first else 0)
        self._buffer: HostBuffer | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._is_given_up = threading.Event()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """After an error a part that others are waiting for is still written; the others are not waited for."""
        if kind is not None:
            self._is_given_up.set()
        if self._thread is not None:
            self._thread.join()
        if self._buffer is not None:
            self._buffer.free()
        if kind is None:
            self.check()

    def reserve(self, optimizer: Optimizer) -> None:
        """Take the memory for copies now, so that the first checkpoint does not wait for it."""
        num_bytes = optimizer.num_bytes()
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", self._ranks.count))
        if num_bytes * num_local <= MAX_MEMORY_SHARE * free_machine_bytes():
            is_pinned = any(piece.values.is_cuda for piece in optimizer.pieces())
            self._buffer = HostBuffer(num_bytes, is_pinned=is_pinned)

    def save(
        self,
        optimizer: Optimizer,
        progress: Progress,
        *,
        when_copied: Callable[[float], None],
        before_publishing: Callable[[], None],
    ) -> None:
        """Begin a checkpoint of this state. `when_copied` gets the seconds that training has waited for it; the
        thread calls `before_publishing`.
        """
        started_at = time.monotonic()
        self.wait()
        final = self._folder / checkpoint.step_name(progress.num_steps)
        aside = folders.hidden(final, owner=self._owner)
        shapes = optimizer.shapes()
        copies: list[Piece] | None = None
        if self._buffer is not None:
            copies = self._buffer.copy(optimizer.pieces())
        else:
            checkpoint.write_part(aside, shapes, optimizer.pieces, self._ranks)

        def finish() -> None:
            if copies is not None:
                checkpoint.write_part(aside, shapes, lambda: copies, self._ranks)
            self._publish(aside, final, progress, before_publishing)

        when_copied(time.monotonic() - started_at)
        self._thread = threading.Thread(
            target=self._run, args=(finish, aside), name="checkpoint", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until the checkpoint that was begun is there, as far as this rank is concerned."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self, finish: Callable[[], None], aside: Path) -> None:
        try:
            finish()
        except BaseException as error:  # noqa: BLE001 - raised again by check()
            if self._ranks.is_first:
                shutil.rmtree(aside, ignore_errors=True)
            self._error = error

    def _publish(
        self, aside: Path, final: Path, progress: Progress, before_publishing: Callable[[], None]
    ) -> None:
        if not self._ranks.is_first:
            return
        before_publishing()
        is_there = checkpoint.complete(
            aside,
            final,
            progress,
            facts=self._facts,
            num_parts=self._ranks.count,
            is_given_up=self._is_given_up.is_set,
        )
        if is_there:
            best_step = progress.best_step if self._keep_best else None
            checkpoint.settle(self._folder, newest=final, keep=self._keep, best_step=best_step)


class HostBuffer:
    """So much memory of the host, page-locked where a GPU copies into it; used again and again."""

    def __init__(self, num_bytes: int, *, is_pinned: bool) -> None:
        # Filled, since an untouched page is made at the first write: that would be the first checkpoint.
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8).fill_(0)
        # Locked where it lies: torch's own page-locked memory comes in powers of two, up to twice as much.
        self._is_pinned = is_pinned and num_bytes > 0
        if self._is_pinned:
            _check_cuda(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), num_bytes, 0))

    def copy(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The same pieces, their numbers in this buffer."""
        copies: list[Piece] = []
        end = 0
        for piece in pieces:
            start, end = end, end + stored_bytes([piece.values])
            values = self._bytes[start : start + piece.values.nbytes].view(piece.values.dtype)
            values.copy_(piece.values.detach(), non_blocking=True)
            copies.append(piece._replace(values=values))
        if self._is_pinned:
            torch.cuda.current_stream().synchronize()
        return copies

    def free(self) -> None:
        """Nobody may use the copies any more."""
        if self._is_pinned:
            _check_cuda(torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr()))
            self._is_pinned = False


def _check_cuda(code: Any) -> None:
    if int(code) != 0:
        raise MemoryError(f"CUDA can't lock host memory for checkpoints: error {int(code)}")
