"""Stages 1-3: raw records become rows, rows become rows. One part at a time, each by itself."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from pipelines.kept_downloads import KeptDownloads, remove_copies
from pipelines.part_ranges import PartRange
from pipelines.parts import PartTask, StageResult, StageRun, inputs_from, stage_before
from pipelines.storage import json_digest, read_manifest
from pipelines.work import merge_part, row_ids, step_part
from schemas.run import DOWNLOADS_FOLDER, SPOOL_FOLDER, PartEntry


def run_merge(run: StageRun, module: ModuleType) -> StageResult:
    """Sources -> 01_merged."""
    folder = run.config.run_root / DOWNLOADS_FOLDER
    kept = KeptDownloads(folder, read_only=run.dry) if run.config.engine.keep_downloads else None
    result = _merge(run, module, kept)
    if kept is not None:
        kept.sweep()
    elif not run.dry:
        remove_copies(folder)
    return result


def _merge(run: StageRun, module: ModuleType, kept: KeptDownloads | None) -> StageResult:
    config = run.config
    # A dry run writes nothing into the run root.
    spool = Path(tempfile.mkdtemp()) if run.dry else config.run_root / SPOOL_FOLDER
    try:
        sources = sorted(config.sources, key=lambda source: source.name)
        coming = module.iter_parts(sources, config=config, spool_folder=spool, kept=kept)
        parts = list[PartRange]()
        tasks: Iterable[PartTask] = (_merge_task(run, part, {}) for part in _noted(coming, parts))
        entries = None
        if run.dry or read_manifest(run.folder) is not None:
            tasks = list(tasks)
        else:  # nothing that could be unchanged: parts are worked on while the next are being found
            entries = run.run_parts(merge_part, tasks)
        inputs = _merge_inputs(parts)
        key = run.key(inputs, [source.model_dump(exclude={"path"}) for source in sources])
        if entries is None:
            if (result := run.skip(key)) is not None:
                return result
            entries = run.run_parts(merge_part, tasks)
        return run.finish(key, _renumber(run, module, parts, entries), inputs=inputs)
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def _noted(coming: Iterable[PartRange], parts: list[PartRange]) -> Iterator[PartRange]:
    for part in coming:
        parts.append(part)
        yield part


def _merge_inputs(parts: Sequence[PartRange]) -> dict[str, str]:
    digests: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        digests[f"{part.source_name}/{part.file}"].append(part.digest)
    return {file: json_digest(digest) for file, digest in digests.items()}


def _merge_task(run: StageRun, part: PartRange, offsets: dict[str, int]) -> PartTask:
    source = next(s for s in run.config.sources if s.name == part.source_name)
    # Not where the part begins: records added before it leave it as it is.
    identity = [part.file, part.num_records, part.digest, sorted(offsets.items())]
    key = run.key(source.model_dump(exclude={"path"}), identity)
    label = f"{part.source_name}/{part.file}:{part.first_record}"
    return run.task(key, label, (part, offsets))


def _renumber(
    run: StageRun, module: ModuleType, parts: Sequence[PartRange], entries: list[PartEntry]
) -> list[PartEntry]:
    """Equal records in several parts of one file: the later parts count on where the earlier ended."""
    files: dict[str, list[int]] = defaultdict(list)
    for number, part in enumerate(parts):
        files[f"{part.source_name}/{part.file}"].append(number)
    todo: dict[int, dict[str, int]] = {}
    for numbers in files.values():
        if len(numbers) > 1:
            ids = [_ids_of(run, entries[number]) for number in numbers]
            offsets = module.resolve_ordinals(ids)
            todo |= {n: offset for n, offset in zip(numbers, offsets, strict=True) if offset}
    again = run.run_parts(merge_part, [_merge_task(run, parts[n], todo[n]) for n in todo])
    renumbered = dict(zip(todo, again, strict=True))
    return [renumbered.get(number, entry) for number, entry in enumerate(entries)]


def _ids_of(run: StageRun, entry: PartEntry) -> list[str]:
    files = [*entry.kept, *([entry.dropped] if entry.dropped else [])]
    return [row for file in files for row in row_ids(run.folder, file)]


def run_row_step(run: StageRun, module: ModuleType) -> StageResult:
    """One folder -> the next, row by row."""
    folder, before = stage_before(run)
    tasks = [
        run.task(run.key(part.kept[0].sha256), part.label, (folder, part.kept[0])) for part in before.parts
    ]
    key = run.key([[task.key, task.label] for task in tasks])
    if (result := run.skip(key)) is not None:
        return result
    entries = run.run_parts(step_part, tasks)
    return run.finish(key, entries, inputs=inputs_from(before))
