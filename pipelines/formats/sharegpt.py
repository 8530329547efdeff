"""ShareGPT: {"conversations": [{"from": "human", "value": "..."}, ...]}, and the shapes that grew out of it.

The list may be called conversation or items, its turns may be {role, content}, or pairs {human, assistant}.
"""

from typing import Any

from pipelines.formats.turns import read_text, read_turn, with_system
from schemas.conversation import Drop, Message

_LIST_KEYS = ("conversations", "conversation", "items")


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
    lists = (record.get(key) for key in _LIST_KEYS)
    return next((value for value in lists if isinstance(value, list)), None)


def _read(turn: Any) -> list[Message] | Drop:
    if isinstance(turn, dict) and "human" in turn and "assistant" in turn:
        return _read_pair(turn)
    keys = ("from", "value") if not isinstance(turn, dict) or "from" in turn else ("role", "content")
    message = read_turn(turn, name_key=keys[0], text_key=keys[1])
    return message if isinstance(message, Drop) else [message]


def _read_pair(pair: dict[str, Any]) -> list[Message] | Drop:
    question, answer = read_text(pair["human"]), read_text(pair["assistant"])
    if isinstance(question, Drop):
        return question
    if isinstance(answer, Drop):
        return answer
    return [Message("user", question), Message("assistant", answer)]
