"""One question and its answer under many names: {"prompt", "completion"}, {"query", "response"}, {"question", "answer"}.

`history` holds earlier rounds as pairs, `system` a system text; both sides may be lists of messages.
"""

from typing import Any

from pipelines.formats.messages import read_messages
from pipelines.formats.turns import listed, read_history, read_text, with_system
from schemas.conversation import Drop, Message

QUESTION_KEYS = ("prompt", "query", "question")
_ANSWER_KEYS = ("completion", "response", "answer", "output")


def matches(record: dict[str, Any]) -> bool:
    """Whether there is a question under one of the names, and an answer under another."""
    return first_key(record, QUESTION_KEYS) is not None and first_key(record, _ANSWER_KEYS) is not None


def read(record: dict[str, Any]) -> list[Message] | Drop:
    """The chat, or why it can't be read."""
    asked = read_side(record[first_key(record, QUESTION_KEYS) or ""], "user")
    answered = read_side(record[first_key(record, _ANSWER_KEYS) or ""], "assistant")
    earlier = read_history(record.get("history"))
    for side in (asked, answered, earlier):
        if isinstance(side, Drop):
            return side
    assert not isinstance(asked, Drop)
    assert not isinstance(answered, Drop)
    assert not isinstance(earlier, Drop)
    return with_system(record.get("system"), [*earlier, *asked, *answered])


def first_key(record: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of the keys that the record has."""
    return next((key for key in keys if key in record), None)


def read_side(value: Any, role: Any) -> list[Message] | Drop:
    """One side: a text of that role, one {role, content} or {from, value}, or a list of {role, content}."""
    turns = [value] if isinstance(value, dict) else value if isinstance(value, list) else None
    if turns is not None:
        renamed = [_as_role_and_content(turn) for turn in turns]
        return read_messages(renamed)
    if isinstance(value, str) and _looks_like_messages(turns := listed(value)):
        return read_messages(turns)
    text = read_text(value)
    return text if isinstance(text, Drop) else [Message(role, text)]


def _as_role_and_content(turn: Any) -> Any:
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        return rest | {"role": turn["from"], "content": turn.get("value")}
    return turn


def _looks_like_messages(turns: list[Any] | None) -> bool:
    """A text that begins with a bracket is one all the same, unless it holds nothing but messages."""
    return bool(turns) and all(isinstance(turn, dict) and "role" in turn for turn in turns or [])
