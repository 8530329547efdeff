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

import os
import unicodedata
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dedup_features import FEATURES as FEATURES
from pipelines.dedup_features import features as features
from pipelines.feature_files import Features, FeatureTable
from pipelines.freed_memory import give_back_freed
from pipelines.grams import GramSets, Hashes, Ints, StoredSets, concatenated, from_column, ragged, taken
from pipelines.near_duplicates import greedy_survivors
from pipelines.overlap import Bools, Floats
from pipelines.prefix_index import Also, PrefixIndex
from schemas.pipeline_config import PipelineConfig

STAGE_VERSION = 2

VERDICTS = pa.schema(
    [
        pa.field("row_id", pa.large_string(), nullable=False),
        pa.field("reason", pa.large_string(), nullable=False),
        pa.field("detail", pa.large_string(), nullable=False),
        pa.field("survivor", pa.large_string(), nullable=False),
    ]
)
"""One line a dropped row, by row id."""

_DUPLICATE, _BRANCH, _NEAR = 1, 2, 3
_REASONS = ("stays", "duplicate", "branch_of_longer", "near_duplicate")
_MAX_TOLD_ROWS = 2**17  # whose details stand in memory as Python strings


def versions(config: PipelineConfig) -> dict[str, str]:
    """Lower case, NFC and white space come from Python's Unicode tables."""
    return {"unicode": unicodedata.unidata_version}


@dataclass(frozen=True, slots=True)
class DedupDecision:
    """verdicts: VERDICTS. rows: of each verdict the number of its row. counts: what else to know, for the manifest."""

    verdicts: pa.Table
    rows: Ints
    counts: dict[str, int]


def decide(features: pa.Table, config: PipelineConfig, earlier: pa.Table | None = None) -> DedupDecision:
    """The rows to drop. Row ids must be different; the order of the rows does not matter.

    `earlier` are features of rows of earlier runs, which may share ids with the rows and with each other.
    """
    assert pc.count_distinct(features["row_id"]).as_py() == len(features), "row ids must be different"
    tables = [features] if earlier is None else [features, earlier]
    everything = FeatureTable(pa.concat_tables(tables))
    present = np.ones(len(everything), bool)
    return decide_rows(everything, config, present=present, num_ours=len(features))


def decide_rows(
    features: Features, config: PipelineConfig, *, present: Bools, num_ours: int
) -> DedupDecision:
    """The same for features that may lie on the disk: our rows first, those of earlier runs behind them.

    Rows that are not `present` are looked at nowhere. Of each row some numbers stand in memory, never its grams.
    """
    order = _survivor_order(features, present, num_ours)  # from here on, a lower number is the better row
    chats = _Chats(
        num_earlier=int((order >= num_ours).sum()),
        survivor=np.full(len(order), -1, np.int64),
        reason=np.zeros(len(order), np.uint8),
        num_turns=np.zeros(len(order), np.int64),
        jaccard=np.zeros(len(order)),
    )
    _drop_copies(chats, taken(from_column(features.column("turn_keys")), order), config)
    give_back_freed()
    counts = {}
    if config.dedup.near:
        counts["near_largest_bucket_rows"] = _drop_near(chats, features, order, config)
    left = order[chats.left[chats.left >= chats.num_earlier]]
    counts["same_first_prompt_rows"] = _num_sharing(_numbers(features, "first_prompt_key")[left])
    counts["same_answers_rows"] = _num_sharing(_numbers(features, "answers_key")[left])
    return _decision(chats, features.column("row_id"), order, counts)


@dataclass(frozen=True, slots=True)
class _Chats:
    """Rows of earlier runs, then those of this one, both in the survivor order.

    `survivor` is the number of the row that stands for this one, -1: it stays. Of earlier rows nobody asks.
    """

    num_earlier: int
    survivor: Ints
    reason: npt.NDArray[np.uint8]
    num_turns: Ints
    jaccard: Floats

    @property
    def left(self) -> Ints:
        return np.flatnonzero(self.survivor < 0)

    def drop(self, rows: Ints, survivors: Ints, reason: int) -> None:
        self.survivor[rows], self.reason[rows] = survivors, reason


def _survivor_order(features: Features, present: Bools, num_ours: int) -> Ints:
    columns = {
        "num_chars": "descending",
        "date_us": "descending",
        "source_rank": "ascending",
        "row_id": "ascending",
    }
    is_ours = pa.chunked_array([pa.array((np.arange(len(features)) < num_ours).astype(np.uint8))])
    table = pa.table({"is_ours": is_ours} | {name: features.column(name) for name in columns})
    order = pc.sort_indices(table, sort_keys=[("is_ours", "ascending"), *columns.items()]).to_numpy()
    return order[present[order]].astype(np.int64)


def _numbers(features: Features, name: str) -> npt.NDArray[np.int64]:
    return features.column(name).to_numpy()  # type: ignore[no-any-return]


def _num_sharing(keys: Ints) -> int:
    """How many rows have the key of another row."""
    _, counts = np.unique(keys[keys != 0], return_counts=True)
    return int(counts[counts > 1].sum())


# --- copies and beginnings: keys of turns ----------------------------------------------------------------------


def _drop_copies(chats: _Chats, keys: GramSets, config: PipelineConfig) -> None:
    """`keys` holds the turn keys; it is no set, but has the same shape."""
    chats.num_turns[:] = keys.sizes
    if config.dedup.exact:
        _drop_exact(chats, keys)
    if config.dedup.branches:
        _drop_branches(chats, keys)


def _whole_keys(keys: GramSets, rows: Ints) -> Hashes:
    """The key of all turns; 0 for a chat without any."""
    padded = np.append(keys.hashes, np.uint64(0))
    last = np.where(keys.sizes[rows] > 0, keys.starts[rows + 1] - 1, len(padded) - 1)
    return padded[last]


