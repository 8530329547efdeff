"""Stage 5: which side of train / validation / test a row is on.

The unit that is drawn is the holdout key (hash of the first user turn as merged): later versions of a chat share
it, and so do paths of one tree, as far as they share a turn. The ledger remembers the side of every key ever seen
and the gram set of every row ever held out; it only grows.

First, keys that the ledger does not know get a side:
1. A key with a row of `set: train` is train.
2. The other new keys form components: two belong together when rows of theirs are near (Jaccard >= near_threshold).
   A component takes the side that it is near to: of a row with a known key, or of a row in the ledger. One that is
   near nothing is drawn once, by hash(holdout.seed, its lowest key). In one that is near several sides each key
   goes with the held-out side that its own rows are near to, else to train.
Then rows that would still stand near another side are dropped as `near_holdout`, so that in the end no train row
is near a held-out one, nor a validation row near a test one. What was there before stays:
3. A `set: train` row whose key the ledger holds out is dropped.
4. Rows are taken in this order: held out by the ledger (same key and grams), train, held out for the first time;
   each by row id. A row is kept unless it is near a kept one of another side.

Rows and parts may come in any order, and deciding again with the new ledger decides the same. While near_threshold
stays, no row that was kept changes sides or is dropped in a later run, whatever is added and whatever the shares.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.feature_files import Features, FeatureTable
from pipelines.grams import (
    GRAMS_TYPE,
    GramSets,
    Ints,
    JoinedSets,
    StoredSets,
    compared_text,
    from_column,
    gram_sets,
    set_digests,
    spoken,
    taken,
    to_column,
)
from pipelines.holdout_sides import (
    FREE,
    TEST,
    TRAIN,
    VALIDATION,
    Nodes,
    conflicts_between_sides,
    kept_nodes,
    sides_of_keys,
)
from pipelines.overlap import Bools
from pipelines.prefix_index import Pairs, PrefixIndex
from schemas.conversation import Conversation
from schemas.dataset import SPLITS
from schemas.errors import InputError, IntegrityError
from schemas.pipeline_config import PipelineConfig

STAGE_VERSION = 1

FEATURES = pa.schema(
    [
        pa.field("row_id", pa.large_string(), nullable=False),
        pa.field("holdout_key", pa.large_string(), nullable=False),
        pa.field("train_only", pa.bool_(), nullable=False),
        pa.field("grams", GRAMS_TYPE, nullable=False),
    ]
)

LEDGER = pa.schema(
    [
        pa.field("holdout_key", pa.large_string(), nullable=False),
        pa.field("side", pa.large_string(), nullable=False),
        # Null in the one line that each key has; else a row held out under that key, with its grams.
        pa.field("row_id", pa.large_string(), nullable=True),
        pa.field("grams", GRAMS_TYPE, nullable=False),
    ]
)
"""<run root>/holdout.parquet, by (holdout_key, row_id)."""

SIDES = pa.schema(
    [
        pa.field("row_id", pa.large_string(), nullable=False),
        pa.field("side", pa.large_string(), nullable=False),
    ]
)
"""One line a kept row, by row id."""

DROPPED = pa.schema(
    [
        pa.field("row_id", pa.large_string(), nullable=False),
        pa.field("reason", pa.large_string(), nullable=False),
        pa.field("detail", pa.large_string(), nullable=False),
        pa.field("survivor", pa.large_string(), nullable=True),
    ]
)
"""One line a dropped row, by row id. The survivor is the lowest row id of those near it on another side."""


@dataclass(frozen=True, slots=True)
class HoldoutDecision:
    """sides: SIDES, drops: DROPPED, ledger: LEDGER, with all of the old one in it."""

    sides: pa.Table
    drops: pa.Table
    ledger: pa.Table


def versions(config: PipelineConfig) -> dict[str, str]:
    """Lower case, NFC and white space come from Python's Unicode tables."""
    return {"unicode": unicodedata.unidata_version}


def features(rows: Iterable[Conversation], config: PipelineConfig) -> pa.Table:
    """What `decide` needs of each row, in the order of the rows; schema FEATURES."""
    ids, metas, texts = [], [], []
    for row in rows:
        ids.append(row.row_id)
        metas.append(row.meta)
        texts.append(compared_text((message.role, spoken(message)) for message in row.messages))
    return _features(ids, metas, gram_sets(texts))


def features_by_dedup(
    ids: Sequence[str], metas: Sequence[dict[str, Any]], dedup: pa.Table, config: PipelineConfig
) -> pa.Table | None:
    """As features, without a look at the messages: `dedup` has the same gram sets of these rows among others.

    None where it has not: near-duplicates were not looked for, or not among some of the rows.
    """
    if not config.dedup.near or any(meta.get("near_exempt") is True for meta in metas):
        return None
    places = pc.index_in(pa.array(ids, pa.large_string()), value_set=dedup["row_id"])
    return _features(ids, metas, taken(from_column(dedup["grams"]), places.to_numpy()))


