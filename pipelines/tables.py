"""CSV and Arrow -> one JSON line a row, in bounded memory; a row that can't be read is told by a reason in its place."""

import csv
import json
from codecs import BOM_UTF8
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import orjson
import pyarrow as pa

from pipelines.arrow_batches import stream_of, whole_messages
from pipelines.encodings import BrokenText
from pipelines.parquet_rows import row_json

_DELIMITERS = ",;\t|"
_BATCH_ROWS = 256
# A lost quote swallows lines up to the next one. Lines may be read again for it as often as this in all.
_REREAD_BYTES = 64 << 20


class BrokenRow(NamedTuple):
    """A row that can't be read, the first of its text, and why."""

    text: str
    reason: str
    detail: str


Line = bytes | BrokenRow


def csv_lines(file: BinaryIO, *, max_record_bytes: int, columns: Sequence[str] = ()) -> Iterator[Line]:
    """Rows by the names in the first one, or by `columns`. The first also shows the delimiter. Fields are texts."""
    csv.field_size_limit(max(csv.field_size_limit(), max_record_bytes))
    file.seek(len(BOM_UTF8) if file.read(len(BOM_UTF8)) == BOM_UTF8 else 0)
    feed = _Feed(file, max_record_bytes)
    names: list[str] | None = list(columns) or None
    is_first = True
    delimiter = _delimiter(feed, len(columns))
    reader = csv.reader(feed, delimiter=delimiter)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except (csv.Error, _TooLong) as error:
            reason = "record_too_large" if isinstance(error, _TooLong) else "invalid_csv"
            yield BrokenRow(feed.text(), reason, f"line {feed.first_line}: {error}")
            feed.forget()
            reader, is_first = csv.reader(feed, delimiter=delimiter), False
            continue
        if not row:
            feed.forget()
        elif names is None or (is_first and _different(row) == names):
            names = _different(row)
            feed.forget()
        elif len(row) != len(names):
            told = f"columns names {len(names)}" if columns else f"the first row names {len(names)}"
            detail = f"line {feed.first_line}: {len(row)} fields, {told}"
            yield BrokenRow(feed.text(), "invalid_csv", detail)
            feed.go_back()
        else:
            yield _json(dict(zip(names, row, strict=True)))
            feed.forget()
        is_first = is_first and not row


def arrow_lines(file: BinaryIO) -> Iterator[Line]:
    """Rows of an IPC file or stream, as Parquet rows are read. Raises InputError for a batch that is a bomb."""
    whole = whole_messages(file)
    try:
        with pa.ipc.open_stream(stream_of(file, whole)) as stream:
            for batch in stream:
                yield from _batch_lines(batch)
    except (OSError, MemoryError, OverflowError, pa.ArrowException) as error:
        raise BrokenText(f"the Arrow data can't be read further: {error}") from None
    if whole.damage:
        raise BrokenText(whole.damage)


def _batch_lines(batch: pa.RecordBatch) -> Iterator[Line]:
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        rows = batch.slice(start, _BATCH_ROWS)
        try:
            lines: list[Line] = [row_json(record) for record in _checked(rows)]
        except ValueError:
            lines = [_arrow_line(rows.slice(number, 1)) for number in range(rows.num_rows)]
        yield from lines


def _arrow_line(row: pa.RecordBatch) -> Line:
    try:
        return row_json(_checked(row)[0])
    except ValueError as error:
        reason = "invalid_utf8" if "UTF8" in str(error) else "invalid_arrow"
        return BrokenRow("", reason, f"the row can't be read: {error}"[:300])


def _checked(rows: pa.RecordBatch) -> list[Any]:
    """As Python values. Arrow does not look at offsets when it reads a file: wrong ones lead anywhere in memory."""
    rows.validate(full=True)
    return list(rows.to_pylist())


class _TooLong(Exception):
    """A row that is not to be held in memory."""


class _Feed:
    """Lines of a file for csv.reader, those of the row that is being read kept, so that it can go back."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._max_bytes = file, max_bytes
        self._waiting: deque[bytes] = deque()
        self._taken: list[bytes] = []
        self._num_bytes_taken = 0
        self._num_bytes_left = _REREAD_BYTES
        self.first_line = 1

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else self._file.readline(self._max_bytes + 1)
        if not line:
            raise StopIteration
        if self._num_bytes_taken + len(line) > self._max_bytes:
            self._taken.append(line[: 1 << 16])
            while line and not line.endswith(b"\n"):
                line = self._file.readline(1 << 20)
            raise _TooLong(f"a row of more than {self._max_bytes} bytes, merge.max_record_bytes")
        self._taken.append(line)
        self._num_bytes_taken += len(line)
        return _text(line)

    def text(self) -> str:
        """The beginning of what was taken for the row."""
        return "".join(_text(line) for line in self._taken[:100])[: 1 << 16]

    def forget(self) -> None:
        """The row is done with."""
        self.first_line += len(self._taken)
        self._taken, self._num_bytes_taken = [], 0

    def go_back(self) -> None:
        """The row's first line is done with; the others may be rows of their own."""
        others = self._taken[1:]
        if sum(map(len, others)) <= self._num_bytes_left:
            self._num_bytes_left -= sum(map(len, others))
            self._waiting.extendleft(reversed(others))
            self._taken = self._taken[:1]
        self.forget()

    def peek(self) -> str:
        """The first lines, which stay."""
        head = self._file.read(1 << 16)
        self._file.seek(-len(head), 1)
        return _text(head)


def _delimiter(feed: _Feed, num_columns: int) -> str:
    """The one that cuts the first row into so many columns, where that is known and one does, or the most frequent."""
    lines = [f"{line}\n" for line in feed.peek().split("\n")]
    counts = Counter(char for char in lines[0] if char in _DELIMITERS)
    by_count = sorted(_DELIMITERS, key=lambda char: -counts[char])
    if not num_columns:
        return by_count[0]
    return next((char for char in by_count if _num_fields(lines, char) == num_columns), by_count[0])


def _num_fields(lines: Sequence[str], delimiter: str) -> int:
    """Of the first row; 0 where it is none."""
    try:
        return len(next((row for row in csv.reader(lines, delimiter=delimiter) if row), []))
    except csv.Error:
        return 0


def _different(names: list[str]) -> list[str]:
    """Names of columns; one that is there twice gets its number."""
    seen: Counter[str] = Counter()
    different = []
    for name in names:
        name = name.strip().removeprefix("\ufeff")
        seen[name] += 1
        different.append(name if seen[name] == 1 else f"{name}.{seen[name]}")
    return different


def _text(line: bytes) -> str:
    for errors in ("strict", "surrogatepass"):
        try:
            return line.decode("utf-8", errors)
        except UnicodeDecodeError:
            continue
    return line.decode("utf-8", "surrogateescape")


def _json(record: dict[str, str]) -> bytes:
    try:
        return orjson.dumps(record)
    except orjson.JSONEncodeError:  # lone surrogates, which the parser repairs and counts
        return json.dumps(record).encode()
