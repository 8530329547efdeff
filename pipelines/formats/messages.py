"""OpenAI messages: {"messages": [{"role": "user", "content": "..."}, ...]}; content may be a list of text parts."""

from typing import Any

from pipelines.formats.turns import read_turn, with_system
from schemas.conversation import Drop, Message


def matches(record: dict[str, Any]) -> bool:
    """Whether the record holds a list of messages."""
    return isinstance(record.get("messages"), list)


def read(record: dict[str, Any]) -> list[Message] | Drop:
    """The chat, or why it can't be read."""
    messages: list[Message] = []
    for turn in record["messages"]:
        message = read_turn(turn, name_key="role", text_key="content")
        if isinstance(message, Drop):
            return message
        messages.append(message)
    return with_system(record.get("system"), messages)
