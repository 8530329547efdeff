"""Two fast ways to what tokenizers gives, for texts on which they are proved to give the same.

The optional package gigatoken encodes some 30 times as fast as tokenizers. Without it, and for tokenizers that it
does not know, texts are cut into words by the tokenizer's own patterns, and tokenizers encodes each different word
once: 3 times as fast. Both give ids alone. For tokenizers that write every byte of the text into exactly one token,
and nothing else, the places follow from the tokens' lengths; texts whose lengths don't add up are left to tokenizers.
Nobody relies on either unproved: see pipelines.encode.proved_on.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from tokenizers import Tokenizer

from pipelines.word_encoding import word_encoder

EncodeIds: TypeAlias = Callable[[str], np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class FastBackend:
    """How to get the ids of a text, and the bytes that each id stands for, int64 [ids]."""

    encode_ids: EncodeIds
    num_bytes: np.ndarray

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Ids and the characters [start, end) of each, int32 [tokens]; None for a text that it can't place."""
        try:
            utf8 = text.encode()
        except UnicodeEncodeError:
            return None
        with _failures_left_to_tokenizers():
            ids = self.encode_ids(text)
            lengths = self.num_bytes[ids]
            ends = np.cumsum(lengths)
            if int(lengths.sum()) == len(utf8):
                return ids.astype(np.int32), *_characters(utf8, ends - lengths, ends)
        return None


def fast_backend(backend: Tokenizer) -> FastBackend | None:
    """The fastest way known for this tokenizer; None where there is none."""
    return by_gigatoken(backend) or by_words(backend)


def by_gigatoken(backend: Tokenizer) -> FastBackend | None:
    """None where the package is absent or does not know the tokenizer's kind."""
    try:
        from gigatoken.gigatoken_rs import load_hf_json
    except ImportError:
        return None
    with _failures_left_to_tokenizers():
        tokenizer = load_hf_json(backend.to_str())
        return FastBackend(tokenizer.encode, _lengths(tokenizer.vocab))
    return None


def by_words(backend: Tokenizer) -> FastBackend | None:
    """None for other kinds than byte-level BPE."""
    encode_ids = word_encoder(backend)
    if encode_ids is None:
        return None
    # In a byte-level vocabulary a character stands for a byte.
    sizes = {token_id: piece.encode("latin-1", "replace") for piece, token_id in backend.get_vocab().items()}
    added = backend.get_added_tokens_decoder()
    return FastBackend(
        encode_ids, _lengths(sizes | {token_id: token.content.encode() for token_id, token in added.items()})
    )


def _lengths(vocabulary: dict[int, bytes]) -> np.ndarray:
    num_bytes = np.zeros(max(vocabulary, default=-1) + 1, np.int64)
    num_bytes[list(vocabulary)] = [len(token) for token in vocabulary.values()]
    return num_bytes


def _characters(utf8: bytes, byte_starts: np.ndarray, byte_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Characters [start, end) that hold bytes [start, end)."""
    if utf8.isascii():
        return byte_starts.astype(np.int32), byte_ends.astype(np.int32)
    begins_character = (np.frombuffer(utf8, np.uint8) & 0xC0) != 0x80
    character = np.cumsum(begins_character, dtype=np.int32) - 1
    return character[byte_starts], character[byte_ends - 1] + 1


@contextlib.contextmanager
def _failures_left_to_tokenizers() -> Iterator[None]:
    """Goes on behind the block where it fails: tokenizers does the work then, or says what is wrong."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError):
        return
    except BaseException as error:
        # What Rust raises where it gives up is no Exception.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
