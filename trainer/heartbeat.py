"""Names the process that keeps the others waiting: stopped, hanging, or on a machine that is gone.

Each rank has threads that say every few seconds, in the store where the ranks have met, that it is alive and how
far its training is. The first rank watches all, the others watch the first one. A rank that a collective keeps waiting
can't raise anything, so its thread says the last words and ends the process; whoever started the ranks ends the rest.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from schemas.errors import TrainingError
from trainer.launch import say_last_words
from trainer.rank_processes import PORT_VARIABLE
from trainer.ranks import Ranks

BEATS_PER_TIMEOUT = 8
MAX_SECONDS_BETWEEN_BEATS = 5.0


class Beat(NamedTuple):
    """What a rank says: a number that always grows, and its pulse."""

    tick: int
    phase: int
    moves: int
    doing: str

    def __str__(self) -> str:
        return f"{self.tick}:{self.phase}:{self.moves}:{self.doing}"


NO_BEAT = Beat(-1, -1, -1, "starting")


@dataclass(slots=True)
class _Seen:
    """The newest beat of a rank, and when it last ticked and last went on, by our own clock."""

    beat: Beat = NO_BEAT
    ticked_at: float = field(default_factory=time.monotonic)
    moved_at: float = field(default_factory=time.monotonic)

    def note(self, beat: Beat) -> None:
        now = time.monotonic()
        if beat.tick != self.beat.tick:
            self.ticked_at = now
        if (beat.phase, beat.moves) != (self.beat.phase, self.beat.moves):
            self.moved_at = now
        self.beat = beat


class Heartbeat:
    """While open, this rank is heard and hears the others. Does nothing for a rank that is alone."""

    def __init__(
        self,
        ranks: Ranks,
        *,
        timeout_seconds: float,
        end: Callable[[str], None] | None = None,
        connect: Callable[[float], dist.Store] | None = None,
    ) -> None:
        self._ranks = ranks
        self._timeout_seconds = timeout_seconds
        self._end = end or end_process
        self._connect = connect or connect_to_store
        self._watched = [n for n in range(ranks.count) if n == 0 or ranks.is_first]
        self._seen = {number: _Seen() for number in self._watched}
        self._is_over = threading.Event()

    def __enter__(self) -> "Heartbeat":
        if self._ranks.count > 1:
            for run in (self._talk, self._watch):
                threading.Thread(target=run, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        # The threads are not joined: one may be waiting for a store whose process has stopped.
        self._is_over.set()

    @property
    def _pause_seconds(self) -> float:
        return min(self._timeout_seconds / BEATS_PER_TIMEOUT, MAX_SECONDS_BETWEEN_BEATS)

    def _talk(self) -> None:
        """Say our beat, hear the others'. The store is in the first process, or with its starter."""
        try:
            store = self._connect(self._timeout_seconds)
            tick = 0
            while not self._is_over.wait(self._pause_seconds):
                tick += 1
                store.set(_key(self._ranks.number), str(Beat(tick, *self._ranks.pulse.state)))
                for number, found in self._seen.items():
                    if store.check([_key(number)]):
                        tick_there, phase, moves, doing = store.get(_key(number)).decode().split(":", 3)
                        found.note(Beat(int(tick_there), int(phase), int(moves), doing))
        except (RuntimeError, OSError):
            return  # a first process that is gone has said why; one that is silent is noticed by the other thread

    def _watch(self) -> None:
        """Not in the other thread: a store whose process has stopped keeps it waiting, time-out or not."""
        while not self._is_over.wait(self._pause_seconds):
            if problem := problem_of(self._seen, self._ranks, self._timeout_seconds):
                self._end(problem)
                return


def problem_of(seen: dict[int, _Seen], ranks: Ranks, timeout_seconds: float) -> str | None:
    """Words about the rank that has been silent for too long, or is the furthest behind where none goes on."""
    now = time.monotonic()
    for number, found in seen.items():
        if number != ranks.number and now - found.ticked_at > timeout_seconds:
            return _words(number, ranks, "has not answered", now - found.ticked_at, found.beat.doing)
    if not ranks.is_first or any(now - found.moved_at <= timeout_seconds for found in seen.values()):
        return None
    number = min(seen, key=lambda n: (seen[n].beat.phase, seen[n].beat.moves, n))
    found = seen[number]
    return _words(number, ranks, "has not gone on", now - found.moved_at, found.beat.doing)


def _words(number: int, ranks: Ranks, what: str, seconds: float, doing: str) -> str:
    return (
        f"process {number} of {ranks.count} {what} for {seconds:.0f} s (train.rank_timeout_seconds) and the others "
        f"wait for it; last seen {doing}; look at its machine and its GPU, then run the same command to go on from "
        "the last checkpoint"
    )


def end_process(problem: str) -> None:
    """The main thread is waiting in a collective, where nothing can be raised."""
    say_last_words(f"error: {problem}\n")
    sys.stderr.flush()
    os._exit(TrainingError.exit_code)


def connect_to_store(timeout_seconds: float) -> dist.Store:
    """A second connection to the store where the ranks have met: the first one is the collectives' own."""
    host = "127.0.0.1" if PORT_VARIABLE in os.environ else os.environ["MASTER_ADDR"]
    port = int(os.environ.get(PORT_VARIABLE) or os.environ["MASTER_PORT"])
    return dist.TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds)
    )


def _key(number: int) -> str:
    return f"sft_pipeline/heartbeat/{number}"
