"""Rows for the benchmark of near-duplicates: made ones, or the texts of a file, as chats in a run root before dedup.

Made texts are 30 to 90 words drawn from a vocabulary in which the n-th word is 1/n as frequent as the first. 6 of 25 are
edited copies of others: of their words 0.5 to 10 % are replaced, left out or doubled by another one, or a few words
stand behind them. Each text follows from its number alone.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.grams import Hashes, Ints, mixed, ragged
from pipelines.storage import file_entry, write_manifest, write_rows
from schemas.conversation import Conversation, Message, blake2b_128
from schemas.run import STAGE_FOLDERS, Manifest, PartEntry

NUM_WORDS = 50_000
ROWS_OF_PART = 20_000
CYCLE, COPIES = 25, 6
EDIT_RATES = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.10)
PROMPT_WORDS = 8


def made_texts(start: int, end: int, num_rows: int) -> list[str]:
    """Texts number `start` to `end` of `num_rows`."""
    rows = np.arange(start, end)
    is_copy = rows % CYCLE < COPIES
    drawn = _draws(rows, 1)
    original = (drawn % np.uint64(max(1, num_rows // CYCLE))).astype(np.int64) * CYCLE + COPIES
    original += (drawn >> np.uint64(40)).astype(np.int64) % (CYCLE - COPIES)
    rates = np.array(EDIT_RATES)[(_draws(rows, 2) % np.uint64(len(EDIT_RATES))).astype(np.int64)]
    words, num_words = _words(np.where(is_copy, original, rows))
    words, num_words = _edited(words, num_words, rows, np.where(is_copy, rates, -1.0))
    vocabulary = [_word(rank) for rank in range(NUM_WORDS)]
    spelled = [vocabulary[rank] for rank in words.tolist()]
    ends = np.cumsum(num_words).tolist()
    return [" ".join(spelled[first:last]) for first, last in itertools.pairwise([0, *ends])]


def write_made(run_root: Path, num_rows: int, *, workers: int) -> None:
    """The folder that the filter stage would leave, with made rows."""
    starts = range(0, num_rows, ROWS_OF_PART)
    with ProcessPoolExecutor(workers) as pool:
        parts = pool.map(_made_part, itertools.repeat(run_root), starts, itertools.repeat(num_rows))
        _write_manifest(run_root, list(parts))


def write_texts(run_root: Path, texts: Iterable[str]) -> None:
    """The same with the texts of a file."""
    iterator = iter(texts)
    parts: list[PartEntry] = []
    while block := list(itertools.islice(iterator, ROWS_OF_PART)):
        parts.append(_part(run_root, len(parts) * ROWS_OF_PART, block))
    _write_manifest(run_root, parts)


def read_texts(path: Path) -> Iterator[str]:
    """The `text` of each line."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


# --- parts ------------------------------------------------------------------------------------------------------


def _made_part(run_root: Path, start: int, num_rows: int) -> PartEntry:
    return _part(run_root, start, made_texts(start, min(start + ROWS_OF_PART, num_rows), num_rows))


def _part(run_root: Path, start: int, texts: list[str]) -> PartEntry:
    folder = run_root / STAGE_FOLDERS["filter"]
    path = folder / f"part-{start:012}.parquet"
    num_rows = write_rows(path, (_chat(start, number, text) for number, text in enumerate(texts)))
    return PartEntry(
        key=blake2b_128(str(start).encode()),
        label=f"texts/file.jsonl:{start}",
        kept=(file_entry(path, folder=folder, num_rows=num_rows),),
        dropped=None,
        num_rows_in=num_rows,
        num_rows_out=num_rows,
        drops={},
    )


def _chat(start: int, number: int, text: str) -> Conversation:
    words = text.split()
    prompt, answer = " ".join(words[:PROMPT_WORDS]), " ".join(words[PROMPT_WORDS:])
    messages = [Message("user", prompt), Message("assistant", answer)]
    return Conversation(blake2b_128(str(start + number).encode()), "texts/file.jsonl", number, messages, {})


def _write_manifest(run_root: Path, parts: list[PartEntry]) -> None:
    num_rows = sum(part.num_rows_out for part in parts)
    manifest = Manifest(
        stage="filter",
        stage_version=0,
        key=blake2b_128(*(part.kept[0].sha256.encode() for part in parts)),
        inputs={},
        config={},
        versions={},
        parts=tuple(parts),
        num_rows_in=num_rows,
        num_rows_out=num_rows,
        num_pieces_cut=0,
        drops={},
    )
    write_manifest(run_root / STAGE_FOLDERS["filter"], manifest)


# --- made words -------------------------------------------------------------------------------------------------


def _draws(numbers: Ints, what: int) -> Hashes:
    return mixed(mixed(numbers.astype(np.uint64)) + np.uint64(what))


def _uniform(numbers: Ints, what: int) -> npt.NDArray[np.float64]:
    return (_draws(numbers, what) >> np.uint64(11)).astype(np.float64) / 2.0**53


def _ranks(uniform: npt.NDArray[np.float64]) -> Ints:
    weights = np.cumsum(1 / np.arange(1, NUM_WORDS + 1))
    return np.minimum(np.searchsorted(weights, uniform * weights[-1]), NUM_WORDS - 1)


def _words(rows: Ints) -> tuple[Ints, Ints]:
    num_words = 30 + (_draws(rows, 3) % np.uint64(61)).astype(np.int64)
    return _ranks(_uniform(ragged(rows << 10, num_words), 4)), num_words


def _edited(words: Ints, num_words: Ints, rows: Ints, rates: npt.NDArray[np.float64]) -> tuple[Ints, Ints]:
    """A rate of 0 appends words, a negative one leaves a text as it is."""
    places = ragged(rows << 10, num_words)
    row = np.repeat(np.arange(len(rows)), num_words)
    is_edited = _uniform(places, 5) < rates[row]
    how, others = _uniform(places, 6), _ranks(_uniform(places, 7))
    words = np.where(is_edited & (how < 0.5), others, words)
    copies = np.where(is_edited & (how >= 0.5), np.where(how < 0.75, 0, 2), 1)
    behind = np.repeat(np.cumsum(num_words) - 1, np.where(rates == 0, 1 + rows % 6, 0))
    np.add.at(copies, behind, 1)
    kept = np.repeat(np.arange(len(words)), copies)
    second = np.concatenate([[False], kept[1:] == kept[:-1]])
    added = _ranks(
        _uniform(np.repeat(places, copies) * 8 + ragged(np.zeros(len(copies), np.int64), copies), 8)
    )
    return np.where(second, added, words[kept]), np.bincount(row[kept], minlength=len(rows))


def _word(rank: int) -> str:
    letters = "etaoinshrdlu"
    word = ""
    rank += 1
    while rank:
        rank, place = divmod(rank, len(letters))
        word += letters[place] + "ae"[place % 2]
    return word
