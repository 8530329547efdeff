"""Pieces on the disk: safetensors files, written and digested in one go, and read by ranges.

Written here and not by the library, which first makes a second copy of all tensors in memory, holds Python's lock
while it does, and never calls fsync. Any reader of safetensors reads them.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open

from schemas.run import FileEntry
from trainer.pieces import FURTHER_KINDS, KINDS, MOMENTS, SMALL_KINDS, Piece, Shapes

HEADER_ALIGNMENT = 8
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8"}
"""As safetensors names them."""
MakePieces: TypeAlias = Callable[[], Iterable[Piece]]


class Run(NamedTuple):
    """Numbers [start, end) of the flattened tensor `name`, of one kind."""

    kind: str
    name: str
    start: int
    end: int

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.kind}.{self.name}:{self.start}"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Record):
    """What one rank has written."""

    file: FileEntry
    shapes: dict[str, tuple[int, ...]]
    runs: tuple[Run, ...]


class StoredRun(NamedTuple):
    """Numbers [start, end) are in that file."""

    file: str
    start: int
    end: int


class Index(_Record):
    """index.json: the trained tensors' shapes, and by kind and name where their numbers lie, in order."""

    shapes: dict[str, tuple[int, ...]]
    runs: dict[str, dict[str, tuple[StoredRun, ...]]]


# Writing ----------------------------------------------------------------------------------------------------


def write_pieces(path: Path, make_pieces: MakePieces) -> tuple[FileEntry, tuple[Run, ...]]:
    """Write and fsync one file; `make_pieces` is called for the header, and for the numbers of each dtype.

    The widest come first, so that each number lies on a multiple of its size: readers can't take it elsewhere.
    """
    dtypes: dict[Run, torch.dtype] = {}
    for kind, name, start, values in _not_empty(make_pieces()):
        run = Run(kind, name, start, start + values.numel())
        assert run not in dtypes, "a rank hands over each run once"
        dtypes[run] = values.dtype
    order = sorted(set(dtypes.values()), key=lambda dtype: (-dtype.itemsize, str(dtype)))
    runs = tuple(run for dtype in order for run in dtypes if dtypes[run] == dtype)
    numbers = (
        _bytes_of(piece)
        for dtype in order
        for piece in _not_empty(make_pieces())
        if piece.values.dtype == dtype
    )
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        for data in itertools.chain([memoryview(_header(runs, dtypes))], numbers):
            file.write(data)
            digest.update(data)
            num_bytes += len(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path=path.name, num_bytes=num_bytes, sha256=digest.hexdigest()), runs


def _not_empty(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """A rank may have none of a small tensor's numbers."""
    return (piece for piece in pieces if piece.values.numel())


def _header(runs: Sequence[Run], dtypes: Mapping[Run, torch.dtype]) -> bytes:
    """Length of the JSON, the JSON, spaces up to the next multiple of 8."""
    entries: dict[str, Any] = {}
    first_byte = 0
    for run in runs:
        dtype = dtypes[run]
        end_byte = first_byte + dtype.itemsize * (run.end - run.start)
        shape = [run.end - run.start]
        entries[run.key] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": shape,
            "data_offsets": [first_byte, end_byte],
        }
        first_byte = end_byte
    assert len(entries) == len(runs), "a rank hands over each run once"
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(piece: Piece) -> memoryview:
    values = piece.values.detach().cpu().contiguous().view(-1)
    numbers: Any = values.view(torch.uint8).numpy()  # numpy knows no bfloat16
    return memoryview(numbers).cast("B")


def index_of(parts: Iterable[Part]) -> Index:
    """All ranks' parts as one. Raises ValueError unless every number is there exactly once."""
    shapes: dict[str, tuple[int, ...]] = {}
    runs: dict[str, dict[str, list[StoredRun]]] = {kind: {} for kind in KINDS}
    for part in parts:
        shapes |= part.shapes
        for run in part.runs:
            stored = StoredRun(part.file.path, run.start, run.end)
            runs.setdefault(run.kind, {}).setdefault(run.name, []).append(stored)
    ordered = {
        kind: {name: tuple(sorted(found, key=lambda run: run.start)) for name, found in tensors.items()}
        for kind, tensors in runs.items()
    }
    index = Index(shapes=shapes, runs=ordered)
    check_covered(index)
    return index


def check_covered(index: Index) -> None:
    """Raises ValueError unless the runs of each tensor follow on each other from its first number to its last."""
    if not set(KINDS) <= set(index.runs) <= {*KINDS, *FURTHER_KINDS, *SMALL_KINDS}:
        raise ValueError(f"it holds {sorted(index.runs)}, expected {sorted(KINDS)}")
    moments = [set(index.runs[kind]) for kind in MOMENTS]
    if any(names != moments[0] for names in moments):
        raise ValueError("it holds one moment of a weight and not the other")
    for kind, tensors in index.runs.items():
        expected = set(index.shapes) if kind == "weight" else set(index.shapes) & set(tensors)
        if odd := sorted(set(tensors) ^ expected):
            raise ValueError(f"{kind} of {odd[0]} is missing, or not one of the trained weights")
        for name, runs in tensors.items():
            whole = runs[-1].end if kind in SMALL_KINDS else math.prod(index.shapes[name])
            _check_runs(kind, name, runs, whole)


def _check_runs(kind: str, name: str, runs: Sequence[StoredRun], num_numbers: int) -> None:
    borders = [0, *(run.end for run in runs)]
    starts = [*(run.start for run in runs), num_numbers]
    for border, start in zip(borders, starts, strict=True):
        if border != start:
            what = "are missing" if border < start else "are there twice"
            first, last = sorted((border, start))
            raise ValueError(f"numbers {first} to {last} of {kind} of {name} {what}")


# Reading ----------------------------------------------------------------------------------------------------


class PieceFiles:
    """`read` is a trainer.pieces.ReadPiece over files whose digests the caller has checked."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder = folder
        self._runs: Mapping[str, Mapping[str, Sequence[StoredRun]]] = index.runs
        self._files: dict[str, Any] = {}
        self.shapes: Shapes = {name: torch.Size(shape) for name, shape in index.shapes.items()}

    def read(self, kind: str, name: str, start: int, end: int) -> torch.Tensor | None:
        runs = self._runs.get(kind, {}).get(name)
        if runs is None:
            return None
        parts = [
            self._numbers(kind, name, run, max(start, run.start), min(end, run.end))
            for run in runs
            if run.start < end and start < run.end
        ]
        # cat copies: what is handed out must not hang on a mapped file.
        return torch.cat(parts) if parts else torch.zeros(0)

    def _numbers(self, kind: str, name: str, run: StoredRun, start: int, end: int) -> torch.Tensor:
        if run.file not in self._files:
            self._files[run.file] = safe_open(self._folder / run.file, framework="pt")
        key = Run(kind, name, run.start, run.end).key
        numbers: torch.Tensor = self._files[run.file].get_slice(key)[start - run.start : end - run.start]
        return numbers
