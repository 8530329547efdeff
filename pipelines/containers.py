"""Files of records cut into parts: planned without parsing, read back as the raw bytes of each record.

JSON arrays, JSON Lines, objects one after another (pretty-printed too) and Parquet, told by content; everything
else (see layouts) is written as JSON Lines first. Parquet has no raw records: a part is a run of rows, each read as
sorted JSON.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from pipelines import archives, parquet_rows
from pipelines.json_lines import LineScanner, Segment
from pipelines.json_scan import ValueScanner
from pipelines.layouts import Lines, find_layout, read_at, spool_lines, text_start
from pipelines.part_ranges import Break, Container, Draft, PartRange, segment_hash, segment_identity
from pipelines.sources import has_known_suffix
from pipelines.unpack import MIN_BUDGET_BYTES, Plain, Spool, unpack
from schemas.conversation import blake2b_128
from schemas.errors import InputError
from schemas.pipeline_config import MergeConfig
from schemas.source_config import SourceConfig

_UNLIMITED = 1 << 62


class RawRecord(NamedTuple):
    """One record as it stands in its file, or (`reason` set) the first 64 KiB of what could not be read."""

    raw: bytes
    hash: str
    reason: str = ""
    detail: str = ""


RAW_HEAD_BYTES = 64 << 10


def plan_file(
    path: Path, *, source: SourceConfig, file: str, spool_path: Path, config: MergeConfig, notes: list[str]
) -> list[PartRange]:
    """The parts of one file; see iter_parts."""
    return list(iter_parts(path, source=source, file=file, spool_path=spool_path, config=config, notes=notes))


def iter_parts(
    path: Path, *, source: SourceConfig, file: str, spool_path: Path, config: MergeConfig, notes: list[str]
) -> Iterator[PartRange]:
    """The parts of one file, each as soon as its end is found. None: no records.

    A file that is not plain is unpacked into `spool_path` first. Of an archive, the parts of all its files, each under its own name; what is ignored goes to `notes`.
    Raises InputError for a file that can't be read, is of a foreign kind or unpacks to too much.
    """
    ratio = config.max_decompressed_ratio
    plain = unpack(path, spool_path, max_ratio=ratio, encoding=source.encoding)
    spool = Spool(path, max(MIN_BUDGET_BYTES, ratio * path.stat().st_size))
    with plain.path.open("rb") as handle:
        if not archives.is_zip(handle):
            yield from _plan_plain(
                plain, spool, source=source, file=file, spool_path=spool_path, config=config
            )
            return
        draft = Draft(source.name, file, str(plain.path), "values", config.part_bytes)
        try:
            found, ignored = archives.members(
                plain.path, spool_path, max_ratio=ratio, is_wanted=lambda name: has_known_suffix(name, source)
            )
        except archives.BadArchive as error:
            yield from _one_break(draft, handle, "invalid_zip", f"not a whole zip archive: {error}")
            return
    if ignored:
        notes.append(f"source {source.name}: ignored {len(ignored)} files in {file}, such as {ignored[0]}")
    for number, member in enumerate(found):
        name, member_spool = f"{file}/{member.name}", Path(f"{spool_path}.{number}.")
        yield from _plan_member(member, source=source, file=name, spool_path=member_spool, config=config)


def plan_lines(lines: Lines, *, source: SourceConfig, file: str, config: MergeConfig) -> Iterator[PartRange]:
    """The parts of a spool of JSON Lines that stands for a file."""
    with lines.path.open("rb") as handle:
        draft = Draft(source.name, file, str(lines.path), "lines", config.part_bytes)
        yield from _plan_json(draft, handle, lines, config)


def _plan_member(
    member: archives.Member, *, source: SourceConfig, file: str, spool_path: Path, config: MergeConfig
) -> Iterator[PartRange]:
    ratio, path = config.max_decompressed_ratio, member.plain.path
    plain = unpack(path, spool_path, max_ratio=ratio, encoding=source.encoding)
    plain = Plain(plain.path, member.plain.damage or plain.damage)
    with plain.path.open("rb") as handle:
        if archives.is_zip(handle):
            raise InputError(f"{file} is an archive inside an archive: unpack it yourself")
    spool = Spool(path, max(MIN_BUDGET_BYTES, ratio * path.stat().st_size))
    return _plan_plain(plain, spool, source=source, file=file, spool_path=spool_path, config=config)


def _plan_plain(
    plain: Plain, spool: Spool, *, source: SourceConfig, file: str, spool_path: Path, config: MergeConfig
) -> Iterator[PartRange]:
    with plain.path.open("rb") as handle:
        layout = find_layout(handle, file, source)
    lines = Lines(plain.path, plain.damage, {})
    container: Container = "lines"
    if layout in ("values", "lines", "parquet"):
        container = layout
    else:
        target = Path(f"{spool_path}.jsonl")
        found = spool_lines(layout, plain.path, spool, target, source, config.max_record_bytes)
        lines = found._replace(damage=plain.damage or found.damage)
    with lines.path.open("rb") as handle:
        draft = Draft(source.name, file, str(lines.path), container, config.part_bytes)
        if container == "parquet":
            yield from _plan_parquet(draft, handle, config)
        else:
            yield from _plan_json(draft, handle, lines, config)


def _plan_json(draft: Draft, handle: BinaryIO, lines: Lines, config: MergeConfig) -> Iterator[PartRange]:
    start, size = text_start(handle), handle.seek(0, 2)
    scanner = _scanner(handle, start, size, draft.container, 0, config.max_record_bytes)
    says_so = False
    for segment in scanner:
        if (why := lines.broken.get(segment.start)) is not None:
            segment = Segment(segment.start, segment.end, None, *why)
        draft.add(segment, scanner.depth, handle)
        yield from draft.full()
        says_so = segment.reason == "truncated_file" or (segment.raw is None and segment.end == size)
    # One drop says that the file is cut off: the last record's break, or one of no bytes.
    if (lines.damage or scanner.depth) and not says_so:
        detail = lines.damage or f"the file ends at byte {size} inside an array"
        draft.add(Segment(size, size, None, "truncated_file", detail), scanner.depth, handle)
    yield from draft.finish()


def _plan_parquet(draft: Draft, handle: BinaryIO, config: MergeConfig) -> Iterator[PartRange]:
    path, size = Path(draft.path), handle.seek(0, 2)
    try:
        ranges = parquet_rows.plan_row_ranges(
            path, part_bytes=config.part_bytes, max_ratio=config.max_decompressed_ratio
        )
    except (OSError, pa.ArrowException) as error:
        detail = f"not a whole Parquet file of {size} bytes: {error}"
        yield from _one_break(draft, handle, "invalid_parquet", detail)
        return
    for start, end, digest in ranges:
        yield PartRange(
            draft.source_name, draft.file, draft.path, "parquet", start, end, start, end - start, digest
        )


def _one_break(draft: Draft, handle: BinaryIO, reason: str, detail: str) -> Iterator[PartRange]:
    """A file that is one record, which can't be read."""
    draft.container = "values"  # of which the break is all
    draft.add(Segment(0, handle.seek(0, 2), None, reason, detail), 0, handle)
    yield from draft.finish()


