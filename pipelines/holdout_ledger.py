"""The hold-out ledger, <run root>/holdout.parquet: checked when it is read, grown by what a run has drawn.

Texts stay in Arrow's columns and are taken from there once: a million Python strings are a hundred megabytes.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.grams import GRAMS_TYPE, Ints, from_column, set_digests, to_column
from pipelines.holdout_sides import FREE, TRAIN, Nodes
from pipelines.overlap import Bools
from schemas.dataset import SPLITS
from schemas.errors import IntegrityError

LEDGER = pa.schema(
    [
        pa.field("holdout_key", pa.large_string(), nullable=False),
        pa.field("side", pa.large_string(), nullable=False),
        # Null in the one line that each key has; else a row held out under that key, with its grams.
        pa.field("row_id", pa.large_string(), nullable=True),
        pa.field("grams", GRAMS_TYPE, nullable=False),
    ]
)
"""By (holdout_key, row_id)."""


def checked(ledger: pa.Table) -> pa.Table:
    """The same with the columns of LEDGER. Raises IntegrityError when it is none of ours."""
    missing = [name for name in LEDGER.names if name not in ledger.column_names]
    if missing:
        raise IntegrityError(
            f"hold-out ledger has no column {missing[0]!r}, expected {LEDGER.names}: restore holdout.parquet"
        )
    keys, sides = ledger["holdout_key"], ledger["side"].cast(pa.large_string())
    number = sides_in_splits(sides)
    first = _first_lines(keys)
    wrong = (number < 0) | (number != number[first])
    if wrong.any():
        line = int(np.argmax(wrong))
        other = sides[int(first[line])].as_py() if first[line] < line else None
        raise IntegrityError(
            f"hold-out ledger has key {keys[line]} on side {sides[line].as_py()!r} and {other!r}, expected one of "
            f"{', '.join(SPLITS)}: restore holdout.parquet"
        )
    return ledger.select(LEDGER.names).cast(LEDGER)


def sides_in_splits(sides: pa.ChunkedArray) -> Ints:
    """Of each its place in SPLITS, -1 for what is no side."""
    places = pc.index_in(sides, value_set=pa.array(SPLITS, pa.large_string()))
    return pc.fill_null(places, -1).to_numpy().astype(np.int64)  # type: ignore[no-any-return]


def dense_ranks(texts: pa.ChunkedArray) -> Ints:
    """Places in the order of all different texts, from 0; equal for equal texts."""
    return pc.rank(texts, "ascending", tiebreaker="dense").to_numpy().astype(np.int64) - 1  # type: ignore[no-any-return]


def side_names(sides: Ints) -> pa.Array:
    return pa.array(SPLITS, pa.large_string()).take(pa.array(sides, pa.int64()))


def _first_lines(keys: pa.ChunkedArray) -> Ints:
    """Of each line the first one with its key."""
    number = dense_ranks(keys)
    _, first = np.unique(number, return_index=True)
    return first[number]


def grown(ledger: pa.Table, nodes: Nodes, key_sides: Ints, ledger_sides: Ints, kept: Bools) -> pa.Table:
    """The old lines, one for each new key, one for each row newly held out (of equal ones the lowest row id)."""
    rows = _newly_held_out(nodes, key_sides, kept)
    new_keys = np.flatnonzero(ledger_sides == FREE)
    sets = nodes.sets.of_rows(rows)
    starts = np.append(np.zeros(len(new_keys), np.int64), sets.starts)
    grams = _joined(ledger["grams"], to_column(starts, sets.hashes))
    row_ids = _joined(
        ledger["row_id"], pa.nulls(len(new_keys), pa.large_string()), *nodes.row_ids(rows).chunks
    )
    keys = np.concatenate([nodes.ledger_key, new_keys, nodes.key[rows]])
    last = np.int64(len(nodes.key))  # where lines without a row id come
    ranks = np.full(len(keys), last)
    ranks[: len(ledger)][ledger["row_id"].is_valid().to_numpy()] = nodes.id_rank[nodes.in_ledger]
    ranks[len(keys) - len(rows) :] = nodes.id_rank[rows]
    order = np.lexsort((set_digests(from_column(grams)), ranks, keys))
    lines = pa.array(order)
    columns = {
        "holdout_key": nodes.key_names(keys[order]),
        "side": side_names(key_sides[keys[order]]),
        "row_id": row_ids.take(lines),
        "grams": grams.take(lines),
    }
    return pa.table(columns, schema=LEDGER).combine_chunks()


def _newly_held_out(nodes: Nodes, key_sides: Ints, kept: Bools) -> Ints:
    held_out = kept & ~nodes.held_out_before & (key_sides[nodes.key] != TRAIN) & (nodes.sets.sizes > 0)
    rows = nodes.by_id(held_out)
    _, first = np.unique(
        np.stack([nodes.key[rows].astype(np.uint64), nodes.digests[rows]]), axis=1, return_index=True
    )
    return rows[np.sort(first)]


def _joined(column: pa.ChunkedArray, *more: pa.Array) -> pa.ChunkedArray:
    return pa.chunked_array([*column.chunks, *more], column.type)
