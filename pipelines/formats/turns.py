"""What the chat formats share: names of roles, texts of turns, what else a turn may carry."""

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import orjson

from pipelines.formats.parts import Parts, read_parts
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
    "claude": "assistant",
    "gemini": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Chats:
    """Several chats of one record (paths of a tree, instances of a task): one group, on one side of the hold-out.

    Each is its messages and None, or the reason why it is dropped. `meta` is what the record says of all of them.
    """

    chats: list[tuple[list[Message], Drop | None]]
    meta: dict[str, Any] = field(default_factory=dict)


Reading: TypeAlias = list[Message] | Chats | Drop
"""What a reader makes of a record: its chat, its chats, or why it has none."""

MAX_EXTRA_BYTES = 1024
_CALLS = ("tool_calls", "function_call")
"""Kept whole: a tool call without its arguments means nothing."""
_REASONING = ("reasoning", "reasoning_content", "thinking")
"""Kept whole where they are texts: an answer without its reasoning is another answer."""


def read_turn(turn: Any, *, name_key: str, text_key: str) -> Message | Drop:
    """One turn {name_key: role, text_key: text, ...}. A missing or null text is empty and left to the filter."""
    if not isinstance(turn, dict):
        return Drop("bad_value", f"a turn is {type(turn).__name__}, expected an object")
    name, value = turn.get(name_key), turn.get(text_key)
    role = ROLE_NAMES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        return Drop("unknown_role", f"{name_key} is {_shown(name)}")
    found = read_parts(value) if isinstance(value, list) and text_key == "content" else read_text(value)
    if isinstance(found, Drop):
        return found
    text, beside = found if isinstance(found, Parts) else (found, {})
    extras = read_extras(turn, without=(name_key, text_key)) | beside
    for key in (*_CALLS, *_REASONING):
        if not is_plain(extras.get(key)):
            return Drop("bad_value", f"{key} is nested too deep to be kept, or no Unicode")
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


def read_pair(question: Any, answer: Any) -> list[Message] | Drop:
    """One round."""
    texts = [read_text(question), read_text(answer)]
    for text in texts:
        if isinstance(text, Drop):
            return text
    return [Message("user", str(texts[0])), Message("assistant", str(texts[1]))]


def read_history(value: Any) -> list[Message] | Drop:
    """Earlier rounds, [["question", "answer"], ...]."""
    messages: list[Message] = []
    for pair in value if isinstance(value, list) else [value] if value else []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            return Drop("bad_value", f"history holds {pair!r:.200}, expected pairs of strings")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def listed(value: Any) -> list[Any] | None:
    """A list, or the list that a text holds as JSON: tables without nested columns have it so."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError:
            return None
    return value if isinstance(value, list) else None


def read_extras(record: dict[str, Any], *, without: tuple[str, ...]) -> dict[str, Any]:
    """The other keys of a turn: small plain values, tool calls and reasoning."""
    return {
        key: value
        for key, value in record.items()
        if key not in without and (_is_content(key, value) or _is_small(value))
    }


def _is_content(key: str, value: Any) -> bool:
    return bool(value) and (key in _CALLS or (key in _REASONING and isinstance(value, str)))


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
