"""SIGTERM, SIGUSR1 and SIGINT end a training between two steps, not inside one.

Slurm sends SIGUSR1 or SIGTERM some time before it takes the machines away, a spot machine SIGTERM, a terminal SIGINT;
a group is signalled whole, some of it twice. Ranks that we have started listen to their starter alone, which tells
them through a pipe; those of torchrun or srun listen for themselves. Either way the ranks agree where to stop.
"""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from pipelines.run_lock import PARENT_FD_VARIABLE

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FD_VARIABLE = "SFT_PIPELINE_STOP_FD"
"""In a rank: the pipe through which its starter hands a signal on, as one byte with its number."""


def leave_signals_to_starter() -> None:
    """In a rank: a terminal, a scheduler or the end of a flow signals the whole group, and the starter tells us."""
    if STOP_FD_VARIABLE in os.environ:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def stopped_exit_code(number: int) -> int:
    """Of a training that has stopped in good order and is not finished.

    A scheduler that asked for it sees 0. A process of ours above this one must not take that for a finished training,
    and a shell shall see that Ctrl-C has ended a command: they get 128 + signal.
    """
    return 128 + number if number == signal.SIGINT or PARENT_FD_VARIABLE in os.environ else 0


class StopSignals:
    """While open, the first signal is noted in `received`. A second SIGINT acts as if nobody had asked us; others
    are only repeated: a group's signal comes again from the one who started us.

    Before `begin`, when nothing is trained yet, a signal ends the process at once. Outside the main thread, where
    Python allows no handlers, nothing is heard.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._has_begun = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if STOP_FD_VARIABLE in os.environ:
            descriptor = int(os.environ[STOP_FD_VARIABLE])
            threading.Thread(target=self._listen, args=(descriptor,), name="stop", daemon=True).start()
        elif threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From now on a signal is noted, and heeded at the end of a step."""
        self._has_begun = True
        if self.received is not None:
            self._leave()

    def _listen(self, descriptor: int) -> None:
        told = os.read(descriptor, 1)
        if not told:  # the starter is gone: so are we, soon
            return
        self.received = told[0]
        if not self._has_begun:
            self._leave()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number if self.received is None else self.received
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        if not self._has_begun:
            self._leave()

    def _leave(self) -> None:
        assert self.received is not None, "a signal was received"
        name = signal.Signals(self.received).name
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"stopped by {name} before the first step; run the same command to go on\n")
            sys.stderr.flush()
        # At once: there is nothing to save, and a thread can't end the process otherwise.
        os._exit(stopped_exit_code(self.received))
