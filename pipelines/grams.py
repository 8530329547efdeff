"""Chats as sets of word 3-grams, each gram a 64-bit hash: what near-duplicates are measured on.

Hashes are blake2b of words and our own mixing, so a set is the same in every process, on every machine and with
every version of the libraries; the hold-out ledger keeps such sets for years.
"""

import hashlib
import itertools
import json
import re
import unicodedata
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.conversation import CONTENT_EXTRAS, Message, utf8

Ints: TypeAlias = npt.NDArray[np.int64]
Hashes: TypeAlias = npt.NDArray[np.uint64]

WORDS_IN_GRAM = 3
GRAMS_TYPE = pa.large_list(pa.uint64())

_MAX_REMEMBERED_WORDS = 2**18  # for the whole life of a process: some 40 MB
_MAX_DIGESTED = 2**20  # hashes at a time
_TEXTS_AT_ONCE = 2**13
_MIXED_AT_ONCE = 2**14  # words whose hashes stay in the cache


class SetsOfRows(Protocol):
    """Sets of which some can be read."""

    def of_rows(self, rows: Ints) -> "GramSets": ...


class StoredSets(SetsOfRows, Protocol):
    """Sets that may lie on the disk: read from the first to the last in blocks, or some of them."""

    def __len__(self) -> int: ...
    @property
    def sizes(self) -> Ints: ...
    def blocks(self, limit: int) -> "Iterator[tuple[int, GramSets]]": ...


@dataclass(frozen=True, slots=True)
class GramSets:
    """Set i is hashes[starts[i]:starts[i + 1]], ascending, each once; starts has one more element than sets."""

    starts: Ints
    hashes: Hashes

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> Ints:
        return np.diff(self.starts)

    def blocks(self, limit: int) -> "Iterator[tuple[int, GramSets]]":
        """Number of the first row and the sets of it and the next ones: together at most `limit` hashes, or one set."""
        for first, end in runs(self.sizes, limit=limit):
            starts = self.starts[first : end + 1]
            yield first, GramSets(starts - starts[0], self.hashes[starts[0] : starts[-1]])

    def of_rows(self, rows: Ints) -> "GramSets":
        """The sets of these rows, in their order."""
        return taken(self, rows)


@dataclass(frozen=True, slots=True)
class JoinedSets:
    """The sets of one, then those of another, wherever they lie."""

    first: StoredSets
    second: StoredSets

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    @property
    def sizes(self) -> Ints:
        return np.concatenate([self.first.sizes, self.second.sizes])

    def blocks(self, limit: int) -> Iterator[tuple[int, GramSets]]:
        yield from self.first.blocks(limit)
        yield from ((len(self.first) + number, block) for number, block in self.second.blocks(limit))

    def of_rows(self, rows: Ints) -> GramSets:
        """The sets of these rows, in their order."""
        is_second = rows >= len(self.first)
        parts = (self.first.of_rows(rows[~is_second]), self.second.of_rows(rows[is_second] - len(self.first)))
        sizes, hashes = (
            np.concatenate([part.sizes for part in parts]),
            np.concatenate([part.hashes for part in parts]),
        )
        read = GramSets(np.concatenate([[0], np.cumsum(sizes)]), hashes)
        place = np.empty(len(rows), np.int64)
        place[np.concatenate([np.flatnonzero(~is_second), np.flatnonzero(is_second)])] = np.arange(len(rows))
        return taken(read, place)


# Scripts written without spaces: there a "word" is a character. Han with kana, bopomofo, their punctuation and
# full-width forms; Thai, Lao, Tibetan, Myanmar, Khmer. Korean has spaces.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3001-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
)
HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")
WORD = re.compile(f"[{_UNSPACED}]|[^\\s{_UNSPACED}]+")


def spoken(message: Message) -> str:
    """A turn's text as it is compared: NFC, white space folded (what two saves of one page have in common)."""
    extras = {name: message.extras[name] for name in CONTENT_EXTRAS if message.extras.get(name)}
    text = f"{message.content} {json.dumps(extras, sort_keys=True)}" if extras else message.content
    return folded(text)


