"""ShareGPT: {"conversations": [{"from": "human", "value": "..."}, ...]}, and the shapes that grew out of it.

The list may be called conversation or items, its turns may be {role, content}, or pairs {human, assistant}. Keys
that are not read here (plugins, model, scores, ...) change nothing.
"""

from typing import Any

from pipelines.formats.turns import listed, read_pair, read_turn, with_system
from schemas.conversation import Drop, Message

_LIST_KEYS = ("conversations", "conversation", "items")
_TEXT_KEYS = ("value", "content", "markdown", "text")


def matches(record: dict[str, Any]) -> bool:
    """Whether the record holds a list of turns under one of ShareGPT's names."""
    return _turns(record) is not None


def read(record: dict[str, Any]) -> list[Message] | Drop:
    """The chat, or why it can't be read."""
    messages: list[Message] = []
    for turn in _turns(record) or []:
        found = _read(turn)
        if isinstance(found, Drop):
            return found
        messages += found
    return with_system(record.get("system"), messages)


def _turns(record: dict[str, Any]) -> list[Any] | None:
    lists = (listed(record[key]) for key in _LIST_KEYS if key in record)
    return next((value for value in lists if value is not None), None)


def _read(turn: Any) -> list[Message] | Drop:
    if isinstance(turn, dict) and "human" in turn and "assistant" in turn:
        return read_pair(turn["human"], turn["assistant"])
    if isinstance(turn, dict) and "from" not in turn:
        name_key, text_key = "role", "content"
    else:
        name_key, text_key = "from", "value"
    if isinstance(turn, dict) and text_key not in turn:
        text_key = next((key for key in _TEXT_KEYS if key in turn), text_key)
    message = read_turn(turn, name_key=name_key, text_key=text_key)
    return message if isinstance(message, Drop) else [message]
