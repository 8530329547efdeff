"""How long a chat may and must be, in characters, tokens and turns."""

from collections.abc import Callable

from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import FilterConfig


def too_many_turns(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`too_many_turns`: more messages than `max_turns`, the system message not counted."""
    num_turns = sum(message.role != "system" for message in conversation.messages)
    if num_turns > settings.max_turns:
        return Drop("too_many_turns", f"{num_turns} turns, more than {settings.max_turns}")
    return None


def too_few_turns(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`too_few_turns`: fewer messages than `min_turns`, the system message not counted."""
    num_turns = sum(message.role != "system" for message in conversation.messages)
    if num_turns < settings.min_turns:
        return Drop("too_few_turns", f"{num_turns} turns, fewer than {settings.min_turns}")
    return None


def answer_length(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`answer_too_short`, `answer_too_long`: one assistant turn outside of `min_answer_chars`, `max_answer_chars`."""
    if not settings.min_answer_chars and not settings.max_answer_chars:
        return None
    for position, message in enumerate(conversation.messages):
        if message.role != "assistant" or (message.extras.get("tool_calls") and not message.content.strip()):
            continue
        num_chars = len(message.content.strip())
        if num_chars < settings.min_answer_chars:
            detail = f"message {position}: {num_chars} characters, fewer than {settings.min_answer_chars}"
            return Drop("answer_too_short", detail)
        if settings.max_answer_chars and num_chars > settings.max_answer_chars:
            detail = f"message {position}: {num_chars} characters, more than {settings.max_answer_chars}"
            return Drop("answer_too_long", detail)
    return None


def token_length(
    conversation: Conversation, settings: FilterConfig, *, num_tokens: Callable[[str], int]
) -> Drop | None:
    """`too_few_tokens`, `too_many_tokens`: of all texts together, without the template's own."""
    total = sum(num_tokens(message.content) for message in conversation.messages)
    if total < settings.min_tokens:
        return Drop("too_few_tokens", f"{total} tokens, fewer than {settings.min_tokens}")
    if settings.max_tokens and total > settings.max_tokens:
        return Drop("too_many_tokens", f"{total} tokens, more than {settings.max_tokens}")
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
