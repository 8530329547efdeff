"""Runs of words that texts have in common: an index of many texts, and how much of each a turn holds."""

import functools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipelines.grams import (
    HAS_UNSPACED,
    WORD,
    Hashes,
    Ints,
    grams_in_order,
    hashed_words,
    ragged,
    runs,
    words,
)

MAX_ITEMS_OF_GRAM = 50

_MAX_EXPANDED = 2**22  # pairs of a turn and a place in a text that stand in memory at a time
_AROUND_WORDS = ".,;:!?…\"'`´‘’“”„«»()[]{}<>*_#|~$\\。、，；：！？「」『』（）【】《》〈〉・"


class Hit(NamedTuple):
    """Turn `turn` of a list of turns holds this share of the words of item `item`."""

    turn: int
    item: int
    share: float


@dataclass(frozen=True, slots=True)
class TextIndex:
    """The runs of words of many texts. Words of all texts are numbered through.

    `grams` are ascending and different; gram i stands at places[starts[i]:starts[i + 1]]. `counted` has the number
    of counted words before each word, `ends` the number of the word behind each text.
    """

    words_in_gram: int
    grams: Hashes
    starts: Ints
    places: Ints
    counted: Ints
    ends: Ints

    @property
    def num_counted(self) -> Ints:
        """Counted words of each text."""
        return np.diff(self.counted[np.concatenate([[0], self.ends])])


def text_index(texts: list[str], words_in_gram: int) -> TextIndex:
    """Without the runs that more than MAX_ITEMS_OF_GRAM different texts share."""
    hashes, num_words = hashed_words(map(plain_words, texts))
    num_grams = np.maximum(num_words - (words_in_gram - 1), 0)
    ends = np.cumsum(num_words)
    places = ragged(ends - num_words, num_grams)
    grams = grams_in_order(hashes, num_words, num_grams, words_in_gram)
    owners = np.repeat(_numbers_of_different(texts), num_grams)
    is_common = _are_common(grams, owners)
    is_covered = _covered(places, len(hashes), words_in_gram)
    is_counted = is_covered & ~_covered(places[is_common], len(hashes), words_in_gram)
    counted = np.concatenate([[0], np.cumsum(is_counted)])
    # What has too few words of its own has no counted ones.
    enough = np.diff(counted[np.concatenate([[0], ends])]) >= words_in_gram
    is_counted &= np.repeat(enough, num_words)
    chosen = ~is_common & np.repeat(enough, num_grams)
    order = np.argsort(grams[chosen], kind="stable")
    different, first = np.unique(grams[chosen][order], return_index=True)
    return TextIndex(
        words_in_gram,
        grams=different,
        starts=np.append(first, len(order)),
        places=places[chosen][order],
        counted=np.concatenate([[0], np.cumsum(is_counted)]),
        ends=ends,
    )


def hits_by_words(
    hashes: Hashes, num_words: Ints, searched: Ints, texts: TextIndex, min_share: float
) -> Iterator[Hit]:
    """`searched` is `num_words`, or 0 for a turn that is left out."""
    num_grams = np.maximum(searched - (texts.words_in_gram - 1), 0)
    grams = grams_in_order(hashes, num_words, num_grams, texts.words_in_gram)
    if not len(texts.grams) or not len(grams):
        return
    gram = np.minimum(np.searchsorted(texts.grams, grams), len(texts.grams) - 1)
    shared = np.flatnonzero(texts.grams[gram] == grams)
    turn, gram = np.repeat(np.arange(len(num_words)), num_grams)[shared], gram[shared]
    num_places = np.diff(texts.starts)
    for start, end in _runs_of_turns(turn, num_places[gram]):
        places = texts.places[ragged(texts.starts[gram[start:end]], num_places[gram[start:end]])]
        owners = np.repeat(turn[start:end], num_places[gram[start:end]])
        yield from _shares(owners, places, texts, min_share)


