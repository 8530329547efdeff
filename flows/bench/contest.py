"""The whole benchmark: things are made once, each contestant finds its best way, then all take turns."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flows.bench.attempts import Attempt, run_attempt
from flows.bench.contestants import OURS, Contestant, Variant, contestants_of
from flows.bench.making import make
from flows.bench.options import BenchOptions, check_options
from flows.bench.results import Run, Summary
from flows.bench.search import Tried, first_of, say, search
from schemas.errors import InputError, TrainingError

SEARCH_STEPS, SEARCH_WARM_UP_STEPS, SEARCH_TIMEOUT_SECONDS = 8, 3, 240.0

Counts = Sequence[Mapping[str, int]]


@dataclass(slots=True)
class Entry:
    """What became of a contestant. `problem` says why it is left out."""

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


def run_bench(options: BenchOptions) -> list[Entry]:
    """Ours first. Raises ConfigError, and TrainingError where ours did not come to its end."""
    check_options(options)
    entries = [entry_of(found) for found in contestants_of(options)]
    if not options.resume:
        shutil.rmtree(options.runs_folder, ignore_errors=True)
    counts = make(options)
    for entry in entries:
        if not entry.problem:
            entry.variant = chosen_variant(entry, options, counts)
    for number in range(1, options.num_rounds + 1):
        for entry in entries if number % 2 else reversed(entries):
            if not entry.problem:
                run_round(entry, options, counts, number)
    return entries


def entry_of(contestant: Contestant) -> Entry:
    entry = Entry(contestant, first_of(contestant.dimensions))
    if contestant.missing:
        leave_out(entry, f"{', '.join(contestant.missing)} is not installed")
    return entry


def chosen_variant(entry: Entry, options: BenchOptions, counts: Counts) -> Variant:
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
            timeout_seconds=SEARCH_TIMEOUT_SECONDS,
        )
        found = run_attempt(attempt)
        if isinstance(found, Run):
            entry.tried.append(Tried(variant, found.tokens_per_second))
        else:
            entry.tried.append(Tried(variant, None, found))
        return entry.tried[-1]

    return search(entry.contestant.dimensions, measure)


def run_round(entry: Entry, options: BenchOptions, counts: Counts, number: int) -> None:
    """One process. A peer that fails is left out of the rounds that follow; raises TrainingError for ours."""
    attempt = Attempt(
        options,
        entry.contestant,
        entry.variant,
        f"round-{number}",
        counts,
        max_steps=options.max_steps,
        num_warm_up=options.num_warm_up,
        timeout_seconds=options.timeout_seconds,
        is_cold=number == 1,
    )
    found = run_attempt(attempt)
    if isinstance(found, Run):
        entry.runs.append(found)
        say(f"round {number}: {entry.name} {found.tokens_per_second:,.0f} tokens/s")
        return
    if entry.name == OURS:
        raise TrainingError(f"ours, round {number}: {found}; see {attempt.folder}")
    leave_out(entry, found)


def leave_out(entry: Entry, problem: str) -> None:
    entry.problem = problem
    say(f"{entry.name} is left out: {problem}")


def variants_in(path: Path) -> dict[str, Variant]:
    """What an earlier benchmark found best, by contestant. Raises InputError."""
    try:
        return {entry["name"]: entry["variant"] for entry in json.loads(path.read_bytes())["contestants"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--variants-of {path} is no result of `bench train --json` ({error})") from None
