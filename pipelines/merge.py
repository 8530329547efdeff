"""Stage 1: raw records of many formats -> Conversations, each with its file, number, hash and ids.

A record that can't be read becomes a Conversation without messages, with its first 64 KiB in meta["raw"], and a
Drop that says why; a record of several chats becomes several rows: records + further chats = rows out + drops.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from pipelines import containers, executors
from pipelines.downloads import RemoteFile, download, find_remote_files, is_url
from pipelines.identity import FILE_NAME, write_identity
from pipelines.kept_downloads import KeptDownloads
from pipelines.message_trees import with_trees
from pipelines.part_ranges import PartRange
from pipelines.records import read_rows
from pipelines.sources import find_files
from schemas.conversation import Conversation, Drop, blake2b_128, row_id
from schemas.errors import InputError
from schemas.pipeline_config import MergeConfig, PipelineConfig
from schemas.source_config import SourceConfig

STAGE_VERSION = 4


def versions(config: PipelineConfig) -> dict[str, str]:
    """What else shapes the rows: the parser decides which records are JSON."""
    return {"orjson": version("orjson")}


# Files to parts ---------------------------------------------------------------------------------------------


class SourcePlan(NamedTuple):
    """The parts of a source, and what a person should hear about its files."""

    parts: list[PartRange]
    notes: list[str]


def plan_parts(
    source: SourceConfig, *, config: PipelineConfig, spool_folder: Path, base_folder: Path = Path()
) -> list[PartRange]:
    """The parts of a source in the order of its files. Compressed files are unpacked into `spool_folder`.

    Raises InputError: nothing found, no record in any file, a file of a foreign kind, a bomb.
    """
    return plan_source(source, config=config, spool_folder=spool_folder, base_folder=base_folder).parts


def plan_source(
    source: SourceConfig, *, config: PipelineConfig, spool_folder: Path, base_folder: Path = Path()
) -> SourcePlan:
    """As plan_parts, with notes: files that were ignored and files without records."""
    (plan,) = plan_sources([source], config=config, spool_folder=spool_folder, base_folder=base_folder)
    return plan


def plan_sources(
    sources: Sequence[SourceConfig],
    *,
    config: PipelineConfig,
    spool_folder: Path,
    base_folder: Path = Path(),
    kept: KeptDownloads | None = None,
) -> list[SourcePlan]:
    """As plan_source for each. Where there is much to read, files are planned side by side by the workers.

    `kept`: where copies of files behind URLs may stay; without it they go to `spool_folder`.
    """
    listed = [_files(source, base_folder, spool_folder) for source in sources]
    tasks = [
        _file_task(source, label, file, spool_folder, config.merge, kept)
        for source, (files, _) in zip(sources, listed, strict=True)
        for label, file in files
    ]
    found = iter(_plan_files(tasks, config.engine.workers))
    plans = []
    for source, (files, notes) in zip(sources, listed, strict=True):
        of_files = [next(found) for _ in files]
        parts = [part for plan in of_files for part in plan.parts]
        if not parts:
            raise _no_records(source, len(files))
        plans.append(SourcePlan(parts, [*notes, *(note for plan in of_files for note in plan.notes)]))
    return plans


def iter_parts(
    sources: Sequence[SourceConfig],
    *,
    config: PipelineConfig,
    spool_folder: Path,
    kept: KeptDownloads | None = None,
) -> Iterator[PartRange]:
    """As plan_sources, the parts alone, rows of messages put into trees; those of one file while it is scanned."""
    if len(sources) == 1:
        files, _ = _files(sources[0], Path(), spool_folder)
        if len(files) == 1:
            task = _file_task(sources[0], *files[0], spool_folder, config.merge, kept)
            coming = _iter_file(task, [])
            if (first := next(coming, None)) is None:
                raise _no_records(sources[0], len(files))
            yield from with_trees(
                itertools.chain([first], coming), [first], sources[0], config.merge, spool_folder
            )
            return
    plans = plan_sources(sources, config=config, spool_folder=spool_folder, kept=kept)
    for source, plan in zip(sources, plans, strict=True):
        firsts = [next(of_file) for _, of_file in itertools.groupby(plan.parts, key=lambda part: part.file)]
        yield from with_trees(plan.parts, firsts, source, config.merge, spool_folder)


class _FileTask(NamedTuple):
    """What a worker needs to plan one file."""

    source: SourceConfig
    file: str
    path: Path
    spool_path: Path
    config: MergeConfig


# Workers take some seconds to start, in which one process reads this much.
_MIN_SHARED_BYTES = 32 << 20


def _plan_files(tasks: Sequence[_FileTask], num_workers: int) -> list[SourcePlan]:
    """In the order of the files, and so are errors: the first file that can't be read is the one that is told."""
    sizes = [_num_bytes(task.path) for task in tasks]
    largest_first = sorted(range(len(tasks)), key=lambda number: -sizes[number])
    if sum(sizes) < _MIN_SHARED_BYTES or len(tasks) == 1:
        largest_first, num_workers = list(range(len(tasks))), 1
    results: dict[int, SourcePlan | InputError] = {}
    in_turn = executors.run_tasks(
        _plan_or_refuse,
        [tasks[number] for number in largest_first],
        num_workers=num_workers,
        label=lambda task: f"merge {task.source.name}/{task.file}",
    )
    with closing(in_turn):
        for done, result in in_turn:
            results[largest_first[done]] = result
            _raise_first(results)
    return [plan for _, plan in sorted(results.items()) if isinstance(plan, SourcePlan)]


