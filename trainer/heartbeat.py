"""Names the process that keeps the others waiting: stopped, hanging, or on a machine that is gone.

Each rank has a thread that says every few seconds, in the store where the ranks have met, that it is alive and how
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
from trainer.rank_processes import LOST_RANKS_EXIT_CODE, PORT_VARIABLE
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
        end: Callable[[str, int], None] | None = None,
        connect: Callable[[float], dist.Store] | None = None,
    ) -> None:
        self._ranks = ranks
        self._timeout_seconds = timeout_seconds
        self._end = end or end_process
        self._connect = connect or connect_to_store
        self._watched = [n for n in range(ranks.count) if n == 0 or ranks.is_first]
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._ranks.count > 1:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        # Not joined: it may be waiting for a store whose process is gone.
        self._is_over.set()

    def _run(self) -> None:
        pause_seconds = min(self._timeout_seconds / BEATS_PER_TIMEOUT, MAX_SECONDS_BETWEEN_BEATS)
        seen = {number: _Seen() for number in self._watched}
        tick = 0
        try:
            store = self._connect(self._timeout_seconds)
            while not self._is_over.wait(pause_seconds):
                tick += 1
                store.set(_key(self._ranks.number), str(Beat(tick, *self._ranks.pulse.state)))
                self._look(store, seen)
                if problem := problem_of(seen, self._ranks, self._timeout_seconds):
                    self._end(problem, TrainingError.exit_code)
                    return
        except (RuntimeError, ValueError, OSError) as error:
            # The store is in the first process, or with its starter. If that one has ended, it has said why.
            if not self._is_over.is_set():
                problem = _words(
                    0, self._ranks, "has not answered", self._timeout_seconds, seen[0].beat.doing
                )
                self._end(f"{problem} ({' '.join(str(error).split())[:120]})", LOST_RANKS_EXIT_CODE)

    def _look(self, store: dist.Store, seen: dict[int, _Seen]) -> None:
        for number, found in seen.items():
            if store.check([_key(number)]):
                tick, phase, moves, doing = store.get(_key(number)).decode().split(":", 3)
                found.note(Beat(int(tick), int(phase), int(moves), doing))


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


def end_process(problem: str, exit_code: int) -> None:
    """The main thread is waiting in a collective, where nothing can be raised."""
    say_last_words(f"error: {problem}\n")
    sys.stderr.flush()
    os._exit(exit_code)


def connect_to_store(timeout_seconds: float) -> dist.Store:
    """A second connection to the store where the ranks have met: the first one is the collectives' own."""
    host = "127.0.0.1" if PORT_VARIABLE in os.environ else os.environ["MASTER_ADDR"]
    port = int(os.environ.get(PORT_VARIABLE) or os.environ["MASTER_PORT"])
    return dist.TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_seconds)
    )


def _key(number: int) -> str:
    return f"sft_pipeline/heartbeat/{number}"