def _features(ids: Sequence[str], metas: Sequence[dict[str, Any]], sets: GramSets) -> pa.Table:
    columns = {
        "row_id": pa.array(ids, pa.large_string()),
        "holdout_key": pa.array(map(_holdout_key, ids, metas), pa.large_string()),
        "train_only": pa.array([meta.get("set") == "train" for meta in metas], pa.bool_()),
        "grams": to_column(sets.starts, sets.hashes),
    }
    return pa.table(columns, schema=FEATURES)


def decide(features: pa.Table, ledger: pa.Table, config: PipelineConfig) -> HoldoutDecision:
    """As decide_rows, of features in memory."""
    assert pc.count_distinct(features["row_id"]).as_py() == len(features), "row ids must be different"
    return decide_rows(FeatureTable(features), ledger, config)


def decide_rows(
    features: Features, ledger: pa.Table, config: PipelineConfig, *, present: Bools | None = None
) -> HoldoutDecision:
    """Side or drop of each row that is present, and the ledger with what was new. Their ids must be different.

    `ledger` is LEDGER.empty_table() at the first run. Raises IntegrityError when it is none of ours.
    """
    with features.sets("grams") as sets:
        nodes, ledger_sides = _nodes(features, sets, _checked(ledger))
        absent = np.zeros(len(nodes.key), bool)
        if present is not None:
            absent[: len(features)] = ~present
        barred = nodes.train_only & np.isin(ledger_sides[nodes.key], (VALIDATION, TEST)) & ~absent
        index = PrefixIndex(
            nodes.sets, threshold=config.holdout.near_threshold, num_threads=config.engine.workers or 1
        )
        key_sides = sides_of_keys(index, nodes, ledger_sides, ~(barred | absent), config.holdout)
        side = np.where(barred, TRAIN, key_sides[nodes.key])
        conflicts = conflicts_between_sides(index, side, ~(barred | absent))
        kept = kept_nodes(nodes, side, conflicts) & ~barred & ~absent
        return HoldoutDecision(
            sides=_sides_table(nodes, side, kept),
            drops=_drops_table(nodes, key_sides, side, kept, barred, conflicts),
            ledger=_grown(ledger, nodes, key_sides, ledger_sides, kept),
        )


def _holdout_key(row_id: str, meta: dict[str, Any]) -> str:
    key = meta.get("holdout_key")
    if not key:
        raise InputError(
            f"row {row_id} has no meta.holdout_key, expected the one that merge writes: run the stages again from merge"
        )
    return str(key)


# --- nodes: rows of this run, then lines of the ledger that hold a row out ------------------------------------------


def _checked(ledger: pa.Table) -> pa.Table:
    missing = [name for name in LEDGER.names if name not in ledger.column_names]
    if missing:
        raise IntegrityError(
            f"hold-out ledger has no column {missing[0]!r}, expected {LEDGER.names}: restore holdout.parquet"
        )
    side_of: dict[str, str] = {}
    for key, side in zip(ledger["holdout_key"].to_pylist(), ledger["side"].to_pylist(), strict=True):
        if side not in SPLITS or side_of.setdefault(key, side) != side:
            raise IntegrityError(
                f"hold-out ledger has key {key} on side {side!r} and {side_of.get(key)!r}, expected one of "
                f"{', '.join(SPLITS)}: restore holdout.parquet"
            )
    return ledger.select(LEDGER.names).cast(LEDGER)


def _nodes(features: Features, sets: StoredSets, ledger: pa.Table) -> tuple[Nodes, Ints]:
    """All nodes, and the side of each key by the ledger (FREE where it has none)."""
    lines = ledger.filter(pc.is_valid(ledger["row_id"]))
    row_ids = features.column("row_id").to_pylist() + lines["row_id"].to_pylist()
    keys = features.column("holdout_key").to_pylist() + lines["holdout_key"].to_pylist()
    key_names = sorted({*keys, *ledger["holdout_key"].to_pylist()})
    place = {name: number for number, name in enumerate(key_names)}
    rank = {row_id: number for number, row_id in enumerate(sorted(set(row_ids)))}
    key = np.array([place[name] for name in keys], np.int64)
    all_sets = JoinedSets(sets, from_column(lines["grams"]))
    in_ledger = np.arange(len(row_ids)) >= len(features)
    ledger_sides = np.full(len(key_names), FREE)
    for name, side in zip(ledger["holdout_key"].to_pylist(), ledger["side"].to_pylist(), strict=True):
        ledger_sides[place[name]] = SPLITS.index(side)
    train_only = features.column("train_only").to_numpy()
    digests = set_digests(all_sets)
    content = list(zip(key.tolist(), digests.tolist(), strict=True))
    known = {content[node] for node in np.flatnonzero(in_ledger).tolist()}
    nodes = Nodes(
        row_ids=np.array(row_ids, dtype=object),
        id_rank=np.array([rank[row_id] for row_id in row_ids], np.int64),
        key=key,
        key_names=key_names,
        train_only=np.append(train_only, np.zeros(len(lines), bool)).astype(bool),
        in_ledger=in_ledger,
        held_out_before=np.array([pair in known for pair in content], bool),
        sets=all_sets,
        digests=digests,
    )
    return nodes, ledger_sides


