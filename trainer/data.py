"""Shards and plans as tensors: memory-mapped examples, bins of documents, packed micro-batches.

Everything about a step is known before it runs: which examples, how many tokens, and the sum of weights that
its loss is divided by. No sampler state exists; a cursor is enough to resume.
"""

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines import storage
from schemas.errors import InputError, IntegrityError
from schemas.run import STAGE_FOLDERS, FileEntry, Manifest
from trainer.arrow_views import column_view, joined, list_views

# Examples ---------------------------------------------------------------------------------------------------


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


class ShardReader:
    """Random access to one split of the shards folder, memory-mapped.

    Each file's digest and rows are checked against the folder's manifest before its first use.
    `num_tokens`, `num_trained_tokens`, `num_trained_bytes` are int64 [rows]; `weight_sums` is float64 [rows],
    the sum of the weights of the tokens that a document trains.
    Raises InputError when there is no such split, IntegrityError when a file is not the one written.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.split = split
        manifest = storage.check_manifest(folder, stage="split")
        paths = [storage.check_file(folder, entry) for entry in _split_entries(folder, split, manifest)]
        tables = [storage.read_arrow(path) for path in paths]
        batches = [batch for table in tables for batch in table.to_batches() if batch.num_rows]
        self._columns = [_MappedBatch(batch) for batch in batches]
        self._first_rows = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self.num_rows = int(self._first_rows[-1])
        self.num_tokens = joined(batches, "num_tokens")
        self.num_trained_tokens = joined(batches, "num_trained_tokens")
        self.num_trained_bytes = joined(batches, "num_trained_bytes")
        self.weight_sums = np.concatenate(
            [np.zeros(0), *(columns.weight_sums() for columns in self._columns)]
        )
        self._batches = batches

    def __len__(self) -> int:
        return self.num_rows

    def example(self, row: int) -> Example:
        """The document in that row of the split."""
        batch, place = self._locate(row)
        return self._columns[batch].example(place, row)

    def value(self, row: int, column: str) -> str | int:
        """One cell, such as "row_id", "source" or "language"."""
        batch, place = self._locate(row)
        cell: str | int = self._batches[batch].column(column)[place].as_py()
        return cell

    def _locate(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.split}, which has {self.num_rows}")
        batch = bisect_right(self._first_rows, row) - 1
        return batch, row - int(self._first_rows[batch])


class _MappedBatch:
    """numpy views of one record batch's lists."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._input_ids = list_views(batch.column("input_ids"))
        self._starts = list_views(batch.column("span_starts"))
        self._ends = list_views(batch.column("span_ends"))
        self._weights = list_views(batch.column("span_weights"))

    def example(self, place: int, row: int) -> Example:
        lists = (self._input_ids, self._starts, self._ends, self._weights)
        input_ids, starts, ends, weights = (
            values[offsets[place] : offsets[place + 1]] for offsets, values in lists
        )
        return Example(row, input_ids, starts, ends, weights)

    def weight_sums(self) -> np.ndarray:
        """float64 [rows]; a span's first token counts only where a token stands before it."""
        offsets, starts = self._starts
        per_span = (self._ends[1] - np.maximum(starts, 1)) * self._weights[1].astype(np.float64)
        running = np.concatenate([[0.0], np.cumsum(per_span)])
        sums: np.ndarray = running[offsets[1:]] - running[offsets[:-1]]
        return sums


def _split_entries(folder: Path, split: str, manifest: Manifest) -> list[FileEntry]:
    """The split's Arrow files in the order of its state.json, each as the manifest names it."""
    state = folder / split / "state.json"
    if not state.is_file():
        raise InputError(f"{folder} has no split {split!r} ({state} is missing); run the stage 'split' again")
    known = {entry.path: entry for entry in _all_entries(manifest)}
    if f"{split}/state.json" not in known:
        raise IntegrityError(f"{state} is not in the manifest of {folder}; run 'split' again")
    files = storage.read_json(storage.check_file(folder, known[f"{split}/state.json"]))["_data_files"]
    names = [f"{split}/{file['filename']}" for file in files]
    missing = [name for name in names if name not in known]
    if missing:
        raise IntegrityError(f"{folder / missing[0]} is not in the manifest of {folder}; run 'split' again")
    return [known[name] for name in names]


def _all_entries(manifest: Manifest) -> Iterator[FileEntry]:
    yield from manifest.files
    for part in manifest.parts:
        yield from part.kept


