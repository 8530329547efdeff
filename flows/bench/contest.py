"""The whole benchmark: things are made once, each contestant finds its best way, then all take turns."""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flows.bench.attempts import Attempt, run_attempt
from flows.bench.contestants import Contestant, Variant, contestants_of
from flows.bench.making import make
from flows.bench.options import BenchOptions, check_options
from flows.bench.processes import LOG_NAME
from flows.bench.results import Run, Summary
from flows.bench.search import Tried, first_of, say, search
from schemas.errors import InputError

SEARCH_STEPS, SEARCH_WARM_UP_STEPS, SEARCH_TIMEOUT_SECONDS = 8, 3, 240.0
FEWEST_SECONDS = 10.0
"""Less time left is too little for any process."""

Counts = Sequence[Mapping[str, int]]


@dataclass(slots=True)
class Entry:
    """What became of a contestant. `problem` says why it is left out, or out of the rounds behind its last."""

    contestant: Contestant
    variant: Variant
    tried: list[Tried] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    problem: str = ""

    @property
    def name(self) -> str:
        return self.contestant.name

    def summary(self) -> Summary:
        return Summary(self.name, tuple(self.runs))


@dataclass(slots=True)
class Clock:
    """What is left of the time that the whole benchmark has."""

    limit_seconds: float | None
    started: float = field(default_factory=time.monotonic)

    def timeout(self, seconds: float) -> float:
        """Of a process that may have so many by itself."""
        return min(seconds, self.left())

    def left(self) -> float:
        if self.limit_seconds is None:
            return float("inf")
        return self.limit_seconds - (time.monotonic() - self.started)


def run_bench(options: BenchOptions, note: Callable[[Sequence[Entry]], None] | None = None) -> list[Entry]:
    """Ours first. `note` is told of all after each process: a benchmark may be cut off. Raises ConfigError."""
    check_options(options)
    clock = Clock(options.limit_seconds)
    entries = [entry_of(found) for found in contestants_of(options)]
    if not options.resume:
        shutil.rmtree(options.runs_folder, ignore_errors=True)
    counts = make(options)
    for entry in entries:
        if not entry.problem:
            entry.variant = chosen_variant(entry, options, counts, clock)
    take_turns(entries, options, counts, clock, note)
    return entries


def take_turns(
    entries: Sequence[Entry],
    options: BenchOptions,
    counts: Counts,
    clock: Clock,
    note: Callable[[Sequence[Entry]], None] | None = None,
) -> None:
    """Every second round goes backwards: what heats up or fills a cache falls on all alike."""
    for number in range(1, options.num_rounds + 1):
        for entry in entries if number % 2 else reversed(entries):
            if not entry.problem and number <= options.num_rounds_of(entry.name):
                run_round(entry, options, counts, number, clock)
                if note is not None:
                    note(entries)


def entry_of(contestant: Contestant) -> Entry:
    entry = Entry(contestant, first_of(contestant.dimensions))
    if contestant.missing:
        leave_out(entry, f"{', '.join(contestant.missing)} is not installed")
    return entry


def chosen_variant(entry: Entry, options: BenchOptions, counts: Counts, clock: Clock) -> Variant:
    """The fastest, dimension by dimension, or what an earlier benchmark has found."""
    if options.variants_of is not None:
        return entry.variant | variants_in(options.variants_of).get(entry.name, {})
    if not options.sweep:
        return entry.variant

    def measure(variant: Variant) -> Tried:
        attempt = Attempt(
            options,
            entry.contestant,
            variant,
            f"search-{len(entry.tried) + 1}",
            counts,
            max_steps=SEARCH_STEPS,
            num_warm_up=SEARCH_WARM_UP_STEPS,
            timeout_seconds=clock.timeout(SEARCH_TIMEOUT_SECONDS),
        )
        found = run_attempt(attempt) if clock.left() > FEWEST_SECONDS else "no time is left"
        if isinstance(found, Run):
            entry.tried.append(Tried(variant, found.tokens_per_second))
        else:
            entry.tried.append(Tried(variant, None, found))
        return entry.tried[-1]

    return search(entry.contestant.dimensions, measure)


def run_round(entry: Entry, options: BenchOptions, counts: Counts, number: int, clock: Clock) -> None:
    """One process. Who fails is left out of the rounds that follow."""
    needed = max((run.process_seconds for run in entry.runs if not run.is_cold), default=FEWEST_SECONDS)
    if clock.left() < needed:
        leave_out(entry, f"round {number}: {clock.left():.0f} s of --limit-seconds are left")
        return
    attempt = Attempt(
        options,
        entry.contestant,
        entry.variant,
        f"round-{number}",
        counts,
        max_steps=options.max_steps_of(entry.name),
        num_warm_up=options.num_warm_up,
        timeout_seconds=clock.timeout(options.timeout_seconds),
        is_cold=number == 1,
    )
    found = run_attempt(attempt)
    if isinstance(found, Run):
        entry.runs.append(found)
        say(f"round {number}: {entry.name} {found.tokens_per_second:,.0f} tokens/s")
        return
    leave_out(entry, f"round {number}: {found}; see {attempt.folder / LOG_NAME}")


def leave_out(entry: Entry, problem: str) -> None:
    entry.problem = problem
    say(f"{entry.name} is left out: {problem}")


def variants_in(path: Path) -> dict[str, Variant]:
    """What an earlier benchmark found best, by contestant. Raises InputError."""
    try:
        return {entry["name"]: entry["variant"] for entry in json.loads(path.read_bytes())["contestants"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--variants-of {path} is no result of `bench train --json` ({error})") from None
