"""How long a chat may and must be, in characters and turns."""

from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import FilterConfig


def too_many_turns(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`too_many_turns`: more messages than `max_turns`, the system message not counted."""
    num_turns = sum(message.role != "system" for message in conversation.messages)
    if num_turns > settings.max_turns:
        return Drop("too_many_turns", f"{num_turns} turns, more than {settings.max_turns}")
    return None


def too_short(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`too_short`: the assistant turns together have fewer characters than `min_chars`."""
    num_chars = sum(len(message.content) for message in conversation.messages if message.role == "assistant")
    if num_chars < settings.min_chars:
        return Drop("too_short", f"{num_chars} characters of assistant text, fewer than {settings.min_chars}")
    return None


def too_long(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`too_long`: all messages together have more characters than `max_chars`."""
    num_chars = sum(len(message.content) for message in conversation.messages)
    if num_chars > settings.max_chars:
        return Drop("too_long", f"{num_chars} characters, more than {settings.max_chars}")
    return None
