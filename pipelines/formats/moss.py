"""MOSS: {"meta_instruction": ..., "chat": {"turn_1": {"Human": "<|Human|>: ...<eoh>", "MOSS": ...}, ...}}.

Commands and the tools' responses stand between question and answer; "None" stands for nothing. What MOSS thinks
stays beside its answer.
"""

import re
from typing import Any

from pipelines.formats.turns import MAX_EXTRA_BYTES, with_system
from schemas.conversation import Drop, Message

_MARKS = re.compile(r"\s*<\|[A-Za-z ]{1,20}\|>:?[ \t]*(.*?)(?:<eo[a-z]>|\Z)\s*", re.DOTALL)
_TURN = re.compile(r"turn_(\d{1,6})", re.ASCII)


def matches(record: dict[str, Any]) -> bool:
    """Whether the chat is an object of numbered turns."""
    chat = record.get("chat")
    return isinstance(chat, dict) and bool(chat) and all(_TURN.fullmatch(key) for key in chat)


def read(record: dict[str, Any]) -> list[Message] | Drop:
    """The chat, its turns in the order of their numbers."""
    chat = record["chat"]
    messages: list[Message] = []
    for key in sorted(chat, key=lambda key: int(key.removeprefix("turn_"))):
        found = _read_turn(chat[key])
        if isinstance(found, Drop):
            return found
        messages += found
    return with_system(record.get("meta_instruction"), messages)


def _read_turn(turn: Any) -> list[Message] | Drop:
    if not isinstance(turn, dict):
        return Drop("bad_value", f"a turn is {type(turn).__name__}, expected an object")
    texts = {key: value for key, value in turn.items() if isinstance(value, str)}
    if "Human" not in texts or "MOSS" not in texts:
        return Drop(
            "bad_value", f"a turn has the texts {', '.join(map(repr, texts))[:200]}, expected Human and MOSS"
        )
    said = {key: _unmarked(value) for key, value in texts.items()}
    messages = [Message("user", said["Human"])]
    if calls := said.get("Commands", ""):
        messages.append(Message("assistant", calls, {"kind": "function_call"}))
        messages.append(Message("tool", said.get("Tool Responses", "")))
    thoughts = said.get("Inner Thoughts", "")
    extras = {"inner_thoughts": thoughts} if 0 < len(thoughts.encode()) <= MAX_EXTRA_BYTES else {}
    return [*messages, Message("assistant", said["MOSS"], extras)]


def _unmarked(text: str) -> str:
    marked = _MARKS.fullmatch(text)
    text = marked[1].strip() if marked else text
    return "" if text == "None" else text