def folded(text: str) -> str:
    """NFC, each stretch of white space one blank."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return " ".join(composed.split())


def compared_text(turns: Iterable[tuple[str, str]]) -> str:
    """The user and assistant turns of (role, text) in one string: near-duplicates look at nothing else."""
    return " ".join(text for role, text in turns if role in ("user", "assistant"))


def words(text: str) -> list[str]:
    """Lower-case words; single characters in scripts that have no spaces."""
    lower = text.lower()
    if lower.isascii() or not HAS_UNSPACED.search(lower):
        return lower.split()
    return WORD.findall(lower)


class _WordHashes(dict[str, int]):
    """blake2b-64 of each word, remembered: `hash` differs from process to process, library hashes by version."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_REMEMBERED_WORDS:
            self.clear()
        value = int.from_bytes(hashlib.blake2b(utf8(word), digest_size=8).digest(), "little")
        self[word] = value
        return value


_word_hashes = _WordHashes()


def gram_sets(texts: Iterable[str]) -> GramSets:
    """Sets of hashed word 3-grams. A text of fewer than 3 words is one gram, one without words the empty set."""
    iterator = iter(texts)
    blocks = []
    while block := list(itertools.islice(iterator, _TEXTS_AT_ONCE)):
        hashes, num_words = _hashed_texts(block)
        num_grams = np.where(num_words > 0, np.maximum(num_words - (WORDS_IN_GRAM - 1), 1), 0)
        blocks.append(_distinct(grams_in_order(hashes, num_words, num_grams, WORDS_IN_GRAM), num_grams))
    sizes = np.concatenate([np.empty(0, np.int64), *(sets.sizes for sets in blocks)])
    hashes = np.concatenate([np.empty(0, np.uint64), *(sets.hashes for sets in blocks)])
    return GramSets(starts=np.concatenate([[0], np.cumsum(sizes)]), hashes=hashes)


def _hashed_texts(texts: list[str]) -> tuple[Hashes, Ints]:
    """As hashed_words of their words, in half the time: Arrow splits, and finds each different word once."""
    spaced = [_spaced_words(text) for text in texts]
    try:
        column = pa.array(spaced, pa.large_string())
    except UnicodeEncodeError:  # lone surrogates
        return hashed_words(map(words, texts))
    lists = pc.split_pattern(column, " ")
    found = lists.values.dictionary_encode()
    vocabulary = np.fromiter(
        map(_word_hashes.__getitem__, found.dictionary.to_pylist()), np.uint64, len(found.dictionary)
    )
    is_empty = pc.equal(column, "").to_numpy(zero_copy_only=False)
    num_words = np.diff(lists.offsets.to_numpy())
    places = found.indices.to_numpy()
    if is_empty.any():  # it is split into one empty word
        places, num_words = places[np.repeat(~is_empty, num_words)], np.where(is_empty, 0, num_words)
    return vocabulary[places], num_words.astype(np.int64)


def _spaced_words(text: str) -> str:
    lower = text.lower()
    if lower.isascii() or not HAS_UNSPACED.search(lower):
        return " ".join(lower.split())
    return " ".join(WORD.findall(lower))


def hashed_words(texts: Iterable[list[str]]) -> tuple[Hashes, Ints]:
    """Hashes of all words one after another, and how many each text has."""
    hashes, num_words = array("Q"), array("q")
    for text in texts:
        hashes.extend(map(_word_hashes.__getitem__, text))
        num_words.append(len(text))
    return np.array(hashes, np.uint64), np.array(num_words, np.int64)


