"""Plans and shards as tensors: bins of documents, packed micro-batches.

Everything about a step is known before it runs: which examples, how many tokens, and the sum of weights that
its loss is divided by. No sampler state exists; a cursor is enough to resume.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines import storage
from schemas.errors import InputError, IntegrityError
from schemas.run import STAGE_FOLDERS
from trainer.arrow_views import column_view
from trainer.shard_reader import Example, ShardReader, all_entries

# Plans ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The packing of one split for one epoch: bins in the order of training.

    `examples` [documents] are row numbers, bin after bin; `bin_starts` [bins + 1] cuts them into bins. Of each
    document tokens [first_token, first_token + num_tokens) stand in the bin, mostly all of it; they train
    `num_trained_tokens`, whose weights add up to `weight_sums`.
    """

    split: str
    epoch: int
    examples: np.ndarray
    num_tokens: np.ndarray
    first_tokens: np.ndarray
    num_trained_tokens: np.ndarray
    weight_sums: np.ndarray
    bin_starts: np.ndarray

    @property
    def num_bins(self) -> int:
        return len(self.bin_starts) - 1

    def documents(self, first_bin: int, end_bin: int) -> slice:
        """Places of the documents in bins [first_bin, end_bin)."""
        return slice(int(self.bin_starts[first_bin]), int(self.bin_starts[end_bin]))


def plan_name(split: str, epoch: int) -> str:
    return f"{split}-epoch-{epoch:04d}.arrow"


def read_plan(run_root: Path, split: str, epoch: int) -> Plan:
    """The plan that stage 7 wrote. Raises InputError when this epoch was not planned."""
    folder = run_root / STAGE_FOLDERS["pack"]
    manifest = storage.check_manifest(folder, stage="pack")
    name = plan_name(split, epoch)
    entry = next((entry for entry in all_entries(manifest) if entry.path == name), None)
    if entry is None:
        raise InputError(
            f"{folder} has no plan {name}; run the stage 'pack' again with train.epochs > {epoch}"
        )
    return plan_from_table(storage.read_arrow(storage.check_file(folder, entry)), split=split, epoch=epoch)


def plan_from_table(table: pa.Table, *, split: str, epoch: int) -> Plan:
    """A plan from the columns of schemas.dataset.PLAN. Raises IntegrityError when its bins are not in order."""
    bins = column_view(table, "bin")
    jumps = np.diff(bins, prepend=np.int32(-1))
    if not ((jumps == 0) | (jumps == 1)).all():
        raise IntegrityError(f"the plan of {split} epoch {epoch} is not sorted by bin; run 'pack' again")
    return Plan(
        split=split,
        epoch=epoch,
        examples=column_view(table, "example"),
        num_tokens=column_view(table, "num_tokens"),
        first_tokens=column_view(table, "first_token"),
        num_trained_tokens=column_view(table, "num_trained_tokens"),
        weight_sums=column_view(table, "weight_sum"),
        bin_starts=np.append(np.flatnonzero(jumps), len(bins)),
    )


def check_plan(run_root: Path) -> None:
    """Raises IntegrityError when the plans were made for other shards; each document is compared when it is used."""
    shards, plans = (run_root / STAGE_FOLDERS[stage] for stage in ("split", "pack"))
    made_for = storage.check_manifest(plans, stage="pack").inputs.get(shards.name)
    if made_for != storage.check_manifest(shards, stage="split").key:
        raise IntegrityError(f"the plans in {plans} were made for other shards; run the stage 'pack' again")


def trained_bytes(plan: Plan, reader: ShardReader) -> np.ndarray:
    """Bytes of trained text of each document of the plan, float64: of a piece, by its share of trained tokens."""
    is_whole = plan.num_tokens == reader.num_tokens[plan.examples]
    tokens_of_whole = np.maximum(reader.num_trained_tokens[plan.examples], 1)
    shares = np.where(is_whole, 1.0, plan.num_trained_tokens / tokens_of_whole)
    return reader.num_trained_bytes[plan.examples] * shares


# Micro-batches ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PaddedRow:
    """A document that is a row of its own: its number in the plan, and its tokens without padding."""

    place: int
    length: int


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """One packed row of whole documents; or, with `padded_rows`, a row for each document (trainer/padding.py).

    `input_ids`, `position_ids` int64 [1, T], positions from 0 in each document; `cu_seqlens` int32 [D + 1], the
    documents' borders (padding, if any, is a last document without targets); `max_seqlen` the longest document.
    For each of the N trained tokens: `target_positions` int64, the place in the row whose hidden state predicts
    it; `targets` int64, its id; `weights` float32; `target_documents` int64, its document's number in `rows`.
    `rows` are the documents' row numbers in the split. `num_tokens` does not count padding.

    Padded: `input_ids`, `position_ids` [D, L]; places and borders count the rows' tokens one after the other.
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
    padded_rows: tuple[PaddedRow, ...] = ()

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
    places, weights, documents = trained_places(examples, borders)
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


def trained_places(
    examples: Sequence[Example], borders: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def micro_batch(
    plan: Plan, reader: ShardReader, first_bin: int, end_bin: int, *, pad_multiple: int | None = None
) -> MicroBatch:
    """Bins [first_bin, end_bin) as one row, on the CPU."""
    examples = [
        example for example in read_documents(plan, reader, first_bin, end_bin) if len(example.input_ids)
    ]
    num_tokens = sum(len(example.input_ids) for example in examples)
    pad_to = -(-num_tokens // pad_multiple) * pad_multiple if pad_multiple else None
    return collate(examples, pad_to)


def read_documents(plan: Plan, reader: ShardReader, first_bin: int, end_bin: int) -> Iterator[Example]:
    here = plan.documents(first_bin, end_bin)
    columns = (plan.examples[here], plan.first_tokens[here], plan.num_tokens[here])
    for row, first_token, num_tokens in zip(*(column.tolist() for column in columns), strict=True):
        found = reader.example(row).piece(first_token, num_tokens) if row < reader.num_rows else None
        if found is None or len(found.input_ids) != num_tokens:
            raise IntegrityError(
                f"the plan of {plan.split} epoch {plan.epoch} has {num_tokens} tokens of example {row}, which are not "
                f"in {reader.folder}; run the stage 'pack' again"
            )
        yield found
