"""Byte-level BPE word by word: a text is cut by the tokenizer's own patterns, and each different word encoded once."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import regex
from tokenizers import Tokenizer
from tokenizers.models import BPE

from pipelines.tokenizer_files import copied

# The pattern of GPT-2, which the pre-tokenizer ByteLevel applies by itself.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MAX_REMEMBERED_WORDS = 2**18
_MAX_REMEMBERED_CHARS = 64


def word_encoder(backend: Tokenizer) -> Callable[[str], np.ndarray] | None:
    """Text to ids, int32 [tokens]; None for a tokenizer of another kind than byte-level BPE without normalisation."""
    if not isinstance(backend.model, BPE) or backend.model.dropout or backend.model.byte_fallback:
        return None
    # Without the vocabulary, whose JSON takes half a second to read.
    patterns = _patterns(json.loads(copied(backend, BPE()).to_str()))
    known = backend.get_added_tokens_decoder()
    if patterns is None or any(token.lstrip or token.rstrip or token.single_word for token in known.values()):
        return None
    words = _Words(backend)
    added_ids = {token.content: token_id for token_id, token in known.items()}
    longest_first = sorted(added_ids, key=len, reverse=True)
    added = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode(text: str) -> np.ndarray:
        ids: list[int] = []
        for piece in added.split(text):
            if (token_id := added_ids.get(piece)) is not None:
                ids.append(token_id)
            elif piece:
                ids.extend(chain.from_iterable(map(words.__getitem__, _cut(piece, patterns))))
        return np.array(ids, np.int32)

    return encode


class _Words(dict[str, tuple[int, ...]]):
    """The ids of words, encoded by the tokenizer's model when first asked for."""

    def __init__(self, backend: Tokenizer) -> None:
        super().__init__()
        self.model = backend.model
        self.letters = _byte_letters()

    def __missing__(self, word: str) -> tuple[int, ...]:
        letters = "".join([self.letters[byte] for byte in word.encode()])
        ids = tuple(token.id for token in self.model.tokenize(letters))
        if len(self) >= _MAX_REMEMBERED_WORDS:
            self.clear()
        if len(word) <= _MAX_REMEMBERED_CHARS:
            self[word] = ids
        return ids


def _byte_letters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself where it is printed."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _cut(text: str, patterns: Sequence[regex.Pattern[str]]) -> list[str]:
    pieces = [text]
    for pattern in patterns:
        pieces = [word for piece in pieces for word in _isolated(piece, pattern)]
    return pieces


def _isolated(text: str, pattern: regex.Pattern[str]) -> list[str]:
    """The matches and what lies between them, in order."""
    found: list[str] = pattern.findall(text)
    if sum(map(len, found)) == len(text):
        return found
    pieces, end = [], 0
    for match in pattern.finditer(text):
        pieces += [text[end : match.start()], match.group()]
        end = match.end()
    return [piece for piece in (*pieces, text[end:]) if piece]


# The kinds of tokenizers that are known ---------------------------------------------------------------------


def _patterns(state: Mapping[str, Any]) -> list[regex.Pattern[str]] | None:
    """What the pre-tokenizers cut by, in order; None where the tokenizer does anything else besides."""
    normalizer = state["normalizer"]
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        return None
    steps = _steps(state["pre_tokenizer"])
    if not steps or steps[-1]["type"] != "ByteLevel" or any(map(_is_strange, steps)):
        return None
    sources = [source for step in steps if (source := _source(step))]
    patterns = [regex.compile(source) for source in sources]
    return None if any(pattern.groups for pattern in patterns) else patterns


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for inner in pre_tokenizer["pretokenizers"] for step in _steps(inner)]
    return [pre_tokenizer]


def _is_strange(step: Mapping[str, Any]) -> bool:
    if step["type"] == "ByteLevel":
        return bool(step["add_prefix_space"])
    if step["type"] == "Split":
        return step["behavior"] != "Isolated" or bool(step["invert"]) or "Regex" not in step["pattern"]
    return step["type"] != "Digits"


def _source(step: Mapping[str, Any]) -> str:
    if step["type"] == "ByteLevel":
        return _GPT2_PATTERN if step.get("use_regex", True) else ""
    if step["type"] == "Split":
        return str(step["pattern"]["Regex"])
    return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
