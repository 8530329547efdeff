"""What a plain file is: told by its first bytes, and for what text alone can't tell (CSV, prose) by its name.

CSV, Arrow, objects of records and documents are written as JSON Lines into a spool, from where they are read as such.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeAlias

import orjson

from pipelines import parquet_rows
from pipelines.json_grammar import object_end
from pipelines.keyed import is_keyed, keyed_lines
from pipelines.sources import TEXT_SUFFIXES, unpacked_name
from pipelines.tables import BrokenRow, Line, arrow_lines, csv_lines
from pipelines.unpack import Spool
from schemas.source_config import SourceConfig

Layout: TypeAlias = Literal["parquet", "values", "lines", "arrow", "csv", "keyed", "text", "text_lines"]

_CSV_SUFFIXES = (".csv", ".tsv")
_HEAD_BYTES = 1 << 20
_JSON = re.compile(rb"[ \t\r\n]*(?:\{[ \t\r\n]*[\"}]|\[[ \t\r\n]*[\[{\]]|\Z)")


class Lines(NamedTuple):
    """A spool of JSON Lines. `broken`: first byte of a line that stands for what could not be read -> reason, detail."""

    path: Path
    damage: str
    broken: dict[int, tuple[str, str]]


def find_layout(handle: BinaryIO, file: str, source: SourceConfig) -> Layout:
    """By the first bytes; `file` is the name, of which only the suffix counts."""
    start = text_start(handle)
    head = read_at(handle, start, _HEAD_BYTES)
    if start == 0 and head.startswith(parquet_rows.MAGIC):
        return "parquet"
    if start == 0 and head.startswith((b"ARROW1\0\0", b"\xff\xff\xff\xff")):
        return "arrow"
    if source.container != "auto":
        return _json_layout(head) if source.container == "json" else source.container
    return _by_name(head, file, source) or _json_layout(head, may_be_keyed=True)


def spool_lines(
    layout: Layout, plain: Path, spool: Spool, target: Path, source: SourceConfig, limit: int
) -> Lines:
    """The records of such a file as JSON Lines in `target`. `limit` is merge.max_record_bytes."""
    converters: dict[str, Callable[[BinaryIO], Iterator[Line]]] = {
        "arrow": arrow_lines,
        "csv": lambda file: csv_lines(file, max_record_bytes=limit, columns=source.columns),
        "keyed": lambda file: keyed_lines(file, text_start(file), max_record_bytes=limit),
        "text": lambda file: _document(file, limit),
        "text_lines": _documents,
    }
    broken: dict[int, tuple[str, str]] = {}
    written = spool.write(lambda file: noted_lines(converters[layout](file), broken), plain, target)
    return Lines(written.path, written.damage, broken)


def text_start(handle: BinaryIO) -> int:
    """Where the text begins: behind a byte order mark."""
    return len(BOM_UTF8) if read_at(handle, 0, len(BOM_UTF8)) == BOM_UTF8 else 0


def read_at(handle: BinaryIO, start: int, num_bytes: int) -> bytes:
    """Bytes from a place of the file on."""
    handle.seek(start)
    return handle.read(num_bytes)


def _by_name(head: bytes, file: str, source: SourceConfig) -> Layout | None:
    name = unpacked_name(file)
    if name.endswith(_CSV_SUFFIXES) and not _JSON.match(head):
        return "csv"
    is_prose = name.endswith(TEXT_SUFFIXES) or source.format == "text"
    return "text" if is_prose and not _JSON.match(head) else None


def _json_layout(head: bytes, *, may_be_keyed: bool = False) -> Layout:
    """By the first byte that is no space; objects are lines where the first line is one, or a line follows."""
    is_cut = len(head) == _HEAD_BYTES
    head = head.lstrip(b" \t\r\n")
    if may_be_keyed and is_keyed(head, is_cut=is_cut):
        return "keyed"
    if head.startswith(b"["):
        return "values"
    first, newline, rest = head.partition(b"\n")
    if not first.startswith(b"{"):
        return "lines"
    end = object_end(first)
    if end is not None:
        return "values" if first[end:].strip() else "lines"
    return "values" if newline and not rest.startswith(b'{"') else "lines"


def noted_lines(lines: Iterator[Line], broken: dict[int, tuple[str, str]]) -> Iterator[bytes]:
    """The lines to write; where one that can't be read will begin, and why, goes to `broken`."""
    num_bytes = 0
    for line in lines:
        if isinstance(line, BrokenRow):
            broken[num_bytes] = (line.reason, line.detail)
            line = _shown(line.text)
        yield line + b"\n"
        num_bytes += len(line) + 1


def _shown(text: str) -> bytes:
    """On one line, never empty."""
    return orjson.dumps(text.encode("utf-8", "replace").decode())


def _document(file: BinaryIO, limit: int) -> Iterator[Line]:
    file.seek(text_start(file))
    data = file.read(limit + 1)
    if len(data) > limit:
        num_bytes = file.seek(0, 2)
        detail = f"a document of {num_bytes} bytes, merge.max_record_bytes is {limit}"
        yield BrokenRow(data[: 1 << 16].decode("utf-8", "replace"), "record_too_large", detail)
    elif data.strip():
        yield _document_line(data)


def _documents(file: BinaryIO) -> Iterator[Line]:
    file.seek(text_start(file))
    for line in file:
        if line.strip():
            yield _document_line(line.strip(b"\r\n"))


def _document_line(data: bytes) -> Line:
    try:
        return orjson.dumps({"text": data.decode()})
    except UnicodeDecodeError as error:
        text = data[: 1 << 16].decode("utf-8", "replace")
        return BrokenRow(text, "invalid_utf8", f"byte {error.start} of the document: {error.reason}")
