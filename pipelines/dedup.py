"""Stage 4: which rows say what another row already says. Exact copies, beginnings of longer chats, near-copies.

Survivor order, a total one: most characters of user and assistant text (white space folded), then the latest date
in the record, then the place of the source in dedup.source_rank, then the lowest row id. Nothing looks at the order
of rows, parts or workers.

The three steps run one after the other, each on what the one before left:
1. `duplicate`: same turns (role and text) and same system prompt; the first in the survivor order stays.
2. `branch_of_longer`: all turns are the first turns of a longer chat. The survivor extends it and is not itself
   extended by any other; of several the first in the survivor order.
3. `near_duplicate`: Jaccard of word 3-grams over user and assistant turns >= dedup.near_threshold with a row that
   stays. Rows are taken in the survivor order and dropped only for a survivor; similarity is not passed on.
   System prompts are not looked at, and where one of two chats holds code, their prose alone must be as near.

Rows of earlier runs come before all others and are never dropped.

A survivor named in step 1 or 2 may itself leave in a later step: follow the names until they end.
"""

import hashlib
import json
import re
import unicodedata
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.grams import (
    GRAMS_TYPE,
    GramSets,
    Hashes,
    Ints,
    compared_text,
    concatenated,
    folded,
    from_column,
    gram_sets,
    ragged,
    spoken,
    taken,
    to_column,
)
from pipelines.near_duplicates import greedy_survivors
from pipelines.overlap import Bools
from pipelines.prefix_index import Also, PrefixIndex
from pipelines.rules.prose import MIN_CODE_LINES, prose_of
from schemas.conversation import Conversation, utf8
from schemas.pipeline_config import PipelineConfig

STAGE_VERSION = 2

FEATURES = pa.schema(
    [
        pa.field("row_id", pa.large_string(), nullable=False),
        pa.field("num_chars", pa.int64(), nullable=False),  # user and assistant text, white space folded
        pa.field("date_us", pa.int64(), nullable=False),  # since 1970, UTC; NO_DATE where the record has none
        pa.field("source_rank", pa.int64(), nullable=False),  # 0 is the best
        pa.field("first_prompt_key", pa.uint64(), nullable=False),  # hash of the first user turn; 0 for none
        pa.field("answers_key", pa.uint64(), nullable=False),  # hash of all assistant turns; 0 for none
        # Hash of the first 1, 2, ... turns: the last names the whole chat, the others its beginnings.
        pa.field("turn_keys", pa.large_list(pa.uint64()), nullable=False),
        # Rows that share it are never near-duplicates of each other; 0: of none.
        pa.field("exempt_group", pa.uint64(), nullable=False),
        pa.field("grams", GRAMS_TYPE, nullable=False),  # empty where near-duplicates are not looked for
        pa.field("has_code", pa.bool_(), nullable=False),
        pa.field("prose_grams", GRAMS_TYPE, nullable=False),  # of what is no code; empty where there is none
    ]
)

VERDICTS = pa.schema(
    [
        pa.field("row_id", pa.large_string(), nullable=False),
        pa.field("reason", pa.large_string(), nullable=False),
        pa.field("detail", pa.large_string(), nullable=False),
        pa.field("survivor", pa.large_string(), nullable=False),
    ]
)
"""One line a dropped row, by row id."""

NO_DATE = -(2**63)


def versions(config: PipelineConfig) -> dict[str, str]:
    """Lower case, NFC and white space come from Python's Unicode tables."""
    return {"unicode": unicodedata.unidata_version}


@dataclass(frozen=True, slots=True)
class DedupDecision:
    """verdicts: VERDICTS. counts: what else a person should know, for the manifest."""

    verdicts: pa.Table
    counts: dict[str, int]


