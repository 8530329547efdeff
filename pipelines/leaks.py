"""Benchmark leaks: which chats hold a question or an answer of a benchmark.

Questions are looked for in every turn, answers in assistant turns, each by runs of words: a text is leaked when so
many of its words as `dedup.leak_share` says stand in runs of `dedup.leak_words` words that one turn holds too, in
whatever order. A question that is a whole user turn is leaked however short it is.

What more than shared_runs.MAX_ITEMS_OF_GRAM texts of the benchmarks share (instructions, headers) proves nothing:
words in such runs are not counted, and a text with fewer than `dedup.leak_words` others is looked for as a whole user
turn only.
Case, white space and punctuation around words don't matter.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from pipelines.grams import hashed_words
from pipelines.shared_runs import (
    Hit,
    TextIndex,
    hits_by_words,
    plain_words,
    text_index,
    whole_text,
    words_with_places,
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

MAX_SHOWN_CHARS = 600
MAX_HITS_OF_ROW = 20

_REASONS = {"question": "leaked_question", "answer": "leaked_answer"}


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
    by_words = {kind: text_index(items[kind].to_pylist(), config.dedup.leak_words) for kind in kinds}
    wholes: dict[str, list[int]] = {}
    for number, question in enumerate(items["question"].to_pylist()):
        if whole := whole_text(question):
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


# --- the search -------------------------------------------------------------------------------------------------


def _hits(turns: list[tuple[Role, str]], index: LeakIndex) -> Iterator[tuple[Kind, Hit]]:
    """Hits of questions, then of answers; a question that is a whole turn is not told again by its words."""
    whole: set[tuple[int, int]] = set()
    for turn, (role, text) in enumerate(turns):
        for item in index.whole_questions.get(whole_text(text), ()) if role == "user" else ():
            whole.add((turn, item))
            yield "question", Hit(turn, item, 1.0)
    hashes, num_words = hashed_words(plain_words(text) for _, text in turns)
    is_assistant = np.array([role == "assistant" for role, _ in turns], bool)
    for kind, texts in index.by_words.items():
        searched = num_words if kind == "question" else np.where(is_assistant, num_words, 0)
        for hit in hits_by_words(hashes, num_words, searched, texts, index.min_share):
            if (hit.turn, hit.item) not in whole or kind == "answer":
                yield kind, hit


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
    said, starts = words_with_places(text)
    for number, word in enumerate(said):
        if word in first_words and tuple(said[number : number + words_in_gram]) in grams:
            return text[starts[number] : starts[number] + MAX_SHOWN_CHARS]
    return text[:MAX_SHOWN_CHARS]


def _storable(text: str) -> str:
    """Arrow holds no lone surrogates."""
    return utf8(text).decode("utf-8", "replace")