def _drop_exact(chats: _Chats, keys: GramSets) -> None:
    rows = chats.left
    _, first, group = np.unique(_whole_keys(keys, rows), return_index=True, return_inverse=True)
    survivors = rows[first][group]
    copies = (survivors != rows) & (rows >= chats.num_earlier)
    chats.drop(rows[copies], survivors[copies], _DUPLICATE)


def _drop_branches(chats: _Chats, keys: GramSets) -> None:
    """Looks up each beginning of each chat among the whole chats."""
    rows = chats.left[keys.sizes[chats.left] > 0]
    wholes, whole = np.unique(_whole_keys(keys, rows), return_inverse=True)
    num_beginnings = keys.sizes[rows] - 1
    owner = np.repeat(np.arange(len(rows)), num_beginnings)
    beginnings = keys.hashes[ragged(keys.starts[rows], num_beginnings)]
    place = np.minimum(np.searchsorted(wholes, beginnings), len(wholes) - 1)
    found = wholes[place] == beginnings
    place, owner = place[found], owner[found]
    extended = np.zeros(len(wholes), bool)
    extended[place] = True
    longest = ~extended[whole[owner]]
    best = np.full(len(wholes), len(rows))
    np.minimum.at(best, place[longest], owner[longest])
    dropped = np.flatnonzero(extended[whole] & (rows >= chats.num_earlier))
    chats.drop(rows[dropped], rows[best[whole[dropped]]], _BRANCH)


# --- near-duplicates: gram sets -----------------------------------------------------------------------------------


def _drop_near(chats: _Chats, features: Features, order: Ints, config: PipelineConfig) -> int:
    """How many rows the largest bucket has. Here rows are numbered as they lie in the features."""
    rows = order[chats.left]
    group = _numbers(features, "exempt_group")
    is_earlier = np.zeros(len(features), bool)
    is_earlier[order[: chats.num_earlier]] = True
    among = np.zeros(len(features), bool)
    among[rows] = True

    def wanted(left: Ints, right: Ints) -> Bools:
        return ((group[left] == 0) | (group[left] != group[right])) & ~(is_earlier[left] & is_earlier[right])

    with ExitStack() as stack:
        sets = stack.enter_context(features.sets("grams"))
        has_code = features.column("has_code").to_numpy()
        also = None
        if has_code.any():
            prose = stack.enter_context(features.sets("prose_grams"))
            also = Also(_ProseSets(has_code, sets, prose), has_code)
        index = PrefixIndex(
            sets,
            threshold=config.dedup.near_threshold,
            also=also,
            among=among,
            num_threads=config.engine.workers or os.cpu_count() or 1,
        )
        survivor, jaccard = greedy_survivors(index, rows, wanted=wanted)
    number = np.full(len(features), -1, np.int64)
    number[order] = np.arange(len(order))
    dropped = rows[survivor[rows] >= 0]
    chats.drop(number[dropped], number[survivor[dropped]], _NEAR)
    chats.jaccard[number[dropped]] = jaccard[dropped]
    return index.largest_bucket_rows


@dataclass(frozen=True, slots=True)
class _ProseSets:
    """Grams of the rows without code."""

    has_code: Bools
    grams: StoredSets
    prose: StoredSets

    def of_rows(self, rows: Ints) -> GramSets:
        code = self.has_code[rows]
        both = concatenated(self.grams.of_rows(rows[~code]), self.prose.of_rows(rows[code]))
        place = np.empty(len(rows), np.int64)
        place[np.append(np.flatnonzero(~code), np.flatnonzero(code))] = np.arange(len(rows))
        return taken(both, place)


# --- verdicts -------------------------------------------------------------------------------------------------------


def _decision(chats: _Chats, row_ids: pa.ChunkedArray, order: Ints, counts: dict[str, int]) -> DedupDecision:
    dropped = np.flatnonzero(chats.survivor >= 0)
    details = [
        pa.array(_details(chats, dropped[start : start + _MAX_TOLD_ROWS]), pa.large_string())
        for start in range(0, len(dropped), _MAX_TOLD_ROWS)
    ]
    reasons = pa.DictionaryArray.from_arrays(pa.array(chats.reason[dropped]), pa.array(_REASONS))
    columns = {
        "row_id": row_ids.take(pa.array(order[dropped])),
        "reason": reasons.cast(pa.large_string()),
        "detail": pa.chunked_array(details, pa.large_string()),
        "survivor": row_ids.take(pa.array(order[chats.survivor[dropped]])),
    }
    table = pa.table(columns, schema=VERDICTS)
    by_id = pc.sort_indices(table["row_id"])
    return DedupDecision(table.take(by_id), order[dropped][by_id.to_numpy()], counts)


def _details(chats: _Chats, rows: Ints) -> list[str]:
    survivors = chats.survivor[rows]
    tell = {
        _DUPLICATE: lambda short, long, jaccard: f"same {short} turns",
        _BRANCH: lambda short, long, jaccard: f"its {short} turns begin a chat of {long}",
        _NEAR: lambda short, long, jaccard: f"Jaccard {jaccard:.3f}",
    }
    where = np.where(survivors < chats.num_earlier, ", in an earlier run", "")
    columns = (
        chats.reason[rows],
        chats.num_turns[rows],
        chats.num_turns[survivors],
        chats.jaccard[rows],
        where,
    )
    lines = zip(*(column.tolist() for column in columns), strict=True)
    return [f"{tell[reason](short, long, jaccard)}{said}" for reason, short, long, jaccard, said in lines]
