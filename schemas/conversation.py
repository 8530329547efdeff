"""One chat as every stage sees it, the drop that may take its place, and their ids.

Hot loops handle millions of these, so they are slots dataclasses; pydantic stands at the border only.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


REASONING_EXTRAS = ("reasoning_content", "reasoning", "thinking")
"""Extras that hold what an assistant thought before it answered."""
CONTENT_EXTRAS = ("function_call", "reasoning", "reasoning_content", "thinking", "tool_calls")
"""Extras that are part of what was said: two calls with empty text and different arguments differ."""


@dataclass(slots=True)
class Message:
    """One turn. `extras` holds what a format knows beyond role and text (model, name, tool calls, ...)."""

    role: Role
    content: str
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Conversation:
    """One chat on its way from a source record to a training example.

    `source` is "<source name>/<file path inside the source>"; `record` counts from 0 inside its part, so that
    records added before the part change nothing in it; `schemas.run.first_record` tells where the part begins.
    `meta` is JSON-able; the keys that stages rely on are in `META_KEYS`.
    """

    row_id: str
    source: str
    record: int
    messages: list[Message]
    meta: dict[str, Any] = field(default_factory=dict)


META_KEYS = {
    "id": "the record's own id, as a string, where it had one",
    "format": "name of the reader that understood the record",
    "record_hash": "blake2b-128 of the record's raw bytes",
    "content_id": "blake2b-128 of the canonical messages as merged",
    "holdout_key": "blake2b-128 of the first user turn as merged, white space folded",
    "date": "ISO date in the record, where it had one",
    "set": "'train' where a record may never be held out",
    "group": "row id of the first chat of the record that this one is a path of; absent for a record of one chat",
    "near_exempt": "true where the rows of a source are alike on purpose and never near-duplicates",
    "answers": "what the source says of its assistant turns: auto, html or text; text once they are cleaned",
    "language": "languages of the chat by share of letters, largest first: [['en', 0.93], ...]",
    "chinese": "zh-Hans or zh-Hant, where a chat in Chinese shows which",
    "quality": "the score that filter.quality gave the chat",
    "unfinished": "true where an answer's markup says that it was cut off while being written",
    "model": "the model that answered, where the record names it",
    "tools": "the tools that the chat may call, as the record gives them",
    "input_chars": "characters at the end of the first question that were an Alpaca record's input",
    "raw": "first 64 KiB of a record that could not be read",
    "repairs": "what the stages changed, by name and count",
}


@dataclass(slots=True)
class Drop:
    """Why a row left the journey. `reason` is a stable snake_case word, `detail` is for people.

    `survivor` names the row that stands for this one (duplicates only).
    """

    reason: str
    detail: str = ""
    survivor: str | None = None


def blake2b_128(*parts: bytes) -> str:
    """32 hex digits over length-prefixed parts, so that ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def utf8(text: str) -> bytes:
    """Bytes of any Python string: JSON can carry lone surrogates, UTF-8 and Arrow cannot."""
    return text.encode("utf-8", "surrogatepass")


def content_id(messages: list[Message]) -> str:
    """Identity of what was said: roles, texts and extras, nothing of where they were found."""
    canonical = [
        [message.role, message.content, json.dumps(message.extras, sort_keys=True, ensure_ascii=True)]
        for message in messages
    ]
    return blake2b_128(json.dumps(canonical, ensure_ascii=True).encode())


def row_id(content: str, source_name: str, original_id: str, ordinal: int) -> str:
    """Identity of a row: survives a re-written export and a moved file.

    `ordinal` counts the earlier records of the same file with the same three other values.
    """
    return blake2b_128(content.encode(), utf8(source_name), utf8(original_id), str(ordinal).encode())


_WHITE_SPACE = re.compile(r"\s+")


def holdout_key(messages: list[Message]) -> str:
    """The side of the hold-out hangs on this: the first user turn, white space folded."""
    first_user_turn = next((m.content for m in messages if m.role == "user"), "")
    return blake2b_128(utf8(_WHITE_SPACE.sub(" ", first_user_turn).strip()))
