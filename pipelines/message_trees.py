"""Rows of messages, wherever they stand in the files of a source -> one record for each tree, before parts are planned.

A tree takes the place of its root; every other record stays where it is. Links and places of rows lie in an SQLite
file of the spool, their bytes beside it, so memory does not grow with rows, files or trees.
"""

import itertools
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import pyarrow.parquet as pq

from pipelines.containers import RawRecord, plan_lines, read_range
from pipelines.formats.message_rows import ROWS, UNPLACED, is_rows_of_a_tree, parent_id
from pipelines.layouts import Lines, noted_lines, read_at
from pipelines.parse import parse_record
from pipelines.part_ranges import PartRange
from pipelines.tables import BrokenRow, Line
from schemas.conversation import blake2b_128, utf8
from schemas.errors import InputError
from schemas.pipeline_config import MergeConfig
from schemas.source_config import SourceConfig

_NUM_LOOKED_AT = 20
_OPEN, _CLOSE = b'{"%b":[' % ROWS.encode(), b"]}"
_WRAPPER_BYTES = 64
_ROW, _OTHER, _BROKEN = range(3)

_SETTINGS = "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;"
_TABLE = """
CREATE TABLE record (
    position INTEGER PRIMARY KEY, kind INTEGER, start INTEGER, size INTEGER,
    id BLOB, parent BLOB, root INTEGER, reason TEXT, detail TEXT
);
CREATE UNIQUE INDEX by_id ON record (id) WHERE id IS NOT NULL;
CREATE INDEX by_parent ON record (parent) WHERE parent IS NOT NULL;
CREATE INDEX by_root ON record (root, position) WHERE root IS NOT NULL;
"""
_INSERT = "INSERT INTO record VALUES (?, ?, ?, ?, ?, ?, NULL, ?, ?) ON CONFLICT DO NOTHING"
# A message has one parent at most, so what a root leads to is a tree; circles are led to by nothing.
_PLACE = f"""
WITH RECURSIVE reached (position, id, root) AS (
    SELECT position, id, position FROM record WHERE id IS NOT NULL AND parent IS NULL
    UNION ALL
    SELECT record.position, record.id, reached.root FROM reached JOIN record ON record.parent = reached.id
)
UPDATE record SET root = reached.root FROM reached WHERE record.position = reached.position;
UPDATE record SET reason = 'orphan_message' WHERE kind = {_ROW} AND root IS NULL AND reason IS NULL;
"""
_TOO_LARGE = """
UPDATE record SET reason = 'tree_too_large' WHERE root IN
    (SELECT root FROM record WHERE root IS NOT NULL GROUP BY root HAVING sum(size + 1) > ?)
"""
_OF_FILE = """
SELECT position, kind, start, size, root, reason, detail FROM record WHERE position >= ? AND position < ?
ORDER BY position
"""
_OF_TREE = "SELECT start, size FROM record WHERE root = ? ORDER BY position"


def with_trees(
    parts: Iterable[PartRange],
    first_parts: Sequence[PartRange],
    source: SourceConfig,
    config: MergeConfig,
    spool_folder: Path,
) -> Iterator[PartRange]:
    """The parts of a source in the order of its files; those of files of messages, row by row, become trees.

    `first_parts`: the first of each file. A tree may lie in several files, and takes the place of its first message.
    """
    of_rows = {part.file for part in first_parts if _holds_message_rows(part, source)}
    if not of_rows:
        yield from parts
        return
    parts = list(parts)
    spool_path = spool_folder / f"{source.name}-trees"
    rows = [part for part in parts if part.file in of_rows]
    trees = _grouped(rows, source=source, config=config, spool_path=spool_path)
    others = [part for part in parts if part.file not in of_rows]
    yield from sorted([*others, *trees], key=_place_of_files(parts))


def _place_of_files(parts: Sequence[PartRange]) -> Callable[[PartRange], int]:
    places = {file: place for place, file in enumerate(dict.fromkeys(part.file for part in parts))}
    return lambda part: places[part.file]


def _holds_message_rows(part: PartRange, source: SourceConfig) -> bool:
    """Whether a file is one of rows: told by the first records of its first part."""
    if source.format not in ("auto", "oasst"):
        return False
    # Whoever reads rows of Parquet checks the bytes of their whole row group before: not for a look.
    if part.container == "parquet" and "message_id" not in pq.read_schema(part.path).names:
        return False
    first = [record.raw for record in itertools.islice(read_range(part), _NUM_LOOKED_AT)]
    # Where the source says so, a file without whole trees is one of rows, whatever it begins with.
    is_told = source.format == "oasst" and not any(b'"replies"' in raw for raw in first)
    return is_told or any(_row_of(raw) is not None for raw in first)


