"""The text of an example as the model reads it, in pieces: trained or only read, text or control token."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

_WINDOW_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ColouredPiece:
    """A run of tokens of one kind. `weight` is that of its loss: 0 is read and not trained."""

    text: str
    weight: float
    is_control: bool


def coloured_pieces(
    tokenizer: Any, is_control: np.ndarray, example: Mapping[str, Any]
) -> list[ColouredPiece]:
    """The text of an example in order; joined, the pieces are what the tokenizer decodes.

    `tokenizer` is a transformers tokenizer, `is_control` bool [ids]; `example` is a row of schemas.dataset.SHARD.
    """
    ids = np.asarray(example["input_ids"], np.int64)
    weights = np.zeros(len(ids), np.float32)
    spans = zip(example["span_starts"], example["span_ends"], example["span_weights"], strict=True)
    for start, end, weight in spans:
        weights[start:end] = weight
    controls, listed = is_control[ids], ids.tolist()
    changes = (np.diff(weights) != 0) | (np.diff(controls) != 0)
    borders = [0, *(np.flatnonzero(changes) + 1).tolist(), len(ids)]
    return [
        ColouredPiece(text, float(weights[start]), bool(controls[start]))
        for start, end in pairwise(borders)
        if (text := _decoded(tokenizer, listed, start, end))
    ]


def _decoded(tokenizer: Any, ids: list[int], start: int, end: int) -> str:
    """The text of tokens [start, end).

    Decoded with some tokens before it: decoders strip the blank before the first word of what they are given.
    """
    first = max(0, start - _WINDOW_TOKENS)
    before, text = (
        tokenizer.decode(ids[first:last], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for last in (start, end)
    )
    return str(text[len(before) :])
