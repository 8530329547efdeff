"""Documents that are not packed: each is a row of its own, padded behind its end to the longest of its batch.

    computed_batches(plan, reader, first, end, ...)    what is computed at once of some bins, packed or padded
    num_padded_tokens(lengths, ...)                    how many tokens that are, padding counted

Nothing of a step changes but its layout: the same documents, weights and divisor. A batch has a budget of tokens,
padding counted, and takes documents of like length.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from pipelines.bins import by_length
from trainer.data import MicroBatch, PaddedRow, Plan, micro_batch, read_documents, trained_places
from trainer.shard_reader import Example, ShardReader

PADDED_MULTIPLE = 8
"""On CUDA rows are as long as that: its tensor cores take numbers in eights."""


def computed_batches(
    plan: Plan,
    reader: ShardReader,
    first_bin: int,
    end_bin: int,
    *,
    tokens_per_bin: int | None,
    pad_multiple: int | None = None,
) -> Iterator[MicroBatch]:
    """Bins [first_bin, end_bin) on the CPU. Without `tokens_per_bin` they are one packed row; with it, rows are
    padded, and a batch has at most so many tokens for each of the bins.
    """
    if tokens_per_bin is None:
        yield micro_batch(plan, reader, first_bin, end_bin, pad_multiple=pad_multiple)
        return
    first_place = plan.documents(first_bin, end_bin).start
    examples = list(read_documents(plan, reader, first_bin, end_bin))
    lengths = np.array([len(example.input_ids) for example in examples], np.int64)
    for numbers in cut_by_length(lengths, max_tokens=tokens_per_bin * (end_bin - first_bin)):
        yield collate_padded(
            [examples[number] for number in numbers],
            places=[first_place + number for number in numbers],
            pad_multiple=PADDED_MULTIPLE if pad_multiple else 1,
        )


def cut_by_length(lengths: np.ndarray, *, max_tokens: int) -> list[list[int]]:
    """Numbers of the documents of each batch, long ones first, each batch within the budget once it is padded."""
    some = np.flatnonzero(lengths)
    found = by_length(lengths, some, max_tokens, 0)
    borders = np.flatnonzero(np.diff(found.bins, prepend=-1, append=found.num_bins))
    return [found.entries[start:end].tolist() for start, end in pairwise(borders.tolist())]


def collate_padded(
    examples: Sequence[Example], *, places: Sequence[int] | None = None, pad_multiple: int = 1
) -> MicroBatch:
    """A row for each document. `places` are their numbers in the plan, by default in this batch."""
    lengths = [len(example.input_ids) for example in examples]
    width = -(-max(lengths) // pad_multiple) * pad_multiple
    input_ids = np.zeros((len(examples), width), np.int64)
    for row, example in zip(input_ids, examples, strict=True):
        row[: len(example.input_ids)] = example.input_ids
    borders = np.arange(len(examples) + 1) * width
    targets, weights, documents = trained_places(examples, borders)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(width).expand(len(examples), width),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
        max_seqlen=width,
        target_positions=torch.from_numpy(targets - 1),
        targets=torch.from_numpy(input_ids.ravel()[targets]),
        weights=torch.from_numpy(weights),
        target_documents=torch.from_numpy(documents),
        rows=tuple(example.row for example in examples),
        num_tokens=sum(lengths),
        num_trained_tokens=len(targets),
        padded_rows=tuple(
            PaddedRow(place, length)
            for place, length in zip(places or range(len(examples)), lengths, strict=True)
        ),
    )


def num_padded_tokens(lengths: np.ndarray, *, max_tokens: int) -> int:
    """Tokens that are computed for documents of these lengths, padding counted."""
    batches = cut_by_length(lengths, max_tokens=max_tokens)
    return sum(len(numbers) * int(lengths[numbers].max()) for numbers in batches)
