"""Shards for other trainers: the columns `labels` and `assistant_masks`, made of the trained spans.

    from datasets import load_from_disk
    from pipelines.labels import add_labels

    train = load_from_disk("runs/first/06_shards")["train"].map(add_labels, batched=True)

TRL's SFTTrainer takes this data set as it is (set max_length=None, or at least split.max_tokens). For a look without
a copy on the disk use `.with_transform(add_labels)`. As everywhere at Hugging Face, a label stands at its own token's
place and the model shifts. Weights of messages other than 0 and 1 have no place in labels; `span_weights` has them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

IGNORED = -100
"""What cross entropy leaves out."""


def add_labels(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[np.ndarray]]:
    """Of a batch of examples, columns as lists: input_ids, labels (int64), assistant_masks (0 or 1, int8)."""
    columns = (batch[name] for name in ("input_ids", "span_starts", "span_ends", "span_weights"))
    found: dict[str, list[np.ndarray]] = {"input_ids": [], "labels": [], "assistant_masks": []}
    for input_ids, starts, ends, weights in zip(*columns, strict=True):
        ids = np.asarray(input_ids, np.int64)
        mask = trained_mask(len(ids), starts, ends, weights)
        found["input_ids"].append(ids)
        found["labels"].append(np.where(mask, ids, IGNORED))
        found["assistant_masks"].append(mask.astype(np.int8))
    return found


def trained_mask(
    num_tokens: int, starts: Sequence[int], ends: Sequence[int], weights: Sequence[float]
) -> np.ndarray:
    """bool [tokens]: True for targets. The first token is never one, since nothing stands before it."""
    mask = np.zeros(num_tokens, np.bool_)
    for start, end, weight in zip(starts, ends, weights, strict=True):
        mask[max(start, 1) : end] = weight > 0
    return mask
