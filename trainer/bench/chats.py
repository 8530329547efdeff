"""Made chats whose lengths are drawn: the same file for the same numbers, on any machine."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from trainer.bench.words import TOKENS_BESIDE_WORDS, words_of

TRAINED_SHARE = 0.65
"""Of a chat's tokens: the answers with their end tokens."""
FEWEST_TOKENS = 16
ROUND_TOKENS = 400
"""A longer chat has more rounds than one."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a chat: log-normal, cut off at both ends."""

    mean_of_log: float
    deviation_of_log: float
    longest: int


LENGTHS: Mapping[str, Lengths] = MappingProxyType(
    {
        "alpaca": Lengths(4.55, 0.55, 512),  # 110 tokens on average
        "long": Lengths(6.6, 0.9, 16384),  # 1,100
        "whole": Lengths(40.0, 0.0, 2**40),  # always as long as a bin
    }
)


def draw_lengths(kind: str, *, num_tokens: int, num_chats: int, longest: int, seed: int = 0) -> np.ndarray:
    """Of so many chats, and of more until they have that many tokens together; int64 [chats]."""
    lengths = LENGTHS[kind]
    draws = np.random.default_rng(seed)
    drawn = np.zeros(0, np.int64)
    while len(drawn) < num_chats or drawn.sum() < num_tokens:
        more = draws.lognormal(lengths.mean_of_log, lengths.deviation_of_log, 4096)
        drawn = np.append(drawn, np.clip(more, FEWEST_TOKENS, min(lengths.longest, longest)).astype(np.int64))
    needed = int(np.searchsorted(np.cumsum(drawn), num_tokens)) + 1
    return drawn[: max(needed, num_chats)]


def write_dump(path: Path, lengths: np.ndarray, *, vocabulary_size: int, seed: int = 0) -> None:
    """JSON lines of chats that have so many tokens once they are rendered by the template of words.py."""
    words = words_of(vocabulary_size)
    draws = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for length in lengths.tolist():
            turns = [
                {"role": role, "content": " ".join(words[draws.integers(0, len(words), count)])}
                for role, count in turn_words(length)
            ]
            file.write(json.dumps({"messages": turns}) + "\n")


def turn_words(length: int) -> Iterator[tuple[str, int]]:
    """(role, number of words) of the turns of a chat of `length` tokens."""
    num_rounds = max(1, length // ROUND_TOKENS)
    for number in range(num_rounds):
        num_tokens = length * (number + 1) // num_rounds - length * number // num_rounds
        num_trained = round(TRAINED_SHARE * num_tokens)  # the words of the answer and its end
        yield "user", num_tokens - num_trained - 2 * TOKENS_BESIDE_WORDS + 1
        yield "assistant", num_trained - 1