def features(rows: Iterable[Conversation], config: PipelineConfig) -> pa.Table:
    """What `decide` needs of each row, in the order of the rows; schema FEATURES."""
    ranks = {name: rank for rank, name in enumerate(config.dedup.source_rank)}
    ids: list[str] = []
    numbers = {name: array("q") for name in ("num_chars", "date_us", "source_rank", "num_turns")}
    keys = {name: array("Q") for name in ("turn", "exempt_group", "first_prompt_key", "answers_key")}
    texts, proses = [], []
    for row in rows:
        turns = [(message.role, spoken(message)) for message in row.messages]
        turn_keys = _turn_keys(turns, row.meta.get("tools"))
        ids.append(row.row_id)
        keys["turn"].extend(turn_keys)
        keys["exempt_group"].append(_exempt_group(row))
        keys["first_prompt_key"].append(_texts_key([text for role, text in turns if role == "user"][:1]))
        keys["answers_key"].append(_texts_key([text for role, text in turns if role == "assistant"]))
        numbers["num_turns"].append(len(turn_keys))
        numbers["num_chars"].append(sum(len(said) for role, said in turns if role in ("user", "assistant")))
        numbers["date_us"].append(_microseconds(row.meta.get("date")))
        numbers["source_rank"].append(ranks.get(row.source.partition("/")[0], len(ranks)))
        is_compared = config.dedup.near and row.meta.get("near_exempt") is not True
        texts.append(compared_text(turns) if is_compared else "")
        proses.append(_prose_beside_code(row) if is_compared else None)
    ends = np.cumsum(np.array(numbers.pop("num_turns"), np.int64))
    turn_column = to_column(np.concatenate([[0], ends]), np.array(keys.pop("turn"), np.uint64))
    columns = {
        "row_id": pa.array(ids, pa.large_string()),
        **{name: pa.array(np.array(values, np.int64)) for name, values in numbers.items()},
        **{name: pa.array(np.array(values, np.uint64)) for name, values in keys.items()},
        "turn_keys": turn_column,
        "grams": _grams(texts),
        "has_code": pa.array([prose is not None for prose in proses], pa.bool_()),
        "prose_grams": _grams([prose or "" for prose in proses]),
    }
    return pa.table({name: columns[name] for name in FEATURES.names}, schema=FEATURES)


def decide(features: pa.Table, config: PipelineConfig, earlier: pa.Table | None = None) -> DedupDecision:
    """The rows to drop. Row ids must be different; the order of the rows does not matter.

    `earlier` are features of rows of earlier runs, which may share ids with the rows and with each other.
    """
    assert pc.count_distinct(features["row_id"]).as_py() == len(features), "row ids must be different"
    earlier = FEATURES.empty_table() if earlier is None else earlier
    tables = [table.take(_survivor_order(table)) for table in (earlier, features)]
    table = pa.concat_tables(tables)  # from here on, a lower number is the better row
    chats = _Chats(
        keys=from_column(table["turn_keys"]),
        num_earlier=len(earlier),
        survivor=np.full(len(table), -1, np.int64),
        reason=np.full(len(table), "", dtype="U16"),
        detail=np.full(len(table), "", dtype="U80"),
    )
    counts = {}
    if config.dedup.exact:
        _drop_exact(chats)
    if config.dedup.branches:
        _drop_branches(chats)
    if config.dedup.near:
        counts["near_largest_bucket_rows"] = _drop_near(chats, table, threshold=config.dedup.near_threshold)
    left = table.take(pa.array(chats.left[chats.left >= len(earlier)]))
    counts["same_first_prompt_rows"] = _num_sharing(left["first_prompt_key"])
    counts["same_answers_rows"] = _num_sharing(left["answers_key"])
    return DedupDecision(_verdicts(chats, table["row_id"].combine_chunks()), counts)


# --- features ---------------------------------------------------------------------------------------------------