def read_range(part: PartRange) -> Iterator[RawRecord]:
    """The records of a part in order, as planned. Raises InputError when the file has changed since."""
    if part.container == "parquet":
        yield from _read_parquet(part)
        return
    digest = hashlib.blake2b(digest_size=16)
    with _open(part) as handle:
        for segment in _planned_segments(part, handle):
            record = _raw_record(segment, handle)
            digest.update(segment_identity(segment, record.hash))
            yield record
    if digest.hexdigest() != part.digest:
        raise _changed(part)


def _scanner(
    handle: BinaryIO, start: int, end: int, container: Container, depth: int, max_record_bytes: int | None
) -> LineScanner | ValueScanner:
    """`max_record_bytes` is None for bytes that were found to be intact: nothing is judged in them again."""
    limit, judges = max_record_bytes or _UNLIMITED, max_record_bytes is not None
    if container == "lines":
        return LineScanner(handle, start, end, max_record_bytes=limit, ends_file=judges)
    return ValueScanner(handle, start, end, depth=depth, max_record_bytes=limit)


def _planned_segments(part: PartRange, handle: BinaryIO) -> Iterator[Segment]:
    at, depth = part.start, part.depth
    for item in (*part.breaks, Break(part.end, part.end, "", "")):
        scanner = _scanner(handle, at, item.start, part.container, depth, None)
        for segment in scanner:
            if segment.raw is None:
                raise _changed(part)
            yield segment
        if item.reason:
            yield Segment(item.start, item.end, None, item.reason, item.detail)
        at, depth = item.end, scanner.depth


def _open(part: PartRange) -> BinaryIO:
    try:
        return Path(part.path).open("rb")
    except FileNotFoundError:
        raise _changed(part) from None


def _raw_record(segment: Segment, handle: BinaryIO) -> RawRecord:
    if segment.raw is not None:
        return RawRecord(segment.raw, blake2b_128(segment.raw))
    head = read_at(handle, segment.start, min(RAW_HEAD_BYTES, segment.end - segment.start))
    return RawRecord(head, segment_hash(segment, handle), segment.reason, segment.detail)


def _read_parquet(part: PartRange) -> Iterator[RawRecord]:
    path = Path(part.path)
    try:
        digest = parquet_rows.range_digest(path, part.start, part.end)
    except (OSError, pa.ArrowException) as error:
        raise _changed(part) from error
    if digest != part.digest:
        raise _changed(part)
    for row, raw in enumerate(parquet_rows.read_row_range(path, part.start, part.end)):
        if isinstance(raw, bytes):
            yield RawRecord(raw, blake2b_128(raw))
        else:
            # Rows of one page are lost together: the number in the part tells them apart.
            reason = "invalid_utf8" if isinstance(raw, UnicodeDecodeError) else "invalid_parquet"
            yield RawRecord(b"", blake2b_128(b"row %d" % row), reason, f"the row can't be read: {raw}")


def _changed(part: PartRange) -> InputError:
    return InputError(
        f"source {part.source_name}: {part.file} changed while it was being read; run again once it is written"
    )
