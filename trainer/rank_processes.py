"""Starts the ranks of a training on this machine and watches over them. Light: no torch until GPUs are counted.

One rank that fails ends all, and its own message is the one that is raised; ranks that have run out of memory are
started again with a smaller micro-step. The ranks end with this process, however it dies. Only this process hears
signals (trainer/signals.py): it tells the ranks through a pipe.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pipelines.run_lock import PARENT_FD_VARIABLE, Lock, lock_variables
from schemas.errors import TrainingError, UsageError
from trainer.launch import ERROR_FD_VARIABLE, read_config
from trainer.signals import STOP_FD_VARIABLE, STOP_SIGNALS, StopSignals, stopped_exit_code
from trainer.support import ONE_PROCESS

if TYPE_CHECKING:
    from schemas.pipeline_config import PipelineConfig

PORT_VARIABLE = "SFT_PIPELINE_RANKS_PORT"
"""Where the ranks meet; set only in ranks that were started here."""
LISTENING_FD_VARIABLE = "SFT_PIPELINE_RANKS_LISTENING_FD"
ERROR_MARK = "error: "
LOST_RANKS_EXIT_CODE = 75
"""Of a rank that ends because another one is gone."""
OUT_OF_MEMORY_EXIT_CODE = 76
"""Of a rank that can go on with fewer bins at once."""
MICRO_STEP_VARIABLE = "SFT_PIPELINE_BINS_PER_MICRO_STEP"
"""In ranks that are started again after that: in the place of train.bins_per_micro_step."""
POLL_SECONDS = 0.05
CULPRIT_SECONDS = 5.0
"""A rank notices the end of another one before we do; so long the other one's own end is waited for."""

_START = """
import sys
our_folder = sys.argv.pop(1)
sys.path[0] = our_folder
if our_folder in sys.path[1:]:  # installed: ahead of the standard library it could shadow that
    del sys.path[0]
from trainer.launch import run_as_module
run_as_module()
"""


def count_processes(config: "PipelineConfig", *, num_gpus: int | None = None) -> int:
    """How many ranks the config asks for; without a number one per visible GPU, as torch or `num_gpus` says."""
    if config.train.strategy in ONE_PROCESS:
        return 1
    if config.train.num_processes is not None:
        return config.train.num_processes
    if config.model is None or config.model.device == "cpu":
        return 1
    if num_gpus is None:
        import torch

        num_gpus = torch.cuda.device_count()
    return max(num_gpus, 1)


def train_in_processes(config_path: Path, num_processes: int, *, lock: Lock) -> None:
    """Run `train` in so many ranks to its end; the first one's output is ours.

    Raises TrainingError or UsageError with the words of the rank that failed first; SystemExit after a signal, once
    all ranks have stopped at the same step.
    """
    with StopSignals() as signals:
        signals.begin()  # here there is nothing to load
        num_bins = read_config(config_path).train.bins_per_micro_step
        while True:
            try:
                _train_once(config_path, num_processes, lock, signals, num_bins)
                return
            except _RanksOutOfMemoryError as error:
                num_bins = smaller(num_bins)
                sys.stderr.write(f"{error}; starting again with bins_per_micro_step {num_bins}\n")


