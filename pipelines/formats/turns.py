"""What the chat formats share: names of roles, texts of turns, what else a turn may carry."""

import math
from typing import Any

import orjson

from schemas.conversation import Drop, Message, Role

ROLE_NAMES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

MAX_EXTRA_BYTES = 1024
_CALLS = ("tool_calls", "function_call")
"""Kept whole: a tool call without its arguments means nothing."""


def read_turn(turn: Any, *, name_key: str, text_key: str) -> Message | Drop:
    """One turn {name_key: role, text_key: text, ...}. A missing or null text is empty and left to the filter."""
    if not isinstance(turn, dict):
        return Drop("bad_value", f"a turn is {type(turn).__name__}, expected an object")
    name, value = turn.get(name_key), turn.get(text_key)
    role = ROLE_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        return Drop("unknown_role", f"{name_key} is {_shown(name)}")
    text = join_parts(value) if isinstance(value, list) and text_key == "content" else read_text(value)
    if isinstance(text, Drop):
        return text
    for key in _CALLS:
        if not is_plain(turn.get(key)):
            return Drop("bad_value", f"{key} is nested too deep to be kept")
    extras = read_extras(turn, without=(name_key, text_key))
    if str(name).strip().lower() == "function_call":
        extras["kind"] = "function_call"
    return Message(role, text, extras)


def read_text(value: Any) -> str | Drop:
    """A string, or nothing."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return Drop("bad_value", f"a text is {_shown(value)}, expected a string")


def read_extras(record: dict[str, Any], *, without: tuple[str, ...]) -> dict[str, Any]:
    """The other keys of a turn: small plain values, and tool calls."""
    return {
        key: value
        for key, value in record.items()
        if key not in without and (_is_small(value) or (key in _CALLS and value))
    }


def join_parts(parts: list[Any]) -> str | Drop:
    """The text of a content list [{"type": "text", "text": "..."}, ...]."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            return Drop("unsupported_content", f"a content part of type {kind!r:.100}, only text is read")
        texts.append(text)
    return "".join(texts)


def is_plain(value: Any) -> bool:
    """Whether JSON can hold it at a depth that every reader of ours takes (254)."""
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return False
    return True


def with_system(text: Any, messages: list[Message]) -> list[Message]:
    """The messages behind a record's own system text, unless they begin with one or it is empty."""
    if not isinstance(text, str) or not text.strip() or (messages and messages[0].role == "system"):
        return messages
    return [Message("system", text), *messages]


def _is_small(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_EXTRA_BYTES and len(value.encode()) <= MAX_EXTRA_BYTES
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) < 2**63


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.200}"
