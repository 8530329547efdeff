"""What a run says while it works: a bar per stage on a terminal, plain lines elsewhere, one line after each stage.

All of it goes to stderr (results alone go to stdout), and all of it is counts: chat text never passes here.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pipelines.parts import Progress, StageProgress, StageResult
from schemas.pipeline_config import PipelineConfig

PLAIN_LINE_SECONDS = 10.0
MAX_REASONS = 4


def run_with_progress(name: str, config: PipelineConfig) -> StageResult:
    """`run_stage`, drawn as fits where stderr goes."""
    from pipelines.stage import run_stage

    with stage_progress(name) as progress:
        return run_stage(name, config, progress=progress)


def stage_line(result: StageResult) -> str:
    """`merge      in 412  kept 398  dropped 14  (invalid_json 9, no_messages 5)  1.2 s`."""
    manifest = result.manifest
    if result.skipped:
        return f"{manifest.stage:<10} unchanged, skipped"
    words = [f"in {manifest.num_rows_in:,}", f"kept {manifest.num_rows_out:,}"]
    if manifest.num_pieces_cut:
        words.append(f"cut {manifest.num_pieces_cut:,} more")
    words.append(f"dropped {sum(manifest.drops.values()):,}")
    if manifest.drops:
        words.append(f"({reasons_text(manifest.drops)})")
    if result.num_parts_reused:
        words.append(f"{result.num_parts_reused} of {len(manifest.parts)} parts unchanged")
        words.append(f"{result.num_rows_run:,} rows worked on")
    return f"{manifest.stage:<10} {'  '.join(words)}  {result.seconds:.1f} s"


def reasons_text(drops: Mapping[str, int]) -> str:
    """The commonest reasons with their counts; how many others there are."""
    ranked = sorted(drops.items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{reason} {count:,}" for reason, count in ranked[:MAX_REASONS])
    return text if len(ranked) <= MAX_REASONS else f"{text}, {len(ranked) - MAX_REASONS} more reasons"


def shows_bars() -> bool:
    """Bars are for people at a terminal that can redraw a line."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


@contextmanager
def stage_progress(stage: str) -> Iterator[Progress]:
    """A `Progress` for one stage, drawn as fits where stderr goes."""
    if shows_bars():
        with _bar(stage) as progress:
            yield progress
    else:
        yield _PlainLines(stage)


@contextmanager
def _bar(stage: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("parts  {task.fields[rows]:,} rows  {task.fields[rate]:,.0f} rows/s"),
        TimeRemainingColumn(),
    )
    rate = _Rate()
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(stage, total=None, rows=0, rate=0.0)

        def update(done: StageProgress) -> None:
            bars.update(
                bar,
                total=done.num_parts,
                completed=done.num_parts_done,
                rows=done.num_rows_done,
                rate=rate.rows_per_second(done),
            )

        yield update


class _PlainLines:
    """At most a line every ten seconds, so that a log of a short run holds the stages' own lines alone."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.rate = _Rate()
        self.last_line = time.monotonic()

    def __call__(self, done: StageProgress) -> None:
        rate = self.rate.rows_per_second(done)
        if time.monotonic() - self.last_line < PLAIN_LINE_SECONDS:
            return
        self.last_line = time.monotonic()
        sys.stderr.write(
            f"{self.stage:<10} {done.num_parts_done} of {done.num_parts} parts  "
            f"{done.num_rows_done:,} rows  {rate:,.0f} rows/s\n"
        )


class _Rate:
    """Rows of this run by its time: those taken over from an earlier run, known at the first call, don't count."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.num_rows_before: int | None = None

    def rows_per_second(self, done: StageProgress) -> float:
        if self.num_rows_before is None:
            self.num_rows_before = done.num_rows_done
        return (done.num_rows_done - self.num_rows_before) / max(time.monotonic() - self.started, 1e-3)
