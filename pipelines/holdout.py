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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.feature_files import Features, FeatureTable
from pipelines.freed_memory import give_back_freed
from pipelines.grams import (
    Hashes,
    Ints,
    JoinedSets,
    StoredSets,
    from_column,
    set_digests,
)
from pipelines.holdout_features import FEATURES as FEATURES
from pipelines.holdout_features import features as features
from pipelines.holdout_features import features_by_dedup as features_by_dedup
from pipelines.holdout_ledger import LEDGER as LEDGER
from pipelines.holdout_ledger import checked, dense_ranks, grown, side_names, sides_in_splits
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
from schemas.conversation import Drop
from schemas.dataset import SPLITS
from schemas.pipeline_config import PipelineConfig

STAGE_VERSION = 1
NO_SIDE = -1

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


@dataclass(frozen=True, slots=True)
class DecidedRows:
    """The same by the numbers of the rows; rows that share an id share what was decided."""

    sides: npt.NDArray[np.int8]  # of each row its place in SPLITS, NO_SIDE where it is not kept
    drops: pa.Table
    ledger: pa.Table
    _drop_rows: Ints  # of each drop the number of its row, ascending
    _drop_lines: Ints  # and its line

    def of_parts(self, num_rows: Iterable[int]) -> Iterator[tuple[npt.NDArray[np.int8], dict[int, Drop]]]:
        """For parts of so many rows the sides of their rows, and their drops by row number in the part."""
        start = 0
        for number in num_rows:
            yield self.sides[start : start + number], self._drops_between(start, start + number)
            start += number

    def _drops_between(self, start: int, end: int) -> dict[int, Drop]:
        first, last = np.searchsorted(self._drop_rows, [start, end]).tolist()
        lines = self.drops.take(pa.array(self._drop_lines[first:last]))
        columns = (lines[name].to_pylist() for name in ("reason", "detail", "survivor"))
        numbers = (self._drop_rows[first:last] - start).tolist()
        return {number: Drop(*told) for number, *told in zip(numbers, *columns, strict=True)}


def versions(config: PipelineConfig) -> dict[str, str]:
    """Lower case, NFC and white space come from Python's Unicode tables."""
    return {"unicode": unicodedata.unidata_version}


def decide(features: pa.Table, ledger: pa.Table, config: PipelineConfig) -> HoldoutDecision:
    """As decide_rows, of features in memory."""
    assert pc.count_distinct(features["row_id"]).as_py() == len(features), "row ids must be different"
    decided = decide_rows(FeatureTable(features), ledger, config)
    return HoldoutDecision(sides_by_id(features["row_id"], decided.sides), decided.drops, decided.ledger)


def sides_by_id(row_ids: pa.ChunkedArray, sides: npt.NDArray[np.int8]) -> pa.Table:
    """SIDES of rows with these ids."""
    kept = np.flatnonzero(sides != NO_SIDE)
    columns = {"row_id": row_ids.take(pa.array(kept)), "side": side_names(sides[kept].astype(np.int64))}
    return pa.table(columns, schema=SIDES).sort_by("row_id")


def decide_rows(
    features: Features, ledger: pa.Table, config: PipelineConfig, *, present: Bools | None = None
) -> DecidedRows:
    """Side or drop of each row that is present, and the ledger with what was new. Their ids must be different.

    `ledger` is LEDGER.empty_table() at the first run. Raises IntegrityError when it is none of ours.
    """
    ledger = checked(ledger)
    with features.sets("grams") as sets:
        nodes, ledger_sides = _nodes(features, sets, ledger)
        give_back_freed()
        absent = np.zeros(len(nodes.key), bool)
        if present is not None:
            absent[: len(features)] = ~present
        barred = nodes.train_only & np.isin(ledger_sides[nodes.key], (VALIDATION, TEST)) & ~absent
        key_sides, side, conflicts = _sides(nodes, ledger_sides, barred, absent, config)
        kept = kept_nodes(nodes, side, conflicts) & ~barred & ~absent
        by_row = _near_drops(nodes, side, kept, conflicts) | _barred_drops(nodes, key_sides, kept, barred)
        dropped = np.array(sorted(by_row, key=lambda row: int(nodes.id_rank[row])), np.int64)
        drop_rows, drop_lines = _rows_of_ids(nodes, dropped)
        return DecidedRows(
            sides=_sides_of_rows(nodes, side, kept),
            drops=_drops_table(nodes, dropped, by_row),
            ledger=grown(ledger, nodes, key_sides, ledger_sides, kept),
            _drop_rows=drop_rows,
            _drop_lines=drop_lines,
        )


def _sides(
    nodes: Nodes, ledger_sides: Ints, barred: Bools, absent: Bools, config: PipelineConfig
) -> tuple[Ints, Ints, Pairs]:
    """Sides of keys and of nodes, and near pairs across. The index ends here: it is the largest thing in memory."""
    present = ~(barred | absent)
    index = PrefixIndex(
        nodes.sets, threshold=config.holdout.near_threshold, num_threads=config.engine.workers or 1
    )
    key_sides = sides_of_keys(index, nodes, ledger_sides, present, config.holdout)
    give_back_freed()
    side = np.where(barred, TRAIN, key_sides[nodes.key])
    return key_sides, side, conflicts_between_sides(index, side, present)


# --- nodes: rows of this run, then lines of the ledger that hold a row out ------------------------------------------


