"""SIGTERM and SIGINT end a training between two steps, not inside one."""

import os
import signal
import threading
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
TOLD_SIGNALS: dict[int, int] = {signal.SIGUSR1: signal.SIGTERM, signal.SIGUSR2: signal.SIGINT}
"""How the starter of several ranks hands a signal on, and which one is meant."""
HANDED_ON_VARIABLE = "SFT_PIPELINE_SIGNALS_HANDED_ON"
"""Set in ranks whose starter does so."""


def leave_signals_to_starter() -> None:
    """In a rank: a terminal, or the end of a flow, signals the whole group, and the starter tells us anyway."""
    if HANDED_ON_VARIABLE in os.environ:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """While open, the first signal is noted in `received`; a second one acts as if nobody had asked us.

    A signal that was handed on is noted as the one that is meant.

    Does nothing outside the main thread, where Python allows no handlers.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            heard = tuple(TOLD_SIGNALS) if HANDED_ON_VARIABLE in os.environ else STOP_SIGNALS
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = TOLD_SIGNALS.get(number, number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