def _grouped(
    parts: Iterable[PartRange], *, source: SourceConfig, config: MergeConfig, spool_path: Path
) -> list[PartRange]:
    """The parts of the files that stand for those of `parts`, all of one source. Writes beside `spool_path`.

    A file whose rows have all gone to trees of other files has no parts.
    """
    table, rows = Path(f"{spool_path}.sqlite"), Path(f"{spool_path}.rows")
    rows.parent.mkdir(parents=True, exist_ok=True)
    for path in (table, rows):
        path.unlink(missing_ok=True)
    # No run shares it and none reads it later: no journal, no locks (which network file systems may not have).
    uri = f"file:{quote(str(table.absolute()))}?nolock=1"
    grouped: list[PartRange] = []
    try:
        with (
            closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as database,
            rows.open("w+b") as file,
        ):
            database.executescript(f"{_SETTINGS} BEGIN; {_TABLE}")
            files = _store(parts, database, file)
            database.executescript(_PLACE)
            database.execute(_TOO_LARGE, (config.max_record_bytes - _WRAPPER_BYTES,))
            for number, (name, first, end) in enumerate(files):
                lines = _write(_lines(database, file, first, end), Path(f"{spool_path}.{number}.jsonl"))
                grouped += plan_lines(lines, source=source, file=name, config=config)
    except sqlite3.Error as error:
        raise InputError(
            f"source {source.name}: its messages can't be put into trees ({error}); is there room at {table.parent} "
            "and in the folder for temporary files (TMPDIR)?"
        ) from error
    for path in (table, rows):
        path.unlink()
    return grouped


def _store(
    parts: Iterable[PartRange], database: sqlite3.Connection, file: BinaryIO
) -> list[tuple[str, int, int]]:
    """Each file with its first position and the one behind its last."""
    files, position, start = [], 0, 0
    for name, of_file in itertools.groupby(parts, key=lambda part: part.file):
        first = position
        for part in of_file:
            for record in read_range(part):
                _insert(database, record, position, start)
                start += file.write(record.raw)
                position += 1
        files.append((name, first, position))
    return files


def _insert(database: sqlite3.Connection, record: RawRecord, position: int, start: int) -> None:
    place = (start, len(record.raw))
    if record.reason:
        database.execute(_INSERT, (position, _BROKEN, *place, None, None, record.reason, record.detail))
        return
    link = _row_of(record.raw)
    if link is None:
        database.execute(_INSERT, (position, _OTHER, *place, None, None, None, None))
        return
    if database.execute(_INSERT, (position, _ROW, *place, *link, None, None)).rowcount == 0:
        database.execute(_INSERT, (position, _ROW, *place, None, None, "duplicate_message", None))


def _row_of(raw: bytes) -> tuple[bytes, bytes | None] | None:
    """Keys of a message and of what it answers; None for any other record."""
    if b"message_id" not in raw:
        return None
    parsed = parse_record(_OPEN + raw + _CLOSE)  # as it will be read: one bracket deeper may be too deep
    if isinstance(parsed, tuple) and is_rows_of_a_tree(parsed[0]) and len(parsed[0][ROWS]) == 1:
        row = parsed[0][ROWS][0]
        return _key(row["message_id"]), _key(parent_id(row)) if parent_id(row) else None
    return None


def _key(message_id: str) -> bytes:
    return bytes.fromhex(blake2b_128(utf8(message_id)))


def _lines(database: sqlite3.Connection, file: BinaryIO, first: int, end: int) -> Iterator[Line]:
    for position, kind, start, size, root, reason, detail in database.execute(_OF_FILE, (first, end)):
        raw = _on_one_line(read_at(file, start, size))
        if kind == _BROKEN:
            yield BrokenRow(raw.decode("utf-8", "replace"), reason, detail)
        elif kind == _OTHER:
            yield raw
        elif reason is not None:
            yield b'%b%b],"%b":"%b"}' % (_OPEN, raw, UNPLACED.encode(), reason.encode())
        elif root == position:
            tree = database.execute(_OF_TREE, (root,))
            yield _OPEN + b",".join(_on_one_line(read_at(file, *place)) for place in tree) + _CLOSE


def _on_one_line(raw: bytes) -> bytes:
    """In JSON a line's end stands between values alone, where it is white space."""
    return raw.replace(b"\n", b" ").replace(b"\r", b" ")


def _write(lines: Iterator[Line], target: Path) -> Lines:
    broken: dict[int, tuple[str, str]] = {}
    with target.open("wb") as spool:
        for line in noted_lines(lines, broken):
            spool.write(line)
    return Lines(target, "", broken)
