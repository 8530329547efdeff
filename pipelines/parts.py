"""What every stage shares: keys, reuse of finished parts, drops, limits, the manifest.

A stage's folder is rewritten in place without ever being half: new parts get names of their own (by key), the
old manifest names the old files until the new one is renamed over it, and only then are old files removed.
A part that was finished before a kill is found again by its sidecar `.entry-<key>.json`.
Files whose names are fixed (shards, plans, the ledger) can't lie beside their old selves: while they are rewritten
the folder has no manifest, but one set aside, by which its parts are still known.
"""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines import executors
from pipelines.limits import check_free_disk, check_limits
from pipelines.part_files import all_files, feature_entry, is_whole, read_sidecar, sweep
from pipelines.storage import (
    check_file,
    check_manifest,
    json_digest,
    read_manifest,
    sync_folder,
    write_json,
    write_manifest,
)
from schemas.errors import IntegrityError
from schemas.pipeline_config import PipelineConfig
from schemas.run import MANIFEST_NAME, STAGE_FOLDERS, TIMING_NAME, Manifest, PartEntry

REPLACED_MANIFEST_NAME = ".replaced-manifest.json"


@dataclass(frozen=True, slots=True)
class StageProgress:
    """How far a stage is; parts that are taken over from an earlier run count as done."""

    stage: str
    num_parts_done: int
    num_parts: int
    num_rows_done: int


Progress = Callable[[StageProgress], None]


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage did."""

    manifest: Manifest
    num_parts_run: int
    num_parts_reused: int
    seconds: float
    num_rows_run: int = 0
    """Rows that really passed through the stage's own functions."""
    num_rows_reused: int = 0
    """Rows of parts that were taken over."""

    @property
    def skipped(self) -> bool:
        """True when nothing had changed."""
        return self.num_parts_run == 0


@dataclass(frozen=True, slots=True)
class PartTask:
    """Work on one part, as it is sent to a worker. `payload` is what the stage's work function needs."""

    stage: str
    config: PipelineConfig
    folder: Path
    key: str
    label: str
    payload: Any


class PartsToRun(Exception):
    """Ends a dry run of a stage at the point where work would begin."""

    def __init__(self, num_parts_to_run: int, num_parts_reused: int) -> None:
        super().__init__(num_parts_to_run, num_parts_reused)
        self.num_parts_to_run = num_parts_to_run
        self.num_parts_reused = num_parts_reused


