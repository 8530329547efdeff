"""What stage 5 needs to know of each row: its holdout key, whether it may only train, and its gram set."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.grams import (
    GRAMS_TYPE,
    GramSets,
    compared_text,
    from_column,
    gram_sets,
    spoken,
    taken,
    to_column,
)
from schemas.conversation import Conversation
from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig

FEATURES = pa.schema(
    [
        pa.field("row_id", pa.large_string(), nullable=False),
        pa.field("holdout_key", pa.large_string(), nullable=False),
        pa.field("train_only", pa.bool_(), nullable=False),
        pa.field("grams", GRAMS_TYPE, nullable=False),
    ]
)


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


def _holdout_key(row_id: str, meta: dict[str, Any]) -> str:
    key = meta.get("holdout_key")
    if not key:
        raise InputError(
            f"row {row_id} has no meta.holdout_key, expected the one that merge writes: run the stages again from merge"
        )
    return str(key)