# Plans ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The packing of one split for one epoch: bins in the order of training.

    `examples` [documents] are row numbers, bin after bin; `bin_starts` [bins + 1] cuts them into bins.
    """

    split: str
    epoch: int
    examples: np.ndarray
    num_tokens: np.ndarray
    bin_starts: np.ndarray

    @property
    def num_bins(self) -> int:
        return len(self.bin_starts) - 1

    def rows(self, first_bin: int, end_bin: int) -> np.ndarray:
        """Row numbers of the documents in bins [first_bin, end_bin)."""
        return self.examples[self.bin_starts[first_bin] : self.bin_starts[end_bin]]


def plan_name(split: str, epoch: int) -> str:
    return f"{split}-epoch-{epoch:04d}.arrow"


def read_plan(run_root: Path, split: str, epoch: int) -> Plan:
    """The plan that stage 7 wrote. Raises InputError when this epoch was not planned."""
    folder = run_root / STAGE_FOLDERS["pack"]
    manifest = storage.check_manifest(folder, stage="pack")
    name = plan_name(split, epoch)
    entry = next((entry for entry in _all_entries(manifest) if entry.path == name), None)
    if entry is None:
        raise InputError(
            f"{folder} has no plan {name}; run the stage 'pack' again with train.epochs > {epoch}"
        )
    return plan_from_table(storage.read_arrow(storage.check_file(folder, entry)), split=split, epoch=epoch)


def plan_from_table(table: pa.Table, *, split: str, epoch: int) -> Plan:
    """A plan from the columns of schemas.dataset.PLAN. Raises IntegrityError when its bins are not in order."""
    columns = {name: column_view(table, name) for name in ("bin", "example", "num_tokens")}
    bins = columns["bin"]
    jumps = np.diff(bins, prepend=-1)
    if not np.isin(jumps, (0, 1)).all():
        raise IntegrityError(f"the plan of {split} epoch {epoch} is not sorted by bin; run 'pack' again")
    bin_starts = np.append(np.flatnonzero(jumps), len(bins))
    return Plan(split, epoch, columns["example"], columns["num_tokens"], bin_starts)


def check_plan(plan: Plan, reader: ShardReader) -> None:
    """Raises IntegrityError when the plan was made for other shards."""
    rows = plan.examples
    fits = len(rows) == 0 or (rows.min() >= 0 and rows.max() < reader.num_rows)
    if not fits or not np.array_equal(reader.num_tokens[rows], plan.num_tokens):
        raise IntegrityError(
            f"the plan of {plan.split} epoch {plan.epoch} was made for other shards than {reader.folder}; "
            "run the stage 'pack' again"
        )


# Micro-batches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One packed row of whole documents.

    `input_ids`, `position_ids` int64 [1, T], positions from 0 in each document; `cu_seqlens` int32 [D + 1], the
    documents' borders (padding, if any, is a last document without targets); `max_seqlen` the longest document.
    For each of the N trained tokens: `target_positions` int64, the place in the row whose hidden state predicts
    it; `targets` int64, its id; `weights` float32; `target_documents` int64, its document's number in `rows`.
    `rows` are the documents' row numbers in the split. `num_tokens` does not count padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    target_positions: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    target_documents: torch.Tensor
    rows: tuple[int, ...]
    num_tokens: int
    num_trained_tokens: int

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device; copies to a GPU run beside its work."""
        if device.type == self.input_ids.device.type:
            return self
        tensors: dict[str, Any] = {
            field.name: _moved(value, device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **tensors)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def collate(examples: Sequence[Example], pad_to: int | None = None) -> MicroBatch:
    """Lay documents one after the other, and padding up to `pad_to` tokens behind them.

    The first token of a document is never a target: nothing stands before it.
    """
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    num_tokens = int(lengths.sum())
    num_padding = max((pad_to or 0) - num_tokens, 0)
    segments = np.append(lengths, num_padding) if num_padding else lengths
    borders = np.concatenate([[0], np.cumsum(segments)])
    padding = np.zeros(num_padding, np.int32)
    input_ids = np.concatenate([*(example.input_ids for example in examples), padding]).astype(np.int64)
    position_ids = np.arange(len(input_ids)) - np.repeat(borders[:-1], segments)
    places, weights, documents = _targets(examples, borders)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        max_seqlen=int(segments.max(initial=0)),
        target_positions=torch.from_numpy(places - 1),
        targets=torch.from_numpy(input_ids[places]),
        weights=torch.from_numpy(weights),
        target_documents=torch.from_numpy(documents),
        rows=tuple(example.row for example in examples),
        num_tokens=num_tokens,
        num_trained_tokens=len(places),
    )


def _targets(examples: Sequence[Example], borders: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the trained tokens in the row, their weights and their documents' numbers; each [N]."""
    spans_per_document = [len(example.span_starts) for example in examples]
    documents = np.repeat(np.arange(len(examples)), spans_per_document)
    none = np.zeros(0, np.int64)
    starts = np.concatenate([none, *(np.maximum(example.span_starts, 1) for example in examples)])
    ends = np.concatenate([none, *(example.span_ends for example in examples)])
    weights = np.concatenate([np.zeros(0, np.float32), *(example.span_weights for example in examples)])
    lengths = np.maximum(ends - starts, 0)
    # Counting 0, 1, 2, ... inside each span: a running count less the count at the span's begin.
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    places = np.repeat(starts + borders[documents], lengths) + inside
    return places, np.repeat(weights, lengths), np.repeat(documents, lengths)


def micro_batches(
    plan: Plan,
    reader: ShardReader,
    first_bin: int,
    end_bin: int,
    *,
    bins_per_micro_step: int,
    pad_multiple: int | None = None,
) -> Iterator[tuple[int, MicroBatch]]:
    """(first bin, micro-batch) pairs over bins [first_bin, end_bin), on the CPU."""
    for start in range(first_bin, end_bin, bins_per_micro_step):
        end = min(start + bins_per_micro_step, end_bin)
        yield start, micro_batch(plan, reader, start, end, pad_multiple=pad_multiple)


def micro_batch(
    plan: Plan, reader: ShardReader, first_bin: int, end_bin: int, *, pad_multiple: int | None = None
) -> MicroBatch:
    """Bins [first_bin, end_bin) as one row, on the CPU."""
    rows = plan.rows(first_bin, end_bin)
    examples = [example for row in rows if len((example := reader.example(int(row))).input_ids)]
    num_tokens = sum(len(example.input_ids) for example in examples)
    pad_to = -(-num_tokens // pad_multiple) * pad_multiple if pad_multiple else None
    return collate(examples, pad_to)
