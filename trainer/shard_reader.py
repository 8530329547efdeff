"""One split of the shards folder, memory-mapped: any example by its row number.

Opening reads the manifest and nothing else, whatever the number of examples; each file is checked and mapped when
the first of its examples is asked for.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipelines import storage
from schemas.errors import InputError, IntegrityError
from schemas.run import FileEntry, Manifest
from trainer.arrow_views import joined, list_views


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One document. The arrays are views into the mapped shard: don't write to them.

    `input_ids` int32 [tokens]; trained spans are half-open token ranges with one weight each.
    """

    row: int
    input_ids: np.ndarray
    span_starts: np.ndarray
    span_ends: np.ndarray
    span_weights: np.ndarray

    def piece(self, first_token: int, num_tokens: int) -> "Example":
        """Tokens [first_token, first_token + num_tokens) as a document of their own."""
        if first_token == 0 and num_tokens == len(self.input_ids):
            return self
        starts = np.clip(self.span_starts - first_token, 0, num_tokens)
        ends = np.clip(self.span_ends - first_token, 0, num_tokens)
        kept = starts < ends
        input_ids = self.input_ids[first_token : first_token + num_tokens]
        return Example(self.row, input_ids, starts[kept], ends[kept], self.span_weights[kept])


class ShardReader:
    """Random access to one split of the shards folder.

    Each file's digest and rows are checked against the folder's manifest before its first use; `check_files` does
    so for all of them at once. Raises InputError when there is no such split, IntegrityError when a file is not the
    one written.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.split = split
        manifest = storage.check_manifest(folder, stage="split")
        self._entries = _split_entries(folder, split, manifest)
        self._first_rows = [0]
        for entry in self._entries:
            self._first_rows.append(self._first_rows[-1] + entry.num_rows)
        self.num_rows = self._first_rows[-1]
        self._files: dict[int, _MappedFile] = {}

    def __len__(self) -> int:
        return self.num_rows

    def check_files(self) -> None:
        """Read every file once and compare it with its digest: about 2 GB/s. Raises IntegrityError."""
        for number in range(len(self._entries)):
            self._file(number)

    def example(self, row: int) -> Example:
        """The document in that row of the split."""
        file, place = self._locate(row)
        return file.example(place, row)

    def value(self, row: int, column: str) -> str | int:
        """One cell, such as "row_id", "source" or "language"."""
        file, place = self._locate(row)
        return file.value(place, column)

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """int64 [rows]; like the next one, read when first asked for."""
        return self._joined("num_tokens")

    @cached_property
    def num_trained_bytes(self) -> np.ndarray:
        """int64 [rows]"""
        return self._joined("num_trained_bytes")

    @cached_property
    def num_trained_tokens(self) -> np.ndarray:
        """int64 [rows]"""
        return self._joined("num_trained_tokens")

    @cached_property
    def sources(self) -> np.ndarray:
        """Names of the rows' sources: they hold no slash; what follows one is the file."""
        return np.array([str(value).partition("/")[0] for value in self._texts("source")], np.str_)

    @cached_property
    def languages(self) -> np.ndarray:
        return np.array(self._texts("language"), np.str_)

    def _texts(self, column: str) -> list[str]:
        files = [self._file(number) for number in range(len(self._entries))]
        return [text for file in files for batch in file.batches for text in batch.column(column).to_pylist()]

    def _joined(self, column: str) -> np.ndarray:
        files = [self._file(number) for number in range(len(self._entries))]
        return joined([batch for file in files for batch in file.batches], column)

    def _locate(self, row: int) -> "tuple[_MappedFile, int]":
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.split}, which has {self.num_rows}")
        number = bisect_right(self._first_rows, row) - 1
        return self._file(number), row - self._first_rows[number]

    def _file(self, number: int) -> "_MappedFile":
        if number not in self._files:
            entry = self._entries[number]
            self._files[number] = _MappedFile(storage.check_file(self.folder, entry), entry)
        return self._files[number]


class _MappedFile:
    """One Arrow stream, its record batches seen as numpy arrays when they are first used."""

    def __init__(self, path: Path, entry: FileEntry) -> None:
        table = storage.read_arrow(path)
        if table.num_rows != entry.num_rows:
            raise IntegrityError(
                f"{path} has {table.num_rows} rows, its manifest says {entry.num_rows}; run 'split' again"
            )
        self.batches = [batch for batch in table.to_batches() if batch.num_rows]
        self._first_rows = np.cumsum([0, *(batch.num_rows for batch in self.batches)]).tolist()
        self._lists: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def example(self, place: int, row: int) -> Example:
        number = bisect_right(self._first_rows, place) - 1
        if number not in self._lists:
            self._lists[number] = [list_views(self.batches[number].column(name)) for name in _LIST_COLUMNS]
        place -= self._first_rows[number]
        parts = (values[offsets[place] : offsets[place + 1]] for offsets, values in self._lists[number])
        return Example(row, *parts)

    def value(self, place: int, column: str) -> str | int:
        number = bisect_right(self._first_rows, place) - 1
        cell: str | int = self.batches[number].column(column)[place - self._first_rows[number]].as_py()
        return cell


_LIST_COLUMNS = ("input_ids", "span_starts", "span_ends", "span_weights")


def _split_entries(folder: Path, split: str, manifest: Manifest) -> list[FileEntry]:
    """The split's Arrow files in the order of its state.json, each as the manifest names it."""
    state = folder / split / "state.json"
    if not state.is_file():
        raise InputError(f"{folder} has no split {split!r} ({state} is missing); run the stage 'split' again")
    known = {entry.path: entry for entry in all_entries(manifest)}
    if f"{split}/state.json" not in known:
        raise IntegrityError(f"{state} is not in the manifest of {folder}; run 'split' again")
    files = storage.read_json(storage.check_file(folder, known[f"{split}/state.json"]))["_data_files"]
    names = [f"{split}/{file['filename']}" for file in files]
    missing = [name for name in names if name not in known]
    if missing:
        raise IntegrityError(f"{folder / missing[0]} is not in the manifest of {folder}; run 'split' again")
    return [known[name] for name in names]


def all_entries(manifest: Manifest) -> Iterator[FileEntry]:
    """Every file that a manifest names."""
    yield from manifest.files
    for part in manifest.parts:
        yield from part.kept