def _turn_keys(turns: Iterable[tuple[str, str]], tools: Any) -> list[int]:
    """Hash of the first 1, 2, ... turns. Tools offered and empty system prompts: as the model would see them."""
    digest = hashlib.blake2b(digest_size=8)
    if tools:
        digest.update(b"tools" + json.dumps(tools, sort_keys=True).encode())
    keys = []
    for role, text in turns:
        if role == "system" and not text:
            continue
        turn = utf8(text)
        digest.update(f"\n{role} {len(turn)}\n".encode() + turn)
        keys.append(int.from_bytes(digest.digest(), "little"))
    return keys


def _exempt_group(row: Conversation) -> int:
    """Paths of one tree."""
    if not row.meta.get("group"):
        return 0
    return int.from_bytes(
        hashlib.blake2b(utf8(f"group {row.meta['group']}"), digest_size=8).digest(), "little"
    )


def _texts_key(texts: list[str]) -> int:
    """Hash of texts, 0 where there is nothing in them."""
    if not any(texts):
        return 0
    digest = hashlib.blake2b(digest_size=8)
    for text in map(utf8, texts):
        digest.update(f"{len(text)} ".encode() + text)
    return int.from_bytes(digest.digest(), "little")


# Unfenced code: lines that end in a brace or a semicolon, or are indented. A look before the slow one.
_CODE_LINE = re.compile(r"[{};][ \t]*$|^(?: {4}|\t)", re.MULTILINE)


def _prose_beside_code(row: Conversation) -> str | None:
    """The user and assistant turns without code, None where there is none in them."""
    said = [message for message in row.messages if message.role in ("user", "assistant")]
    if not any(_holds_code(message.content) for message in said):
        return None
    return " ".join(folded(prose_of(message.content)) for message in said)


def _holds_code(text: str) -> bool:
    return "```" in text or "~~~" in text or len(_CODE_LINE.findall(text)) >= MIN_CODE_LINES


_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def _microseconds(date: Any) -> int:
    """An ISO date as microseconds since 1970; without a zone it is UTC. Anything else is no date."""
    try:
        parsed = datetime.fromisoformat(str(date).strip().replace("Z", "+00:00"))
    except ValueError:
        return NO_DATE
    aware = parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)
    return (aware - _EPOCH) // timedelta(microseconds=1)


def _grams(texts: list[str]) -> pa.LargeListArray:
    sets = gram_sets(texts)
    return to_column(sets.starts, sets.hashes)


# --- decisions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chats:
    """Rows of earlier runs, then those of this one, both in the survivor order.

    `survivor` is the number of the row that stands for this one, -1: it stays. Of earlier rows nobody asks.

    `keys` holds the turn keys; it is no set, but has the same shape.
    """

    keys: GramSets
    num_earlier: int
    survivor: Ints
    reason: np.ndarray
    detail: np.ndarray

    @property
    def left(self) -> Ints:
        return np.flatnonzero(self.survivor < 0)

    def drop(self, rows: Ints, survivors: Ints, reason: str, details: list[str]) -> None:
        where = np.where(survivors < self.num_earlier, ", in an earlier run", "")
        details = [f"{detail}{said}" for detail, said in zip(details, where.tolist(), strict=True)]
        self.survivor[rows], self.reason[rows], self.detail[rows] = survivors, reason, details

    def whole_keys(self, rows: Ints) -> Hashes:
        """The key of all turns; 0 for a chat without any."""
        padded = np.append(self.keys.hashes, np.uint64(0))
        last = np.where(self.keys.sizes[rows] > 0, self.keys.starts[rows + 1] - 1, len(padded) - 1)
        return padded[last]


def _survivor_order(features: pa.Table) -> pa.Array:
    keys = {
        "num_chars": "descending",
        "date_us": "descending",
        "source_rank": "ascending",
        "row_id": "ascending",
    }
    return pc.sort_indices(features, sort_keys=list(keys.items()))


def _num_sharing(keys: pa.ChunkedArray) -> int:
    """How many rows have the key of another row."""
    _, counts = np.unique(keys.to_numpy()[keys.to_numpy() != 0], return_counts=True)
    return int(counts[counts > 1].sum())


