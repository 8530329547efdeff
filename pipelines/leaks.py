"""Benchmark leaks: which chats hold a question or an answer of a benchmark.

Questions are looked for in every turn, answers in assistant turns, each by runs of words: a text is leaked when so
many of its words as `dedup.leak_share` says stand in runs of `dedup.leak_words` words that one turn holds too, in
whatever order. A question that is a whole user turn is leaked however short it is.

What more than MAX_ITEMS_OF_GRAM texts of the benchmarks share (instructions, headers) proves nothing: words in such
runs are not counted, and a text with fewer than `dedup.leak_words` others is looked for as a whole user turn only.
Case, white space and punctuation around words don't matter.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

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
from schemas.conversation import Conversation, Drop, Message, Role, utf8
from schemas.pipeline_config import PipelineConfig

Kind: TypeAlias = Literal["question", "answer"]

LEAKS = pa.schema(
    [
        pa.field("row_id", pa.large_string(), nullable=False),
        pa.field("source", pa.large_string(), nullable=False),
        pa.field("record", pa.int64(), nullable=False),
        pa.field("turn", pa.int64(), nullable=False),  # from 0
        pa.field("role", pa.large_string(), nullable=False),
        pa.field("kind", pa.large_string(), nullable=False),  # of the benchmark's text: question or answer
        pa.field("benchmark", pa.large_string(), nullable=False),
        pa.field("benchmark_file", pa.large_string(), nullable=False),
        pa.field("benchmark_record", pa.int64(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),  # of the benchmark's words; 1 for a whole turn
        pa.field("chat_text", pa.large_string(), nullable=False),  # from the first shared word on
        pa.field("benchmark_text", pa.large_string(), nullable=False),
    ]
)
"""One line a hit, by row and turn; texts are cut to MAX_SHOWN_CHARS, a row has at most MAX_HITS_OF_ROW."""

MAX_ITEMS_OF_GRAM = 50
MAX_SHOWN_CHARS = 600
MAX_HITS_OF_ROW = 20

_MAX_EXPANDED = 2**22  # pairs of a turn and a place in a benchmark that stand in memory at a time
_AROUND_WORDS = ".,;:!?…\"'`´‘’“”„«»()[]{}<>*_#|~$\\。、，；：！？「」『』（）【】《》〈〉・"
_REASONS = {"question": "leaked_question", "answer": "leaked_answer"}


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


@dataclass(frozen=True, slots=True)
class LeakIndex:
    """What chats are searched for; numbers of items are lines of the table of items."""

    items: list[dict[str, Any]]
    by_words: dict[Kind, TextIndex]
    whole_questions: dict[str, list[int]]
    min_share: float


def build_index(items: pa.Table, config: PipelineConfig) -> LeakIndex:
    """`items` are those of benchmark_files.read_benchmarks."""
    kinds: tuple[Kind, ...] = ("question", "answer")
    by_words = {kind: _text_index(items[kind].to_pylist(), config.dedup.leak_words) for kind in kinds}
    wholes: dict[str, list[int]] = {}
    for number, question in enumerate(items["question"].to_pylist()):
        if whole := _whole(question):
            wholes.setdefault(whole, []).append(number)
    return LeakIndex(items.to_pylist(), by_words, wholes, config.dedup.leak_share)


def find_leaks(rows: Iterable[Conversation], index: LeakIndex) -> pa.Table:
    """All hits in the order of the rows, schema LEAKS."""
    turns = [
        _Turn(number, row, place) for number, row in enumerate(rows) for place in range(len(row.messages))
    ]
    hits: dict[int, list[tuple[Kind, Hit]]] = {}
    for kind, hit in _hits([(turn.message.role, turn.message.content) for turn in turns], index):
        hits.setdefault(turns[hit.turn].row_number, []).append((kind, hit))
    # Cut before texts are looked up: a chat may hold a whole benchmark.
    best = (sorted(hits[number], key=_best_first)[:MAX_HITS_OF_ROW] for number in sorted(hits))
    lines = [_line(turns[hit.turn], kind, hit, index) for found in best for kind, hit in found]
    return pa.Table.from_pylist(lines, schema=LEAKS)


def leak_drops(leaks: pa.Table) -> dict[str, Drop]:
    """A drop for each row with a hit, told by its first line: questions before answers, the largest share first."""
    drops: dict[str, Drop] = {}
    for hit in leaks.to_pylist():
        detail = (
            f"turn {hit['turn']} holds {hit['share']:.0%} of the words of the {hit['kind']} of {hit['benchmark']} "
            f"{hit['benchmark_file']} record {hit['benchmark_record']}"
        )
        drops.setdefault(hit["row_id"], Drop(_REASONS[hit["kind"]], detail))
    return drops


def counts(leaks: pa.Table, index: LeakIndex) -> dict[str, int]:
    """What was looked for and what was found, for the manifest."""
    rows: dict[str, set[str]] = {item["benchmark"]: set() for item in index.items}
    for row_id, benchmark in zip(leaks["row_id"].to_pylist(), leaks["benchmark"].to_pylist(), strict=True):
        rows[benchmark].add(row_id)
    questions, answers = index.by_words["question"].num_counted, index.by_words["answer"].num_counted
    has = {kind: np.array([bool(item[kind]) for item in index.items], bool) for kind in index.by_words}
    return {
        "benchmark_items": len(index.items),
        "benchmark_questions_as_whole_turns_only": int((has["question"] & (questions == 0)).sum()),
        "benchmark_answers_too_short": int((has["answer"] & (answers == 0)).sum()),
        "leak_hits": leaks.num_rows,
        "leak_rows": len(set().union(*rows.values())),
        **{f"leak_rows_{name}": len(found) for name, found in sorted(rows.items())},
    }


# --- the index --------------------------------------------------------------------------------------------------


def plain_words(text: str) -> list[str]:
    """Lower-case words without the punctuation around them."""
    return [plain for word in words(_composed(text)) if (plain := word.strip(_AROUND_WORDS))]


def _composed(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _whole(text: str) -> str:
    """What must be equal where a question is a whole turn."""
    return " ".join(_composed(text).lower().split()).strip(_AROUND_WORDS + " ")


def _text_index(texts: list[str], words_in_gram: int) -> TextIndex:
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


def _numbers_of_different(texts: list[str]) -> Ints:
    """Equal texts have equal numbers: one that stands in a file a hundred times is no template."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(_whole(text), len(numbers)) for text in texts], np.int64)


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