# --- tables ---------------------------------------------------------------------------------------------------------


def _sides_table(nodes: Nodes, side: Ints, kept: Bools) -> pa.Table:
    rows = nodes.by_id(kept & ~nodes.in_ledger)
    sides = [SPLITS[number] for number in side[rows].tolist()]
    return pa.table({"row_id": nodes.row_ids[rows].tolist(), "side": sides}, schema=SIDES)


def _drops_table(
    nodes: Nodes, key_sides: Ints, side: Ints, kept: Bools, barred: Bools, conflicts: Pairs
) -> pa.Table:
    by_row = _near_drops(nodes, side, kept, conflicts) | _barred_drops(nodes, key_sides, kept, barred)
    rows = sorted(by_row, key=lambda row: int(nodes.id_rank[row]))
    columns = {
        "row_id": nodes.row_ids[rows].tolist(),
        "reason": ["near_holdout"] * len(rows),
        "detail": [by_row[row][0] for row in rows],
        "survivor": [by_row[row][1] for row in rows],
    }
    return pa.table(columns, schema=DROPPED)


def _near_drops(nodes: Nodes, side: Ints, kept: Bools, conflicts: Pairs) -> dict[int, tuple[str, str | None]]:
    """Row -> detail and survivor."""
    drops: dict[int, tuple[str, str | None]] = {}
    telling = np.flatnonzero(~kept[conflicts.left] & ~nodes.in_ledger[conflicts.left] & kept[conflicts.right])
    right = conflicts.right[telling]
    for i in telling[np.lexsort((nodes.in_ledger[right], nodes.id_rank[right]))].tolist():
        other = conflicts.right[i]
        detail = f"Jaccard {conflicts.jaccard[i]:.3f} with a {SPLITS[side[other]]} row"
        drops.setdefault(int(conflicts.left[i]), (detail, str(nodes.row_ids[other])))
    return drops


def _barred_drops(
    nodes: Nodes, key_sides: Ints, kept: Bools, barred: Bools
) -> dict[int, tuple[str, str | None]]:
    rows = np.flatnonzero(barred).tolist()
    keys = {int(nodes.key[row]) for row in rows}
    lowest: dict[int, str] = {}
    for node in np.flatnonzero(kept & np.isin(nodes.key, sorted(keys))).tolist():
        key = int(nodes.key[node])
        lowest[key] = min(lowest.get(key, nodes.row_ids[node]), nodes.row_ids[node])
    return {
        row: (
            f"set: train, but its first user turn is held out for {SPLITS[key_sides[nodes.key[row]]]}",
            lowest.get(int(nodes.key[row])),
        )
        for row in rows
    }


def _grown(ledger: pa.Table, nodes: Nodes, key_sides: Ints, ledger_sides: Ints, kept: Bools) -> pa.Table:
    """The old lines, one for each new key, one for each row newly held out (of equal ones the lowest row id)."""
    held_out = kept & ~nodes.held_out_before & (key_sides[nodes.key] != TRAIN) & (nodes.sets.sizes > 0)
    rows = nodes.by_id(held_out)
    _, first = np.unique(
        np.stack([nodes.key[rows].astype(np.uint64), nodes.digests[rows]]), axis=1, return_index=True
    )
    rows = rows[np.sort(first)]
    new_keys = np.flatnonzero(ledger_sides == FREE)
    keys = np.append(new_keys, nodes.key[rows])
    sets = nodes.sets.of_rows(rows)
    starts = np.append(np.zeros(len(new_keys), np.int64), sets.starts)
    lines = {
        "holdout_key": [nodes.key_names[key] for key in keys.tolist()],
        "side": [SPLITS[side] for side in key_sides[keys].tolist()],
        "row_id": [None] * len(new_keys) + nodes.row_ids[rows].tolist(),
        "grams": to_column(starts, sets.hashes),
    }
    grown = pa.concat_tables([_checked(ledger), pa.table(lines, schema=LEDGER)])
    order = grown.append_column("digest", pa.array(set_digests(from_column(grown["grams"]))))
    by = [("holdout_key", "ascending"), ("row_id", "ascending"), ("digest", "ascending")]
    return grown.take(pc.sort_indices(order, sort_keys=by)).combine_chunks()