@dataclass(slots=True)
class StageRun:
    """One stage of one run: where it writes, and what it found there."""

    name: str
    config: PipelineConfig
    version: int
    sections: dict[str, object]
    versions: dict[str, str]
    progress: Progress | None = None
    dry: bool = False
    num_parts_run: int = 0
    num_parts_reused: int = 0
    num_rows_run: int = 0
    num_rows_reused: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """The stage's folder in the run root."""
        return self.config.run_root / STAGE_FOLDERS[self.name]

    def key(self, *what: object) -> str:
        """Digest of this stage's code version, config and libraries together with `what`."""
        return json_digest([self.name, self.version, self.sections, self.versions, *what])

    def task(self, key: str, label: str, payload: Any) -> PartTask:
        """Work of this stage on one part."""
        return PartTask(self.name, self.config, self.folder, key, label, payload)

    def skip(self, key: str) -> StageResult | None:
        """The earlier result, if the folder already holds exactly this work with all its files."""
        manifest = read_manifest(self.folder)
        if manifest is None or manifest.key != key:
            return None
        try:
            for entry in all_files(manifest):
                check_file(self.folder, entry)
        except IntegrityError:
            return None  # the damaged part is made again; see run_parts
        if not self.dry:
            sweep(self.folder, manifest)
        seconds = time.monotonic() - self.started
        return StageResult(manifest, 0, len(manifest.parts), seconds, 0, manifest.num_rows_in)

    def run_parts(
        self, work: Callable[[PartTask], PartEntry], tasks: Iterable[PartTask], *, passes_rows: bool = True
    ) -> list[PartEntry]:
        """Entries in the order of the tasks; finished ones are taken over, the others worked on.

        An iterator's tasks are made while the first of them are worked on; what a sequence has finished is known
        before. `passes_rows`: whether rows pass through the stage's own functions, or parts are only cut to verdicts.
        """
        entries: dict[int, PartEntry] = {}
        todo: list[int] = []
        unfinished: Iterable[PartTask] = self._unfinished(tasks, entries, todo)
        if isinstance(tasks, Sequence):
            unfinished = list(unfinished)
        if self.dry:
            raise PartsToRun(len(todo), len(entries))
        check_free_disk(self.config)
        num_rows_done = sum(entry.num_rows_in for entry in entries.values())
        self._report(len(entries), len(entries) + len(todo), num_rows_done)
        results = executors.run_tasks(
            work, unfinished, num_workers=self.config.engine.workers, label=part_label
        )
        num_rows_run = num_parts_run = 0
        for done, entry in results:
            entries[todo[done]] = entry
            num_parts_run += 1
            num_rows_run += entry.num_rows_in
            num_parts = len(entries) + len(todo) - num_parts_run
            self._report(len(entries), num_parts, num_rows_done + num_rows_run)
        self._count(entries, num_parts_run, num_rows_run if passes_rows else None)
        return [entry for _, entry in sorted(entries.items())]

    def finish(
        self, key: str, parts: Sequence[PartEntry], *, inputs: dict[str, str], **extra: Any
    ) -> StageResult:
        """Check the limits, write the manifest, remove what it does not name.

        `extra` are further fields of the manifest (files, counts). Raises LimitError.
        """
        manifest = Manifest(
            stage=self.name,
            stage_version=self.version,
            key=key,
            inputs=inputs,
            config=self.sections,
            versions=self.versions,
            parts=tuple(parts),
            num_rows_in=sum(part.num_rows_in for part in parts),
            num_rows_out=sum(part.num_rows_out for part in parts),
            num_pieces_cut=sum(part.num_pieces_cut for part in parts),
            drops=sum_counts(part.drops for part in parts),
            counts=sum_counts(part.counts for part in parts) | extra.pop("counts", {}),
            **extra,
        )
        check_limits(manifest, self.config)
        for folder in sorted({(self.folder / file.path).parent for file in all_files(manifest)}):
            sync_folder(folder)
        write_manifest(self.folder, manifest)
        seconds = time.monotonic() - self.started
        self._write_timing(seconds)
        sweep(self.folder, manifest)
        return StageResult(
            manifest,
            self.num_parts_run,
            self.num_parts_reused,
            seconds,
            self.num_rows_run,
            self.num_rows_reused,
        )

    def unpublish(self) -> None:
        """Before a file is rewritten under its old name: from here to `finish` the folder does not exist."""
        if (self.folder / MANIFEST_NAME).exists():
            os.replace(self.folder / MANIFEST_NAME, self.folder / REPLACED_MANIFEST_NAME)
            sync_folder(self.folder)

    def _unfinished(
        self, tasks: Iterable[PartTask], entries: dict[int, PartEntry], todo: list[int]
    ) -> Iterator[PartTask]:
        """The tasks that are to be worked on, their numbers put into `todo`; the others' entries into `entries`."""
        known = self._known_entries()
        for index, task in enumerate(tasks):
            entry = known.get(task.key[:32]) or read_sidecar(self.folder, task.key)
            if entry is not None and is_whole(self.folder, entry):
                # The same part may begin at another record of its file now.
                entries[index] = entry.model_copy(update={"label": task.label})
            else:
                todo.append(index)
                yield task

    def _count(self, entries: dict[int, PartEntry], num_parts_run: int, num_rows_run: int | None) -> None:
        self.num_parts_run += num_parts_run
        self.num_parts_reused += len(entries) - num_parts_run
        if num_rows_run is not None:
            self.num_rows_run += num_rows_run
            self.num_rows_reused += sum(entry.num_rows_in for entry in entries.values()) - num_rows_run

    def parts_made_alike(self) -> dict[str, PartEntry]:
        """By label the parts of the last run, where code, settings and libraries were those of this one."""
        manifest = self._manifest_before()
        alike = manifest is not None and (manifest.stage_version, manifest.config, manifest.versions) == (
            self.version,
            self.sections,
            self.versions,
        )
        return {part.label: part for part in manifest.parts} if manifest is not None and alike else {}

    def _manifest_before(self) -> Manifest | None:
        return read_manifest(self.folder) or read_manifest(self.folder, REPLACED_MANIFEST_NAME)

    def _known_entries(self) -> dict[str, PartEntry]:
        manifest = self._manifest_before()
        if manifest is None:
            return {}
        features = [file for file in manifest.files if file.path.startswith("features/")]
        known = {Path(file.path).stem: feature_entry(Path(file.path).stem, "", file) for file in features}
        return known | {part.key[:32]: part for part in manifest.parts}

    def _report(self, num_parts_done: int, num_parts: int, num_rows_done: int) -> None:
        if self.progress is not None:
            self.progress(StageProgress(self.name, num_parts_done, num_parts, num_rows_done))

    def _write_timing(self, seconds: float) -> None:
        # Beside the manifest, not in it: the manifest is byte-equal for equal work.
        timing = {
            "seconds": round(seconds, 3),
            "workers": self.config.engine.workers or os.cpu_count(),
            "host": socket.gethostname(),
            "parts_run": self.num_parts_run,
            "parts_reused": self.num_parts_reused,
            "rows_run": self.num_rows_run,
            "rows_reused": self.num_rows_reused,
        }
        write_json(self.folder / TIMING_NAME, timing)


def part_label(task: PartTask) -> str:
    """The name of a part in messages."""
    return f"{task.stage} {task.label}"


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Totals by name, sorted by name."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def stage_before(run: StageRun) -> tuple[Path, Manifest]:
    """Folder and manifest of what a stage reads. Raises InputError naming the stage to run first."""
    names = list(STAGE_FOLDERS)
    before = names[names.index(run.name) - 1]
    folder = run.config.run_root / STAGE_FOLDERS[before]
    return folder, check_manifest(folder, stage=before)


def inputs_from(before: Manifest) -> dict[str, str]:
    """What a manifest says of the folder it was made from."""
    return {STAGE_FOLDERS[before.stage]: before.key}
