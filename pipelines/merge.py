"""Stage 1: raw records of many formats -> Conversations, each with its file, number, hash and ids.

A record that can't be read becomes a Conversation without messages, with its first 64 KiB in meta["raw"], and a
Drop that says why; a record of several chats becomes several rows: records + further chats = rows out + drops.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from pipelines.containers import plan_file, read_range
from pipelines.downloads import RemoteFile, download, find_remote_files, is_url
from pipelines.identity import FILE_NAME, write_identity
from pipelines.part_ranges import PartRange
from pipelines.records import read_rows
from pipelines.sources import find_files
from schemas.conversation import Conversation, Drop, blake2b_128, row_id
from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig, SourceConfig

STAGE_VERSION = 3


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
    parts: list[PartRange] = []
    files, notes = _files(source, base_folder, spool_folder)
    for label, file in files:
        spool_path = spool_folder / f"{source.name}-{blake2b_128(os.fsencode(label))}"
        found = plan_file(
            _local(file, spool_path, source),
            source=source,
            file=label,
            spool_path=spool_path,
            config=config.merge,
            notes=notes,
        )
        if not found:
            notes.append(f"source {source.name}: {label} holds no records")
        parts += found
    if not parts:
        raise InputError(f"source {source.name} has no records: {len(files)} empty files at {source.path}")
    return SourcePlan(parts, notes)


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


def _local(file: Path | RemoteFile, spool_path: Path, source: SourceConfig) -> Path:
    if isinstance(file, Path):
        return file
    copy = Path(f"{spool_path}.download")
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
    for number, raw_record in enumerate(read_range(part)):
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