def smaller(num_bins: int) -> int:
    """The next size of a micro-step to try."""
    return max(num_bins // 2, 1)


class _RanksOutOfMemoryError(Exception):
    """With what the first one said."""


def _train_once(
    config_path: Path, num_processes: int, lock: Lock, signals: StopSignals, num_bins: int
) -> None:
    with _started_ranks(config_path, num_processes, lock, num_bins) as (ranks, stop_pipe):
        was_told = False
        while any(code is None for code in _exit_codes(ranks)):
            if signals.received is not None and not was_told:
                os.write(stop_pipe, bytes([signals.received]) * len(ranks))
                was_told = True
            if any(_has_failed(rank, signals.received) for rank in ranks):
                raise _failure(ranks, signals.received)
            time.sleep(POLL_SECONDS)
        if any(_has_failed(rank, signals.received) for rank in ranks):
            raise _failure(ranks, signals.received)
        if signals.received is not None and any(_exit_codes(ranks)):
            raise SystemExit(stopped_exit_code(signals.received))


@dataclass(frozen=True, slots=True)
class _Rank:
    number: int
    process: "subprocess.Popen[bytes]"
    words: IO[bytes]
    """What it said on its way out: for the first rank its error, for the others all of standard error."""


@contextmanager
def _started_ranks(
    config_path: Path, num_processes: int, lock: Lock, num_bins: int
) -> Iterator[tuple[list[_Rank], int]]:
    """The ranks, and the pipe through which each can be told a signal by one byte."""
    stop_read, stop_write = os.pipe()
    read_end, write_end = os.pipe()  # never written to: our death closes it, and the ranks end
    with ExitStack() as stack:
        for descriptor in (read_end, write_end, stop_read, stop_write):
            stack.callback(os.close, descriptor)
        # Bound here and handed over, so that no other program can take the port in between.
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ranks: list[_Rank] = []
        stack.callback(_kill, ranks)
        for number in range(num_processes):
            words = stack.enter_context(tempfile.TemporaryFile())
            inherited = [read_end, stop_read, words.fileno(), *lock]
            inherited += [listening.fileno()] if number == 0 else []
            process = subprocess.Popen(
                [sys.executable, "-c", _START, str(_our_folder()), "train", "--config", str(config_path)],
                env=os.environ
                | lock_variables(lock)
                | _place_variables(number, num_processes, listening)
                | {PARENT_FD_VARIABLE: str(read_end), ERROR_FD_VARIABLE: str(words.fileno())}
                | {STOP_FD_VARIABLE: str(stop_read), MICRO_STEP_VARIABLE: str(num_bins)},
                stdin=subprocess.DEVNULL,
                stdout=None if number == 0 else subprocess.DEVNULL,
                stderr=None if number == 0 else words,
                pass_fds=inherited,
            )
            ranks.append(_Rank(number, process, words))
        yield ranks, stop_write


def _place_variables(number: int, num_processes: int, listening: socket.socket) -> dict[str, str]:
    """The same names as torchrun's, and our own for the meeting place."""
    threads = max((os.cpu_count() or 1) // num_processes, 1)
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(num_processes),
        # Each rank would otherwise take a thread per core, and all wait for each other.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        PORT_VARIABLE: str(listening.getsockname()[1]),
        LISTENING_FD_VARIABLE: str(listening.fileno()),
    }


def _our_folder() -> Path:
    return Path(__file__).resolve().parent.parent


def _exit_codes(ranks: Sequence[_Rank]) -> list[int | None]:
    return [rank.process.poll() for rank in ranks]


def _kill(ranks: Sequence[_Rank]) -> None:
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        rank.process.wait()


# Failures ---------------------------------------------------------------------------------------------------


def _has_failed(rank: _Rank, received: int | None) -> bool:
    """Ended otherwise than well, or by the signal that it was told, or that ended it before it could listen."""
    code = rank.process.poll()
    if code is None or code == 0:
        return False
    was_stopped = code in (128 + (received or 0), LOST_RANKS_EXIT_CODE) or -code in STOP_SIGNALS
    return received is None or not was_stopped


def _failure(ranks: Sequence[_Rank], received: int | None) -> Exception:
    """The error of the rank that is to blame: one that did not merely lose another."""
    deadline = time.monotonic() + CULPRIT_SECONDS
    while True:
        failed = [rank for rank in ranks if _has_failed(rank, received)]
        culprits = [rank for rank in failed if rank.process.returncode != LOST_RANKS_EXIT_CODE]
        if culprits or time.monotonic() > deadline:
            return _error_of((culprits or failed)[0], len(ranks))
        time.sleep(POLL_SECONDS)


def _error_of(rank: _Rank, num_ranks: int) -> Exception:
    code = rank.process.returncode
    text = _last_words(rank)
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[-1].startswith(ERROR_MARK):
        message = lines[-1].removeprefix(ERROR_MARK)
        if code == OUT_OF_MEMORY_EXIT_CODE:
            return _RanksOutOfMemoryError(f"process {rank.number} of {num_ranks}: {message}")
        return UsageError(message) if code == UsageError.exit_code else TrainingError(message)
    sys.stderr.write(text)  # a bug of ours: its traceback is wanted
    ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    said = f": {lines[-1].strip()}" if lines else ""
    return TrainingError(
        f"process {rank.number} of {num_ranks} {ended}{said}; run the same command to go on from the last "
        "checkpoint"
    )


def _last_words(rank: _Rank) -> str:
    rank.words.seek(0)
    return rank.words.read().decode(errors="replace")