def grams_in_order(hashes: Hashes, num_words: Ints, num_grams: Ints, words_in_gram: int) -> Hashes:
    """The first `num_grams` grams of each text, in their order; words behind the end of a text count as 0."""
    text_ends = np.cumsum(num_words)
    first = ragged(text_ends - num_words, num_grams)
    grams = _grams_of_all(hashes, words_in_gram)[first]
    short = np.flatnonzero(first + words_in_gram > np.repeat(text_ends, num_grams))
    end = np.repeat(text_ends, num_grams)[short]
    cut = np.zeros(len(short), np.uint64)
    for step in range(words_in_gram):
        place = first[short] + step
        word = np.where(place < end, hashes[np.minimum(place, len(hashes) - 1)], np.uint64(0))
        cut = mixed(cut + word)
    grams[short] = cut
    return grams


def _grams_of_all(hashes: Hashes, words_in_gram: int) -> Hashes:
    """The gram that begins at each word, whatever text the words are of."""
    grams = np.zeros(len(hashes), np.uint64)
    padded = np.append(hashes, np.zeros(words_in_gram, np.uint64))
    for start in range(0, len(hashes), _MIXED_AT_ONCE):
        block = grams[start : start + _MIXED_AT_ONCE]
        for step in range(words_in_gram):
            block[:] = mixed(block + padded[start + step : start + step + len(block)])
    return grams


def _distinct(grams: Hashes, num_grams: Ints) -> GramSets:
    ends = np.cumsum(num_grams)
    for start, end in zip((ends - num_grams).tolist(), ends.tolist(), strict=True):
        grams[start:end].sort()
    keep = np.ones(len(grams), bool)
    keep[1:] = grams[1:] != grams[:-1]
    keep[(ends - num_grams)[num_grams > 0]] = True
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    return GramSets(starts=kept_before[np.concatenate([[0], ends])], hashes=grams[keep])


def mixed(values: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele et al. 2014) behind its increment: a bijection of 64 bits."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def set_digests(sets: StoredSets) -> Hashes:
    """64 bits for each set, equal for equal sets."""
    blocks = (_digests_of_block(block) for _, block in sets.blocks(_MAX_DIGESTED))
    return np.concatenate([np.empty(0, np.uint64), *blocks])


def _digests_of_block(sets: GramSets) -> Hashes:
    before = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed(sets.hashes), dtype=np.uint64)])
    return before[sets.starts[1:]] - before[sets.starts[:-1]]


def to_column(starts: Ints, hashes: Hashes) -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(pa.array(starts), pa.array(hashes))


def from_column(column: pa.ChunkedArray) -> GramSets:
    """Reads a column of GRAMS_TYPE without nulls; chunks may be slices."""
    lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], GRAMS_TYPE)
    starts = lists.offsets.to_numpy() if len(lists) else np.zeros(1, np.int64)
    values = lists.values.to_numpy()[starts[0] : starts[-1]]
    return GramSets(starts=starts - starts[0], hashes=values)


def taken(sets: GramSets, rows: Ints) -> GramSets:
    """The sets of these rows, in their order."""
    sizes = sets.sizes[rows]
    hashes = sets.hashes[ragged(sets.starts[rows], sizes)]
    return GramSets(starts=np.concatenate([[0], np.cumsum(sizes)]), hashes=hashes)


def concatenated(first: GramSets, second: GramSets) -> GramSets:
    starts = np.concatenate([first.starts, second.starts[1:] + first.starts[-1]])
    return GramSets(starts=starts, hashes=np.concatenate([first.hashes, second.hashes]))


def ragged(starts: Ints, lengths: Ints) -> Ints:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), starts[1], ...: indices of many slices."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def runs(weights: npt.NDArray[Any], *, limit: int, max_items: int | None = None) -> Iterator[tuple[int, int]]:
    """Consecutive [start, end) whose weights sum to at most `limit`, or that hold a single item."""
    total = np.cumsum(weights)
    start = 0
    while start < len(weights):
        before = total[start - 1] if start else 0
        end = max(int(np.searchsorted(total, before + limit, side="right")), start + 1)
        end = min(end, start + max_items) if max_items else end
        yield start, end
        start = end
