"""OpenAssistant's flat files, a row a message: what such a row is, and the rows of one tree nested in each other.

`pipelines/message_trees.py` brings the rows of a tree together, wherever they stand in a source, into one record:
{"message_rows": [row, ...]}, or {"message_rows": [row], "unplaced": reason} for a row that is in no tree.
"""

import re
from typing import Any

from schemas.conversation import Drop

ROWS, UNPLACED = "message_rows", "unplaced"


def is_message_row(record: dict[str, Any]) -> bool:
    """Whether a record is one message that names itself, its speaker and perhaps what it answers."""
    return (
        isinstance(record.get("message_id"), str)
        and {"text", "role"} <= record.keys()
        and (record["role"] in ("prompter", "assistant") or "message_tree_id" in record)
        and not isinstance(record.get("prompt"), dict)
    )


def is_rows_of_a_tree(record: dict[str, Any]) -> bool:
    """Whether a record is the rows of a tree, together or one that is in none."""
    rows = record.get(ROWS)
    return (
        isinstance(rows, list) and bool(rows) and all(isinstance(r, dict) and is_message_row(r) for r in rows)
    )


def parent_id(row: dict[str, Any]) -> str:
    """The id of the message that a row answers; empty for a root."""
    parent = row.get("parent_id")
    return "" if parent is None else str(parent)


def nested(record: dict[str, Any]) -> dict[str, Any] | Drop:
    """The tree as its own format has it: the root as `prompt`, in each message its `replies`, in the order of rows."""
    rows = record[ROWS]
    if UNPLACED in record:
        return _unplaced(rows[0], record[UNPLACED])
    messages = {row["message_id"]: row | _typed(row) | {"replies": []} for row in rows}
    roots = [message for message in messages.values() if not parent_id(message)]
    for message in messages.values():
        if parent_id(message) in messages:
            messages[parent_id(message)]["replies"].append(message)
    if len(roots) != 1:
        return Drop(
            "no_messages", f"{len(roots)} of {len(rows)} rows of the tree answer no other, expected one"
        )
    tree_id = roots[0].get("message_tree_id")
    tree_id = tree_id if isinstance(tree_id, str) else roots[0]["message_id"]
    return {"message_tree_id": tree_id, "prompt": roots[0]}


def _unplaced(row: dict[str, Any], reason: Any) -> Drop:
    if reason == "duplicate_message":
        detail = f"an earlier row of the source has its message_id {row['message_id']!r:.100}"
        return Drop("duplicate_message", detail)
    if reason == "tree_too_large":
        detail = "the rows of its tree together are longer than merge.max_record_bytes"
        return Drop("tree_too_large", detail)
    detail = f"no message that a root leads to has the id {parent_id(row)!r:.100}, its parent_id"
    return Drop("orphan_message", detail)


def _typed(row: dict[str, Any]) -> dict[str, Any]:
    """Where CSV has texts: whether a message is deleted, and its rank."""
    typed: dict[str, Any] = {}
    deleted, rank = row.get("deleted"), row.get("rank")
    if isinstance(deleted, str):
        typed["deleted"] = deleted.strip().lower() in ("true", "t", "1", "1.0", "yes")
    if isinstance(rank, str) and re.fullmatch(r"\d{1,9}(\.\d{1,9})?", rank.strip(), re.ASCII):
        typed["rank"] = float(rank)
    return typed


def lone_row() -> Drop:
    """Why a row is not read that stands among other records."""
    return Drop(
        "lone_message",
        "a row of a tree in a file that begins with something else: with format: oasst it is put into its tree",
    )
