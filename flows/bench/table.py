"""The results for people: a Markdown table with what was compared, and a record of everything for programs."""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from flows.bench.contest import Entry
from flows.bench.options import BenchOptions
from flows.bench.results import Run, Summary, loss_difference

AGREES_WITHIN = 0.005
"""Rounding of bfloat16 in another order of sums; other documents, masks or weights differ by more."""
HEAD = (
    "| | tokens/s, median (least to most) | ours is | reserved GiB | GPU in use GiB | loss of the first step's tokens "
    "| loss, last steps | gradient norm, first and last | trained | first step after s, cold / warm |"
)


def markdown(options: BenchOptions, entries: Sequence[Entry]) -> str:
    """Numbers, then how each was run, then who is missing and why."""
    ours = entries[0].summary() if entries[0].runs else None
    finished = [entry for entry in entries if entry.runs]
    lines = []
    if finished:
        lines += [title(options, finished[0].runs[0]), "", HEAD, "|" + "---|" * HEAD.count(" |")]
        lines += [row(entry.summary(), ours) for entry in finished]
        lines += ["", *(_how(entry) for entry in finished)]
    lines += [_absence(entry) for entry in entries if entry.problem]
    if ours is not None:
        lines += cap_lines(options, ours)
    lines += [versions_line(entry) for entry in finished]
    return "\n".join(lines) + "\n"


def title(options: BenchOptions, run: Run) -> str:
    from trainer.bench.shapes import SHAPES

    rank = f" r{options.rank}" if options.method == "lora" else ""
    base = "" if options.base == "plain" else f" over a base in {options.base}"
    steps = f"{options.num_steps} steps" if options.num_steps else "all steps of an epoch"
    return (
        f"{SHAPES[options.shape].title} with random weights, {options.method}{rank}{base}, {options.tokens_per_step:,} "
        f"tokens a step in bins of {options.capacity:,}, {options.data} lengths, {steps} after {options.num_warm_up}, "
        f"{options.num_rounds} processes each, taking turns; {run.device}."
    )


def _how(entry: Entry) -> str:
    first = entry.runs[0]
    number = f"{len(entry.runs)} process" + "es" * (len(entry.runs) > 1)
    return f"- {entry.name}: {first.kernel}; {number} of {first.num_timed_steps} steps{_not_tried(entry)}."


def _absence(entry: Entry) -> str:
    what = "was in no more rounds" if entry.runs else "is left out"
    return f"- {entry.name} {what}: {entry.problem}."


def _not_tried(entry: Entry) -> str:
    absent = ", ".join(entry.contestant.not_tried)
    return f"; not tried, since not installed: {absent}" if absent else ""


def row(found: Summary, ours: Summary | None) -> str:
    least, most = found.spread
    beside = None if ours is None or ours.name == found.name else ours
    first, last = found.runs[0].grad_norms
    cold, warm = (found.seconds_to_first_step(cold=cold) for cold in (True, False))
    cells = (
        found.name,
        f"{found.tokens_per_second:,.0f} ({least:,.0f} to {most:,.0f})",
        "" if beside is None else f"{beside.tokens_per_second / found.tokens_per_second:.2f} x",
        _gib(found.most("reserved_gib")),
        _gib(found.most("nvml_gib")),
        f"{found.runs[0].first_loss:.4f}{_agreement(found, beside)}",
        f"{found.runs[0].last_loss:.4f}",
        f"{first:.3f}, {last:.3f}",
        f"{found.trained_share:.1%}",
        f"{_seconds(cold)} / {_seconds(warm)}",
    )
    return f"| {' | '.join(cells)} |"


def _agreement(found: Summary, ours: Summary | None) -> str:
    if ours is None:
        return ""
    difference = loss_difference(ours, found)
    return f", agrees ({difference:.2%})" if difference <= AGREES_WITHIN else f", differs by {difference:.1%}"


def cap_lines(options: BenchOptions, ours: Summary) -> list[str]:
    """What was chosen to stay under the cap, and whether it was kept."""
    bins = ours.runs[0].more.get("bins_at_once", options.bins_per_step)
    chosen = f"- Micro-step of ours: {bins} of {options.bins_per_step} bins at once"
    if options.memory_cap_gib is None:
        return [f"{chosen}."]
    used = ours.most("nvml_gib")
    kept = "not measured" if used is None else "kept" if used <= options.memory_cap_gib else "NOT KEPT"
    return [
        f"{chosen}, under a cap of {options.memory_cap_gib:g} GiB of the whole GPU: {kept} ({_gib(used)} GiB)."
    ]


def versions_line(entry: Entry) -> str:
    versions = entry.runs[0].versions.items()
    return f"- {entry.name} with " + ", ".join(f"{name} {version}" for name, version in versions) + "."


def record(options: BenchOptions, entries: Sequence[Entry]) -> dict[str, Any]:
    """All runs with all their numbers; what a later `--variants-of` reads."""
    return {
        "options": {name: _plain(value) for name, value in dataclasses.asdict(options).items()},
        "machine": {"system": platform.platform(), "processor": platform.machine()},
        "contestants": [_contestant(entry, entries[0]) for entry in entries],
    }


def _contestant(entry: Entry, ours: Entry) -> Mapping[str, Any]:
    found: dict[str, Any] = {
        "name": entry.name,
        "variant": entry.variant,
        "left_out": entry.problem,
        "not_tried": list(entry.contestant.not_tried),
        "tried": [dataclasses.asdict(tried) for tried in entry.tried],
        "runs": [dataclasses.asdict(run) for run in entry.runs],
    }
    if entry.runs:
        found["tokens_per_second"] = entry.summary().tokens_per_second
    if entry.runs and ours.runs:
        found["first_loss_difference"] = loss_difference(ours.summary(), entry.summary())
    return found


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, bool, dict, list, tuple, type(None))) else str(value)


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
