"""One record's bytes -> its rows: parsed, its format found, its chats read, each with ids and what it says of itself."""

from typing import Any

from pipelines.containers import RAW_HEAD_BYTES, RawRecord
from pipelines.formats import document
from pipelines.formats.custom import named
from pipelines.formats.families import CHOSEN, FORMATS, Format
from pipelines.formats.turns import Chats, Reading
from pipelines.parse import parse_record, record_meta
from schemas.conversation import Conversation, Drop, Message, content_id, holdout_key
from schemas.source_config import SourceConfig

Row = tuple[Conversation, Drop | None]


def read_rows(raw_record: RawRecord, source: SourceConfig, max_record_bytes: int) -> list[Row]:
    """At least one row; ids, places and what several chats of one record have in `group` are the caller's."""
    raw = raw_record.raw
    meta = _source_meta(source) | {"record_hash": raw_record.hash, "content_id": raw_record.hash}
    if raw_record.reason:
        return [_unreadable(raw, meta, Drop(raw_record.reason, raw_record.detail))]
    if len(raw) > max_record_bytes:
        detail = f"{len(raw)} bytes, merge.max_record_bytes is {max_record_bytes}"
        return [_unreadable(raw, meta, Drop("record_too_large", detail))]
    parsed = parse_record(raw)
    if isinstance(parsed, Drop):
        return [_unreadable(raw, meta, parsed)]
    record, num_surrogates = parsed
    meta |= record_meta(record | named(record, source.fields) if source.fields else record)
    if num_surrogates:
        meta["repairs"] = {"lone_surrogates": num_surrogates}
    name, reading = _read(record, source)
    if isinstance(reading, Drop):
        return [_unreadable(raw, meta, reading)]
    meta["format"] = name
    if isinstance(reading, Chats):
        return _rows_of_one_group(raw, meta, reading)
    # A document has no question: its side of the hold-out hangs on all of its text.
    asked = [Message("user", reading[0].content)] if name == document.NAME else reading
    return [_row(raw, meta | {"holdout_key": holdout_key(asked)}, reading, None)]


def _source_meta(source: SourceConfig) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    if source.set == "train" or source.identity is not None:
        meta["set"] = "train"
    if source.identity is not None:
        meta["near_exempt"] = True
    if source.answers != "auto":
        meta["answers"] = source.answers
    return meta


def _read(record: dict[str, Any], source: SourceConfig) -> tuple[str, Reading]:
    name, reader = _reader(record, source.format)
    if reader is None:
        keys = ", ".join(repr(key)[:100] for key in list(record)[:10])
        wanted = "of a known format" if source.format == "auto" else source.format
        return "", Drop("unknown_format", f"not {wanted}; keys: {keys}")
    reading = reader.reading(record, source)
    is_empty = not reading.chats if isinstance(reading, Chats) else not reading
    return name, Drop("no_messages", f"{name} without a turn") if is_empty else reading


def _reader(record: dict[str, Any], wanted: str) -> tuple[str, Format | None]:
    if wanted == "custom":
        return wanted, CHOSEN[wanted]
    formats = FORMATS if wanted == "auto" else {wanted: (FORMATS | CHOSEN)[wanted]}
    return next(((name, found) for name, found in formats.items() if found.matches(record)), ("", None))


def _rows_of_one_group(raw: bytes, meta: dict[str, Any], reading: Chats) -> list[Row]:
    repairs = meta.get("repairs", {}) | reading.meta.get("repairs", {})
    meta = {key: value for key, value in meta.items() if key != "repairs"}
    said = {key: value for key, value in reading.meta.items() if key != "repairs"}
    # One side for all, though edited first questions differ: that of the first chat.
    meta = said | meta | _newer(said) | {"group": "", "holdout_key": holdout_key(reading.chats[0][0])}
    rows = [_row(raw, meta, messages, drop) for messages, drop in reading.chats]
    if repairs:  # of the record, so they are counted once, with a row that is kept if there is one
        first = next((row for row, drop in rows if drop is None), rows[0][0])
        first.meta["repairs"] = repairs
    return rows


def _newer(said: dict[str, Any]) -> dict[str, Any]:
    """What a reader knows better than the record's plain keys."""
    return {key: said[key] for key in ("id", "date") if key in said}


def _row(raw: bytes, meta: dict[str, Any], messages: list[Message], drop: Drop | None) -> Row:
    if drop is not None and not messages:
        return _unreadable(raw, meta, drop)
    return Conversation("", "", 0, messages, meta | {"content_id": content_id(messages)}), drop


def _unreadable(raw: bytes, meta: dict[str, Any], drop: Drop) -> tuple[Conversation, Drop]:
    text = raw[:RAW_HEAD_BYTES].decode("utf-8", "replace")
    return Conversation("", "", 0, [], meta | {"raw": text}), drop
