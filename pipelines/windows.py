"""A round that is longer than an example may be, as runs of its own tokens that are trained once each."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.encode import Encoded


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, end); those before `trained_from` are context, trained in the window before."""

    start: int
    trained_from: int
    end: int


def windows(encoded: Encoded, text: str, *, max_tokens: int) -> list[Window]:
    """Cut at the last paragraph that ends in the second half of what fits, else at a line, a sentence, a word.

    A later window begins with up to an eighth of its tokens from the one before it, and one at least: nothing could
    predict its first token otherwise.
    """
    found: list[Window] = []
    start = trained_from = 0
    while True:
        end = min(len(encoded.ids), start + max_tokens)
        if end < len(encoded.ids):
            end = _border(encoded, text, (trained_from + end) // 2 + 1, end)
        found.append(Window(start, trained_from, end))
        if end == len(encoded.ids):
            return found
        trained_from = end
        start = _context_start(encoded, end - max(1, max_tokens // 8), end)


_BORDERS = tuple(map(re.compile, (r"\n\s*\n", r"\n", r"[.!?。！？]\s*", r"\s")))


def _border(encoded: Encoded, text: str, first: int, last: int) -> int:
    """The number of the token to cut before, from `first` to `last`."""
    clean = [token for token in range(first, last + 1) if _is_clean(encoded, token)]
    if not clean:
        return last
    begin, end = int(encoded.starts[clean[0]]), int(encoded.starts[clean[-1]])
    tokens_at = dict(zip(encoded.starts[clean].tolist(), clean, strict=True))
    for border in _BORDERS:
        places = [match.end() for match in border.finditer(text, max(0, begin - 8), end)]
        # A token may begin with the blank before a word: the place itself, or just before it.
        for place in reversed(places):
            if token := tokens_at.get(place) or tokens_at.get(place - 1):
                return token
    return clean[-1]


def _is_clean(encoded: Encoded, token: int) -> bool:
    """Whether a character begins there: tokens can be bytes of one."""
    return bool(encoded.starts[token] >= encoded.ends[token - 1])


def _context_start(encoded: Encoded, first: int, end: int) -> int:
    clean: Iterator[int] = (token for token in range(max(first, 1), end) if _is_clean(encoded, token))
    return next(clean, end - 1)


def clipped(
    starts: np.ndarray, ends: np.ndarray, window: Window
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spans of the round as spans of the window, and which of them it has."""
    starts = np.maximum(starts, max(window.trained_from, window.start + 1))
    ends = np.minimum(ends, window.end)
    kept = starts < ends
    return starts[kept] - window.start, ends[kept] - window.start, kept