# --- the search -------------------------------------------------------------------------------------------------


def _hits(turns: list[tuple[Role, str]], index: LeakIndex) -> Iterator[tuple[Kind, Hit]]:
    """Hits of questions, then of answers; a question that is a whole turn is not told again by its words."""
    whole: set[tuple[int, int]] = set()
    for turn, (role, text) in enumerate(turns):
        for item in index.whole_questions.get(_whole(text), ()) if role == "user" else ():
            whole.add((turn, item))
            yield "question", Hit(turn, item, 1.0)
    hashes, num_words = hashed_words(plain_words(text) for _, text in turns)
    is_assistant = np.array([role == "assistant" for role, _ in turns], bool)
    for kind, texts in index.by_words.items():
        searched = num_words if kind == "question" else np.where(is_assistant, num_words, 0)
        for hit in _hits_by_words(hashes, num_words, searched, texts, index.min_share):
            if (hit.turn, hit.item) not in whole or kind == "answer":
                yield kind, hit


def _hits_by_words(
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


# --- the report -------------------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    row_number: int
    row: Conversation
    place: int

    @property
    def message(self) -> Message:
        return self.row.messages[self.place]


def _line(turn: _Turn, kind: Kind, hit: Hit, index: LeakIndex) -> dict[str, Any]:
    item = index.items[hit.item]
    words_in_gram = index.by_words[kind].words_in_gram
    return {
        "row_id": turn.row.row_id,
        "source": turn.row.source,
        "record": turn.row.record,
        "turn": turn.place,
        "role": turn.message.role,
        "kind": kind,
        "benchmark": item["benchmark"],
        "benchmark_file": item["file"],
        "benchmark_record": item["record"],
        "share": round(hit.share, 4),
        "chat_text": _storable(_from_first_shared(turn.message.content, item[kind], words_in_gram)),
        "benchmark_text": _storable(item[kind][:MAX_SHOWN_CHARS]),
    }


def _best_first(found: tuple[Kind, Hit]) -> tuple[bool, float, int, int]:
    kind, hit = found
    return kind != "question", -hit.share, hit.item, hit.turn


def _from_first_shared(text: str, wanted: str, words_in_gram: int) -> str:
    """The turn from the first run of words on that it shares with `wanted`; from its start where there is none."""
    sought = plain_words(wanted)
    grams = {tuple(sought[n : n + words_in_gram]) for n in range(len(sought) - words_in_gram + 1)}
    first_words = {gram[0] for gram in grams}
    said, starts = _words_with_places(text)
    for number, word in enumerate(said):
        if word in first_words and tuple(said[number : number + words_in_gram]) in grams:
            return text[starts[number] : starts[number] + MAX_SHOWN_CHARS]
    return text[:MAX_SHOWN_CHARS]


@functools.lru_cache(maxsize=1)  # a turn may have many hits
def _words_with_places(text: str) -> tuple[list[str], list[int]]:
    """plain_words of a text, and where in it each begins."""
    pattern = WORD if HAS_UNSPACED.search(text) else _SPACED_WORD
    found = ((word.group().lower().strip(_AROUND_WORDS), word.start()) for word in pattern.finditer(text))
    kept = [(plain, start) for plain, start in found if plain]
    return [plain for plain, _ in kept], [start for _, start in kept]


_SPACED_WORD = re.compile(r"\S+")


def _storable(text: str) -> str:
    """Arrow holds no lone surrogates."""
    return utf8(text).decode("utf-8", "replace")