def _drop_exact(chats: _Chats) -> None:
    rows = chats.left
    _, first, group = np.unique(chats.whole_keys(rows), return_index=True, return_inverse=True)
    survivors = rows[first][group]
    copies = (survivors != rows) & (rows >= chats.num_earlier)
    details = [f"same {num_turns} turns" for num_turns in chats.keys.sizes[rows[copies]].tolist()]
    chats.drop(rows[copies], survivors[copies], "duplicate", details)


def _drop_branches(chats: _Chats) -> None:
    """Looks up each beginning of each chat among the whole chats."""
    rows = chats.left[chats.keys.sizes[chats.left] > 0]
    wholes, whole = np.unique(chats.whole_keys(rows), return_inverse=True)
    num_beginnings = chats.keys.sizes[rows] - 1
    owner = np.repeat(np.arange(len(rows)), num_beginnings)
    beginnings = chats.keys.hashes[ragged(chats.keys.starts[rows], num_beginnings)]
    place = np.minimum(np.searchsorted(wholes, beginnings), len(wholes) - 1)
    found = wholes[place] == beginnings
    extended = np.zeros(len(wholes), bool)
    extended[place[found]] = True
    found &= ~extended[whole[owner]]
    best = np.full(len(wholes), len(rows))
    np.minimum.at(best, place[found], owner[found])
    dropped = np.flatnonzero(extended[whole] & (rows >= chats.num_earlier))
    survivors = rows[best[whole[dropped]]]
    lengths = zip(chats.keys.sizes[rows[dropped]].tolist(), chats.keys.sizes[survivors].tolist(), strict=True)
    details = [f"its {short} turns begin a chat of {long}" for short, long in lengths]
    chats.drop(rows[dropped], survivors, "branch_of_longer", details)


def _drop_near(chats: _Chats, table: pa.Table, *, threshold: float) -> int:
    """How many rows the largest bucket has."""
    rows = chats.left
    sets = taken(from_column(table["grams"]), rows)
    group = table["exempt_group"].to_numpy()[rows]
    is_earlier = rows < chats.num_earlier

    def wanted(left: Ints, right: Ints) -> Bools:
        return ((group[left] == 0) | (group[left] != group[right])) & ~(is_earlier[left] & is_earlier[right])

    prose = _prose_sets(table, rows)
    also = None if prose is None else Also(prose, table["has_code"].to_numpy()[rows])
    index = PrefixIndex(sets, threshold=threshold, also=also)
    survivor, jaccard = greedy_survivors(index, np.arange(len(rows)), wanted=wanted)
    dropped = np.flatnonzero(survivor >= 0)
    details = [f"Jaccard {value:.3f}" for value in jaccard[dropped].tolist()]
    chats.drop(rows[dropped], rows[survivor[dropped]], "near_duplicate", details)
    return index.largest_bucket_rows


def _prose_sets(table: pa.Table, rows: Ints) -> GramSets | None:
    """Grams of the rows without code; None where no row holds any."""
    has_code = table["has_code"].to_numpy()
    if not has_code[rows].any():
        return None
    both = concatenated(from_column(table["grams"]), from_column(table["prose_grams"]))
    return taken(both, rows + np.where(has_code[rows], len(table), 0))


def _verdicts(chats: _Chats, row_ids: pa.Array) -> pa.Table:
    dropped = np.flatnonzero(chats.survivor >= 0)
    columns = {
        "row_id": row_ids.take(pa.array(dropped)),
        "reason": pa.array(chats.reason[dropped].tolist(), pa.large_string()),
        "detail": pa.array(chats.detail[dropped].tolist(), pa.large_string()),
        "survivor": row_ids.take(pa.array(chats.survivor[dropped])),
    }
    return pa.table(columns, schema=VERDICTS).sort_by("row_id")