def _raise_first(results: Mapping[int, SourcePlan | InputError]) -> None:
    """An error is raised once all files before its own are done, so that it is always the same one."""
    for number in range(len(results)):
        if isinstance(result := results.get(number), InputError):
            raise result
        if result is None:
            return


def _num_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # it is told by who opens it


def _plan_or_refuse(task: _FileTask) -> SourcePlan | InputError:
    notes: list[str] = []
    try:
        parts = list(_iter_file(task, notes))
    except InputError as error:
        return error
    if not parts:
        notes.append(f"source {task.source.name}: {task.file} holds no records")
    return SourcePlan(parts, notes)


def _iter_file(task: _FileTask, notes: list[str]) -> Iterator[PartRange]:
    return containers.iter_parts(
        task.path,
        source=task.source,
        file=task.file,
        spool_path=task.spool_path,
        config=task.config,
        notes=notes,
    )


def _no_records(source: SourceConfig, num_files: int) -> InputError:
    return InputError(f"source {source.name} has no records: {num_files} empty files at {source.path}")


def _file_task(
    source: SourceConfig,
    label: str,
    file: Path | RemoteFile,
    spool_folder: Path,
    config: MergeConfig,
    kept: KeptDownloads | None,
) -> _FileTask:
    spool_path = spool_folder / f"{source.name}-{blake2b_128(os.fsencode(label))}"
    return _FileTask(source, label, _local(file, spool_path, source, kept), spool_path, config)


def _files(
    source: SourceConfig, base_folder: Path, spool_folder: Path
) -> tuple[Sequence[tuple[str, Path | RemoteFile]], list[str]]:
    if source.identity is not None:
        path = spool_folder / f"{source.name}-{FILE_NAME}"
        write_identity(source.identity, path)
        return [(FILE_NAME, path)], []
    if not is_url(source.path):
        return find_files(source, base_folder=base_folder)
    files, notes = find_remote_files(source)
    return [(file.label, file) for file in files], notes


def _local(
    file: Path | RemoteFile, spool_path: Path, source: SourceConfig, kept: KeptDownloads | None
) -> Path:
    if isinstance(file, Path):
        return file
    copy = Path(f"{spool_path}.download")
    if kept is not None:
        return kept.fetch(file, copy, source)
    download(file, copy, source)
    return copy


# Records to rows --------------------------------------------------------------------------------------------


def read_part(
    part: PartRange, config: PipelineConfig, *, ordinal_offsets: Mapping[str, int] | None = None
) -> Iterator[tuple[Conversation, Drop | None]]:
    """The rows of a part in order, each with None or the reason why it is dropped.

    `ordinal_offsets`: how often a row, named by the id of its first occurrence, stands in earlier parts of the
    same file (see resolve_ordinals). Raises InputError when the file has changed since it was planned.
    """
    source = next(source for source in config.sources if source.name == part.source_name)
    num_seen = Counter(ordinal_offsets or {})
    file = f"{source.name}/{part.file}"
    for number, raw_record in enumerate(containers.read_range(part)):
        rows = read_rows(raw_record, source, config.merge.max_record_bytes)
        for row, _ in rows:
            base_id = row_id(row.meta["content_id"], source.name, row.meta.get("id", ""), 0)
            row.row_id = nth_row_id(base_id, num_seen[base_id])
            num_seen[base_id] += 1
            row.source, row.record = file, number
        if rows[0][0].meta.get("group") is not None:
            for row, _ in rows:
                row.meta["group"] = rows[0][0].row_id
        yield from rows


def nth_row_id(base_id: str, ordinal: int) -> str:
    """The id of the record that has `ordinal` equals before it in its file; `base_id` is that of the first.

    It follows from the first one's alone, so that equals in several parts can be counted from row ids.
    """
    return base_id if ordinal == 0 else row_id(base_id, "", "", ordinal)


def resolve_ordinals(row_ids_per_part: Sequence[Sequence[str]]) -> list[dict[str, int]]:
    """`ordinal_offsets` for each part of one file, from the row ids that its parts have when read without any.

    Empty for a part none of whose rows stand in an earlier part: it is right as it is.
    """
    num_parts_with = Counter(row for ids in row_ids_per_part for row in set(ids))
    num_seen: Counter[str] = Counter()
    offsets: list[dict[str, int]] = []
    for ids in row_ids_per_part:
        present = set(ids)
        shared = {row for row in present if num_parts_with[row] > 1}
        counts = {row: _num_equals(row, present) for row in shared}
        repeats = {nth_row_id(row, n) for row, count in counts.items() for n in range(1, count)}
        first = shared - repeats
        offsets.append({row: num_seen[row] for row in sorted(first) if num_seen[row]})
        num_seen.update({row: counts[row] for row in first})
    return offsets


def _num_equals(base_id: str, present: set[str]) -> int:
    count = 1
    while nth_row_id(base_id, count) in present:
        count += 1
    return count
