"""Parquet files of records: rows cut into parts by the sizes in the footer, each row read as sorted JSON.

What a file unpacks to is known from its footer before anything is read.
"""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.unpack import MIN_BUDGET_BYTES
from schemas.conversation import blake2b_128
from schemas.errors import InputError

MAGIC = b"PAR1"
_BATCH_ROWS = 256  # repeated values can make a batch far larger than its bytes in the file


class RowRange(NamedTuple):
    """Rows [start, end) of a file and the digest of the bytes that hold them."""

    start: int
    end: int
    digest: str


def plan_row_ranges(path: Path, *, part_bytes: int, max_ratio: int) -> list[RowRange]:
    """Ranges of about `part_bytes` uncompressed bytes. Row groups are joined or cut evenly, rows never.

    Raises InputError for a bomb, OSError or pa.ArrowException for a file that is not whole.
    """
    metadata = pq.read_metadata(path)
    _refuse_bomb(path, sum(group.total_byte_size for group in _groups(metadata)), max_ratio)
    borders = list(_borders(metadata, part_bytes))
    digests: dict[tuple[int, ...], str] = {}
    return [
        RowRange(start, end, _range_digest(path, metadata, start, end, digests))
        for start, end in itertools.pairwise(borders)
    ]


def range_digest(path: Path, start: int, end: int) -> str:
    """The digest of rows [start, end) as planned."""
    return _range_digest(path, pq.read_metadata(path), start, end, {})


def read_row_range(path: Path, start: int, end: int) -> Iterator[bytes | Exception]:
    """Rows [start, end) as JSON with sorted keys; the error in place of each row that can't be."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        groups, first = _groups_of_rows(file.metadata, start, end)
        for group in groups:
            num_rows = file.metadata.row_group(group).num_rows
            yield from _read_group(file, group, max(0, start - first), min(num_rows, end - first))
            first += num_rows


def _read_group(file: pq.ParquetFile, group: int, start: int, end: int) -> Iterator[bytes | Exception]:
    row = 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
            skipped = max(0, start - row)
            yield from _json_rows(batch.slice(skipped, max(0, end - row - skipped)))
            row += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        yield from (error for _ in range(max(row, start), end))


def _json_rows(batch: pa.RecordBatch) -> Iterator[bytes | Exception]:
    try:
        rows = batch.to_pylist()
    except ValueError:  # a text that is no UTF-8: row by row
        for number in range(batch.num_rows):
            try:
                yield row_json(batch.slice(number, 1).to_pylist()[0])
            except ValueError as error:
                yield error
        return
    yield from map(row_json, rows)


def row_json(record: dict[str, Any]) -> bytes:
    """A row as JSON with sorted keys."""
    return orjson.dumps(record, default=plain_value, option=orjson.OPT_SORT_KEYS)


def _groups(metadata: Any) -> list[Any]:
    return [metadata.row_group(number) for number in range(metadata.num_row_groups)]


def _borders(metadata: Any, part_bytes: int) -> Iterator[int]:
    """Row numbers where ranges begin, and the number of rows."""
    yield 0
    first = num_rows = num_bytes = 0
    for group in _groups(metadata):
        num_rows, num_bytes = num_rows + group.num_rows, num_bytes + group.total_byte_size
        if num_bytes >= part_bytes and num_rows:
            num_cuts = min(num_rows, num_bytes // part_bytes)
            yield from (first + num_rows * cut // num_cuts for cut in range(1, num_cuts + 1))
            first, num_rows, num_bytes = first + num_rows, 0, 0
    if num_rows:
        yield first + num_rows


def _refuse_bomb(path: Path, num_bytes: int, max_ratio: int) -> None:
    budget = max(MIN_BUDGET_BYTES, max_ratio * path.stat().st_size)
    if num_bytes > budget:
        raise InputError(
            f"{path} ({path.stat().st_size} bytes) unpacks to {num_bytes} bytes, allowed are {budget}: a bomb? "
            "If it is not, raise merge.max_decompressed_ratio"
        )


def _range_digest(path: Path, metadata: Any, start: int, end: int, known: dict[tuple[int, ...], str]) -> str:
    groups, first = _groups_of_rows(metadata, start, end)
    key = tuple(groups)
    if key not in known:
        known[key] = _groups_digest(path, metadata, groups)
    return blake2b_128(known[key].encode(), str(start - first).encode(), str(end - first).encode())


def _groups_digest(path: Path, metadata: Any, groups: list[int]) -> str:
    digest = hashlib.blake2b(metadata.schema.to_arrow_schema().to_string().encode(), digest_size=16)
    with path.open("rb") as file:
        for group in (metadata.row_group(number) for number in groups):
            for column in (group.column(number) for number in range(group.num_columns)):
                file.seek(
                    min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
                )
                digest.update(file.read(column.total_compressed_size))
    return digest.hexdigest()


def _groups_of_rows(metadata: Any, start: int, end: int) -> tuple[list[int], int]:
    """Row groups that hold any of the rows, and the number of the first one's first row."""
    numbers: list[int] = []
    first = row = 0
    for number in range(metadata.num_row_groups):
        next_row = row + metadata.row_group(number).num_rows
        if row < end and next_row > start:
            first = first if numbers else row
            numbers.append(number)
        row = next_row
    return numbers, first


def plain_value(value: Any) -> Any:
    """What JSON has no word for: bytes as text, anything else (decimals, durations) as Python writes it."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
