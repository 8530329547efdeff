"""OpenAI messages: {"messages": [{"role": "user", "content": "..."}, ...]}; content may be a list of text parts."""

from typing import Any

from pipelines.formats.turns import listed, read_turn, with_system
from schemas.conversation import Drop, Message


def matches(record: dict[str, Any]) -> bool:
    """Whether the record holds a list of messages."""
    return listed(record.get("messages")) is not None


def read(record: dict[str, Any]) -> list[Message] | Drop:
    """The chat, or why it can't be read."""
    return read_messages(record["messages"], system=record.get("system"))


def read_messages(turns: Any, *, system: Any = None) -> list[Message] | Drop:
    """A list of {role, content}, or a text that holds one as JSON."""
    messages: list[Message] = []
    for turn in listed(turns) or []:
        message = read_turn(turn, name_key="role", text_key="content")
        if isinstance(message, Drop):
            return message
        messages.append(message)
    return with_system(system, messages)
