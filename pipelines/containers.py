"""Files of records cut into parts: planned without parsing, read back as the raw bytes of each record.

JSON arrays, JSON Lines, objects one after another (pretty-printed too) and Parquet, told by content, never by
name. Parquet has no raw records: a part is a run of rows, each read as sorted JSON.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from pipelines import parquet_rows
from pipelines.json_grammar import object_end
from pipelines.json_lines import LineScanner, Segment
from pipelines.json_scan import ValueScanner
from pipelines.part_ranges import Break, Container, Draft, PartRange, segment_hash, segment_identity
from pipelines.unpack import unpack
from schemas.conversation import blake2b_128
from schemas.errors import InputError
from schemas.pipeline_config import MergeConfig

_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 1 << 20
_UNLIMITED = 1 << 62


class RawRecord(NamedTuple):
    """One record as it stands in its file, or (`reason` set) the first 64 KiB of what could not be read."""

    raw: bytes
    hash: str
    reason: str = ""
    detail: str = ""


RAW_HEAD_BYTES = 64 << 10


def plan_file(
    path: Path, *, source_name: str, file: str, spool_path: Path, config: MergeConfig
) -> list[PartRange]:
    """The parts of one file, which is unpacked into `spool_path` where it is not plain. Empty: no records.

    Raises InputError for a file that can't be read, is of a foreign kind or unpacks to too much.
    """
    plain = unpack(path, spool_path, max_ratio=config.max_decompressed_ratio)
    with plain.path.open("rb") as handle:
        container = _container(handle)
        draft = Draft(source_name, file, str(plain.path), container, config.part_bytes)
        if container == "parquet":
            return _plan_parquet(draft, handle, config)
        _plan_json(draft, handle, plain.damage, config)
    return draft.finish()


def _plan_json(draft: Draft, handle: BinaryIO, damage: str, config: MergeConfig) -> None:
    start, size = _text_start(handle), handle.seek(0, 2)
    scanner = _scanner(handle, start, size, draft.container, 0, config.max_record_bytes)
    says_so = False
    for segment in scanner:
        draft.add(segment, scanner.depth, handle)
        says_so = segment.reason == "truncated_file" or (segment.raw is None and segment.end == size)
    # One drop says that the file is cut off: the last record's break, or one of no bytes.
    if (damage or scanner.depth) and not says_so:
        detail = damage or f"the file ends at byte {size} inside an array"
        draft.add(Segment(size, size, None, "truncated_file", detail), scanner.depth, handle)


def _plan_parquet(draft: Draft, handle: BinaryIO, config: MergeConfig) -> list[PartRange]:
    path, size = Path(draft.path), handle.seek(0, 2)
    try:
        ranges = parquet_rows.plan_row_ranges(
            path, part_bytes=config.part_bytes, max_ratio=config.max_decompressed_ratio
        )
    except (OSError, pa.ArrowException) as error:
        detail = f"not a whole Parquet file of {size} bytes: {error}"
        draft.container = "values"  # of which the break is all
        draft.add(Segment(0, size, None, "invalid_parquet", detail), 0, handle)
        return draft.finish()
    return [
        PartRange(
            draft.source_name, draft.file, draft.path, "parquet", start, end, start, end - start, digest
        )
        for start, end, digest in ranges
    ]


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


def _container(handle: BinaryIO) -> Container:
    """By the first byte that is no space; objects are lines where the first line is one, or a line follows."""
    if _read(handle, 0, len(parquet_rows.MAGIC)) == parquet_rows.MAGIC:
        return "parquet"
    head = _read(handle, _text_start(handle), _HEAD_BYTES).lstrip(b" \t\r\n")
    if head.startswith(b"["):
        return "values"
    first, newline, rest = head.partition(b"\n")
    if not first.startswith(b"{"):
        return "lines"
    end = object_end(first)
    if end is not None:
        return "values" if first[end:].strip() else "lines"
    return "values" if newline and not rest.startswith(b'{"') else "lines"


def _text_start(handle: BinaryIO) -> int:
    return len(_BOM) if _read(handle, 0, len(_BOM)) == _BOM else 0


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
    head = _read(handle, segment.start, min(RAW_HEAD_BYTES, segment.end - segment.start))
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
            yield RawRecord(
                b"", blake2b_128(b"row %d" % row), "invalid_parquet", f"the row can't be read: {raw}"
            )


def _read(handle: BinaryIO, start: int, num_bytes: int) -> bytes:
    handle.seek(start)
    return handle.read(num_bytes)


def _changed(part: PartRange) -> InputError:
    return InputError(
        f"source {part.source_name}: {part.file} changed while it was being read; run again once it is written"
    )
