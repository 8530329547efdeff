"""Rows as columns of Arrow and back. Arrow also takes and gives a dict for each message, in twice the time."""

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc

from schemas.conversation import Conversation, Drop, Message
from schemas.dataset import DROPS, MESSAGE, ROWS


def rows_table(rows: Sequence[Conversation]) -> pa.Table:
    """Rows in the schema ROWS."""
    return pa.table(_columns(rows), schema=ROWS)


def drops_table(dropped: Sequence[tuple[Conversation, Drop]], *, stage: str) -> pa.Table:
    """Dropped rows, each as it was when it left, with its reason, in the schema DROPS."""
    told = {
        "stage": [stage] * len(dropped),
        "reason": [drop.reason for _, drop in dropped],
        "detail": [drop.detail for _, drop in dropped],
        "survivor": [drop.survivor for _, drop in dropped],
    }
    columns = {name: pa.array(values, pa.large_string()) for name, values in told.items()}
    return pa.table(_columns([row for row, _ in dropped]) | columns, schema=DROPS)


def rows_of(batch: pa.RecordBatch) -> Iterator[Conversation]:
    """The rows of a batch in the schema ROWS."""
    messages = batch["messages"]
    texts = (column.to_pylist() for column in messages.flatten().flatten())
    said = [Message(role, content, _read_json(extras)) for role, content, extras in zip(*texts, strict=True)]
    columns = (batch[name].to_pylist() for name in ("row_id", "source", "record", "meta"))
    lengths = pc.list_value_length(messages).to_pylist()
    end = 0
    for row_id, source, record, meta, length in zip(*columns, lengths, strict=True):
        start, end = end, end + length
        yield Conversation(row_id, source, record, said[start:end], _read_json(meta))


def _columns(rows: Sequence[Conversation]) -> dict[str, pa.Array]:
    messages = [message for row in rows for message in row.messages]
    texts = [
        pa.array([message.role for message in messages], pa.large_string()),
        pa.array([message.content for message in messages], pa.large_string()),
        pa.array([_json_text(message.extras) for message in messages], pa.large_string()),
    ]
    borders = list(itertools.accumulate((len(row.messages) for row in rows), initial=0))
    return {
        "row_id": pa.array([row.row_id for row in rows], pa.large_string()),
        "source": pa.array([row.source for row in rows], pa.large_string()),
        "record": pa.array([row.record for row in rows], pa.int64()),
        "messages": pa.LargeListArray.from_arrays(
            pa.array(borders, pa.int64()), pa.StructArray.from_arrays(texts, fields=list(MESSAGE))
        ),
        "meta": pa.array([_json_text(row.meta) for row in rows], pa.large_string()),
    }


def _read_json(text: str) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(text)) if text != "{}" else {}


def _json_text(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if value else "{}"