def _runs_of_turns(turn: Ints, weights: Ints) -> Iterator[tuple[int, int]]:
    """Slices of whole turns, so that all that a turn shares with a text is counted together."""
    if len(turn):
        _, first = np.unique(turn, return_index=True)
        borders = np.append(first, len(turn))
        total = np.concatenate([[0], np.cumsum(weights)])
        for start, end in runs(np.diff(total[borders]), limit=_MAX_EXPANDED):
            yield int(borders[start]), int(borders[end])


def _shares(turn: Ints, places: Ints, texts: TextIndex, min_share: float) -> Iterator[Hit]:
    """Of each turn and each text that it shares runs with: the share of counted words, where it is large enough."""
    num_words = len(texts.counted)
    pairs = np.unique(turn * num_words + places)
    turn, places = pairs // num_words, pairs % num_words
    item = np.searchsorted(texts.ends, places, side="right")
    is_first = np.ones(len(pairs), bool)
    is_first[1:] = (turn[1:] != turn[:-1]) | (item[1:] != item[:-1])
    # A run ends where the next one begins, if that is earlier.
    ends = places + texts.words_in_gram
    ends[:-1] = np.where(is_first[1:], ends[:-1], np.minimum(ends[:-1], places[1:]))
    words_in_common = texts.counted[ends] - texts.counted[places]
    first = np.flatnonzero(is_first)
    shares = np.add.reduceat(words_in_common, first) / np.maximum(texts.num_counted[item[first]], 1)
    for at, share in zip(first.tolist(), shares.tolist(), strict=True):
        if share >= min_share:
            yield Hit(int(turn[at]), int(item[at]), share)


# --- words ---------------------------------------------------------------------------------------------------


def plain_words(text: str) -> list[str]:
    """Lower-case words without the punctuation around them."""
    return [plain for word in words(_composed(text)) if (plain := word.strip(_AROUND_WORDS))]


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def whole_text(text: str) -> str:
    """What must be equal where a question is a whole turn."""
    return " ".join(_composed(text).lower().split()).strip(_AROUND_WORDS + " ")


@functools.lru_cache(maxsize=1)  # a turn may have many hits
def words_with_places(text: str) -> tuple[list[str], list[int]]:
    """plain_words of a text, and where in it each begins."""
    pattern = WORD if HAS_UNSPACED.search(text) else _SPACED_WORD
    found = ((word.group().lower().strip(_AROUND_WORDS), word.start()) for word in pattern.finditer(text))
    kept = [(plain, start) for plain, start in found if plain]
    return [plain for plain, _ in kept], [start for _, start in kept]


_SPACED_WORD = re.compile(r"\S+")


# --- the index -----------------------------------------------------------------------------------------------


def _numbers_of_different(texts: list[str]) -> Ints:
    """Equal texts have equal numbers: one that stands in a file a hundred times is no template."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(whole_text(text), len(numbers)) for text in texts], np.int64)


def _are_common(grams: Hashes, owners: Ints) -> np.ndarray:
    """Which grams stand in more than MAX_ITEMS_OF_GRAM different texts."""
    _, ids = np.unique(grams, return_inverse=True)
    num_owners = int(owners.max()) + 1 if len(owners) else 1
    pairs = np.unique(ids * num_owners + owners)
    num_texts = np.bincount(pairs // num_owners, minlength=int(ids.max()) + 1 if len(ids) else 0)
    return np.asarray(num_texts[ids] > MAX_ITEMS_OF_GRAM)


def _covered(places: Ints, num_words: int, words_in_gram: int) -> np.ndarray:
    """Which words stand in the grams that begin at `places`."""
    changes = np.zeros(num_words + 1, np.int64)
    np.add.at(changes, places, 1)
    np.add.at(changes, np.minimum(places + words_in_gram, num_words), -1)
    return np.asarray(np.cumsum(changes[:-1]) > 0)
