"""Columns of everything the pipeline writes: rows and drops (Parquet), shards and plans (Arrow streams)."""

import pyarrow as pa

MESSAGE = pa.struct(
    [
        pa.field("role", pa.large_string(), nullable=False),
        pa.field("content", pa.large_string(), nullable=False),
        pa.field("extras", pa.large_string(), nullable=False),  # JSON object, "{}" when empty
    ]
)

_ROW_FIELDS = [
    pa.field("row_id", pa.large_string(), nullable=False),
    pa.field("source", pa.large_string(), nullable=False),  # <source name>/<file>
    pa.field(
        "record", pa.int64(), nullable=False
    ),  # number in its part, from 0; the part's label has its first
    pa.field("messages", pa.large_list(MESSAGE), nullable=False),
    pa.field("meta", pa.large_string(), nullable=False),  # JSON object, keys in conversation.META_KEYS
]

ROWS = pa.schema(_ROW_FIELDS)
"""Folders 01-05, `part-*.parquet`."""

DROPS = pa.schema(
    [
        *_ROW_FIELDS,
        pa.field("stage", pa.large_string(), nullable=False),
        pa.field("reason", pa.large_string(), nullable=False),
        pa.field("detail", pa.large_string(), nullable=False),
        pa.field("survivor", pa.large_string(), nullable=True),
    ]
)
"""Folders 01-06, `dropped-*.parquet`: the row as it was when it left, with the stage's reason.

A record that could not be read has no messages; `meta.raw` then holds its first 64 KiB as text."""

SPLITS = ("train", "validation", "test")
"""Sides of the hold-out. In folder 05 each side is a folder; in 06 each is a split of the DatasetDict."""

SHARD = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),
        # Trained token spans, half-open, ascending; one weight a span, touching only where weights differ.
        pa.field("span_starts", pa.list_(pa.int32())),
        pa.field("span_ends", pa.list_(pa.int32())),
        pa.field("span_weights", pa.list_(pa.float32())),
        pa.field("num_tokens", pa.int32()),
        pa.field("num_trained_tokens", pa.int32()),
        pa.field("num_trained_bytes", pa.int32()),  # UTF-8 bytes of the trained assistant texts
        pa.field("row_id", pa.string()),
        pa.field("piece", pa.int32()),  # 0 for a chat that was not cut
        pa.field("first_message", pa.int32()),  # messages [first, end) of the row stand in this piece
        pa.field("end_message", pa.int32()),
        pa.field("source", pa.string()),
        pa.field("language", pa.string()),
    ]
)
"""One training example of folder 06_shards. A token t in a trained span is a target: position t-1 predicts it.

Token 0 of an example is never a target."""

PLAN = pa.schema(
    [
        pa.field("bin", pa.int32()),
        pa.field("example", pa.int32()),  # row number in the split
        pa.field("offset", pa.int32()),  # first token's place in the bin
        pa.field("num_tokens", pa.int32()),
        pa.field(
            "first_token", pa.int32()
        ),  # tokens [first, first + num_tokens) of the example; 0 but in documents
        pa.field("num_trained_tokens", pa.int32()),  # of these
        pa.field(
            "weight_sum", pa.float64()
        ),  # sum of their weights: a step's loss is divided by that of its bins
    ]
)
"""Folder 07_plan, `<split>-epoch-<nnnn>.arrow`: sorted by (bin, offset); bins in the order of training.

The first token of a piece is never a target."""