def _nodes(features: Features, sets: StoredSets, ledger: pa.Table) -> tuple[Nodes, Ints]:
    """All nodes, and the side of each key by the ledger (FREE where it has none)."""
    is_line = ledger["row_id"].is_valid().to_numpy()
    lines = ledger.filter(pa.array(is_line))

    def row_ids() -> pa.ChunkedArray:
        return _both(features.column("row_id"), lines["row_id"])

    def keys() -> pa.ChunkedArray:
        return _both(features.column("holdout_key"), ledger["holdout_key"])

    # Of rows and of all lines of the ledger, not of the nodes alone.
    key = dense_ranks(keys())
    _, place_of_key = np.unique(key, return_index=True)
    of_rows, of_ledger = key[: len(features)], key[len(features) :]
    ledger_sides = np.full(len(place_of_key), FREE)
    ledger_sides[of_ledger] = sides_in_splits(ledger["side"])
    all_sets = JoinedSets(sets, from_column(lines["grams"]))
    key = np.append(of_rows, of_ledger[is_line])
    in_ledger = np.arange(len(key)) >= len(features)
    digests = set_digests(all_sets)
    train_only = np.zeros(len(key), bool)
    train_only[: len(features)] = features.column("train_only").to_numpy()
    nodes = Nodes(
        row_ids=lambda chosen: row_ids().take(pa.array(chosen, pa.int64())),
        id_rank=dense_ranks(row_ids()),
        key=key,
        key_names=lambda chosen: keys().take(pa.array(place_of_key[chosen], pa.int64())),
        ledger_key=of_ledger.copy(),
        train_only=train_only,
        in_ledger=in_ledger,
        held_out_before=_as_in_ledger(key, digests, in_ledger),
        sets=all_sets,
        digests=digests,
    )
    return nodes, ledger_sides


def _both(first: pa.ChunkedArray, second: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([*first.chunks, *second.chunks], pa.large_string())


def _as_in_ledger(key: Ints, digests: Hashes, in_ledger: Bools) -> Bools:
    """Nodes with the key and the digest of one in the ledger, as those themselves are."""
    known = set(zip(key[in_ledger].tolist(), digests[in_ledger].tolist(), strict=True))
    found = np.flatnonzero(np.isin(digests, digests[in_ledger]))
    pairs = zip(key[found].tolist(), digests[found].tolist(), strict=True)
    same = np.zeros(len(key), bool)
    same[found] = [pair in known for pair in pairs]
    return same


# --- what was decided -----------------------------------------------------------------------------------------------


def _sides_of_rows(nodes: Nodes, side: Ints, kept: Bools) -> npt.NDArray[np.int8]:
    chosen = np.flatnonzero(kept & ~nodes.in_ledger)
    by_rank = np.full(len(nodes.id_rank), NO_SIDE, np.int8)
    by_rank[nodes.id_rank[chosen]] = side[chosen]
    return by_rank[nodes.id_rank[~nodes.in_ledger]]


def _rows_of_ids(nodes: Nodes, dropped: Ints) -> tuple[Ints, Ints]:
    """All rows with the id of a dropped one, ascending, and the place of that one in `dropped`."""
    line = np.full(len(nodes.id_rank), -1)
    line[nodes.id_rank[dropped]] = np.arange(len(dropped))
    lines = line[nodes.id_rank[~nodes.in_ledger]]
    rows = np.flatnonzero(lines >= 0)
    return rows, lines[rows]


def _drops_table(nodes: Nodes, dropped: Ints, by_row: dict[int, tuple[str, int | None]]) -> pa.Table:
    details, survivors = zip(*(by_row[row] for row in dropped.tolist()), strict=True) if by_row else ((), ())
    named = np.array(sorted({survivor for survivor in survivors if survivor is not None}), np.int64)
    name = dict(zip(named.tolist(), nodes.row_ids(named).to_pylist(), strict=True))
    columns = {
        "row_id": nodes.row_ids(dropped),
        "reason": ["near_holdout"] * len(dropped),
        "detail": details,
        "survivor": [None if survivor is None else name[survivor] for survivor in survivors],
    }
    return pa.table(columns, schema=DROPPED)


def _near_drops(nodes: Nodes, side: Ints, kept: Bools, conflicts: Pairs) -> dict[int, tuple[str, int | None]]:
    """Row -> detail and survivor."""
    drops: dict[int, tuple[str, int | None]] = {}
    telling = np.flatnonzero(~kept[conflicts.left] & ~nodes.in_ledger[conflicts.left] & kept[conflicts.right])
    right = conflicts.right[telling]
    for i in telling[np.lexsort((nodes.in_ledger[right], nodes.id_rank[right]))].tolist():
        other = int(conflicts.right[i])
        detail = f"Jaccard {conflicts.jaccard[i]:.3f} with a {SPLITS[side[other]]} row"
        drops.setdefault(int(conflicts.left[i]), (detail, other))
    return drops


def _barred_drops(
    nodes: Nodes, key_sides: Ints, kept: Bools, barred: Bools
) -> dict[int, tuple[str, int | None]]:
    rows = np.flatnonzero(barred)
    lowest: dict[int, int] = {}
    for node in nodes.by_id(kept & np.isin(nodes.key, nodes.key[rows])).tolist():
        lowest.setdefault(int(nodes.key[node]), node)
    return {
        row: (
            f"set: train, but its first user turn is held out for {SPLITS[key_sides[nodes.key[row]]]}",
            lowest.get(int(nodes.key[row])),
        )
        for row in rows.tolist()
    }
