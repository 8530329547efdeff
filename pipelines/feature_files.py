"""Features of all parts as they lie on the disk: a column at a time is copied into memory, gram sets are read by offset.

Mapped files would be simpler, but each page of a map that was looked at counts as memory of the process.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipelines.grams import GramSets, Hashes, Ints, from_column, runs
from schemas.errors import IntegrityError

_MAX_OPEN_FILES = 256
_HASH_BYTES = 8


class Features(Protocol):
    """Rows with the columns of a stage's FEATURES, numbered from 0 in the order in which they lie."""

    def __len__(self) -> int: ...
    def column(self, name: str) -> pa.ChunkedArray: ...
    def sets(self, name: str) -> "AbstractContextManager[GramSets | GramFiles]": ...


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """Features in memory."""

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        return self.table[name]

    def sets(self, name: str) -> "AbstractContextManager[GramSets | GramFiles]":
        return nullcontext(from_column(self.table[name]))


@dataclass(frozen=True, slots=True)
class FeatureFiles:
    """Features in the Arrow streams of parts, one after another. Their digests have been checked."""

    schema: pa.Schema
    paths: Sequence[Path]
    num_rows: Sequence[int]

    def __len__(self) -> int:
        return sum(self.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array(
            [_copied(batch.column(name)) for path in self.paths for batch, _ in _mapped_batches(path)],
            self.schema.field(name).type,
        )

    @contextmanager
    def sets(self, name: str) -> Iterator["GramSets | GramFiles"]:
        stretches, sizes = [], [np.empty(0, np.int64)]
        for path in self.paths:
            for batch, address in _mapped_batches(path):
                lists = batch.column(name)
                starts = np.array(lists.offsets.to_numpy())
                values = lists.values.buffers()[1]
                start = values.address - address if values is not None else 0
                start += _HASH_BYTES * (lists.values.offset + int(starts[0]))
                stretches.append(_Stretch(path, start, int(starts[-1] - starts[0])))
                sizes.append(np.diff(starts))
                del lists, values, batch
        files = GramFiles(stretches, np.concatenate(sizes))
        try:
            yield files
        finally:
            files.close()


def feature_files(schema: pa.Schema, paths: Sequence[Path]) -> FeatureFiles:
    """Features in these files."""
    num_rows = []
    for path in paths:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            num_rows.append(sum(batch.num_rows for batch in reader))
    return FeatureFiles(schema, paths, num_rows)


def _mapped_batches(path: Path) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Batches of a stream, and the address that its first byte is mapped to."""
    with pa.memory_map(str(path)) as source:
        address = source.read_buffer(1).address
        source.seek(0)
        with pa.ipc.open_stream(source) as reader:
            for batch in reader:
                yield batch, address


def _copied(column: pa.Array) -> pa.Array:
    return column.take(pa.array(np.arange(len(column))))


@dataclass(frozen=True, slots=True)
class _Stretch:
    path: Path
    start_byte: int
    num_hashes: int


class GramFiles:
    """Gram sets in stretches of files; see grams.StoredSets. Threads may read at the same time."""

    def __init__(self, stretches: Sequence[_Stretch], sizes: Ints) -> None:
        self._stretches = stretches
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        lengths = np.array([stretch.num_hashes for stretch in stretches], np.int64)
        self._stretch_starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def sizes(self) -> Ints:
        return np.diff(self._starts)

    def blocks(self, limit: int) -> Iterator[tuple[int, GramSets]]:
        for first, end in runs(self.sizes, limit=limit):
            starts = self._starts[first : end + 1] - self._starts[first]
            hashes = np.empty(int(starts[-1]), np.uint64)
            self._read(int(self._starts[first]), hashes)
            yield first, GramSets(starts, hashes)

    def of_rows(self, rows: Ints) -> GramSets:
        starts = np.concatenate([[0], np.cumsum(self._starts[rows + 1] - self._starts[rows])])
        hashes = np.empty(int(starts[-1]), np.uint64)
        places = zip(self._starts[rows].tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True)
        for place, start, end in places:
            self._read(place, hashes[start:end])
        return GramSets(starts, hashes)

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def _read(self, place: int, into: Hashes) -> None:
        """Fills `into` with the hashes from this place on, over the borders of stretches."""
        number = int(np.searchsorted(self._stretch_starts, place, side="right")) - 1
        done = 0
        while done < len(into):
            behind = place + done - int(self._stretch_starts[number])
            stretch = self._stretches[number]
            length = min(len(into) - done, stretch.num_hashes - behind)
            if length:
                start_byte = stretch.start_byte + _HASH_BYTES * behind
                self._read_file(stretch.path, start_byte, into[done : done + length])
            done, number = done + length, number + 1

    def _read_file(self, path: Path, start_byte: int, into: Hashes) -> None:
        with self._descriptor(path) as descriptor:
            view, done = into.data.cast("B"), 0
            while done < len(view):
                num_bytes = os.preadv(descriptor, [view[done:]], start_byte + done)
                if not num_bytes:
                    raise IntegrityError(
                        f"{path} ends at byte {start_byte + done}, expected {len(view) - done} bytes more: it was "
                        "changed while it was read; run again"
                    )
                done += num_bytes

    @contextmanager
    def _descriptor(self, path: Path) -> Iterator[int]:
        with self._lock:
            kept = self._open.get(path)
            if kept is None and len(self._open) < _MAX_OPEN_FILES:
                kept = self._open[path] = os.open(path, os.O_RDONLY)
        if kept is not None:
            yield kept
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
