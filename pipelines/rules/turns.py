"""The order of roles: [system] (user assistant)+, with tool results after an assistant that calls tools."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import FilterConfig

# What may stand behind each role; "" is the beginning or the end of the chat.
_MAY_FOLLOW: dict[str, tuple[str, ...]] = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool", ""),
    "tool": ("tool", "assistant"),
}


def empty_drop(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`empty`: no messages, or no assistant text at all."""
    if not conversation.messages:
        return Drop("empty", "no messages")
    if not any(message.role == "assistant" and _says_something(message) for message in conversation.messages):
        return Drop("empty", f"no assistant text in {len(conversation.messages)} messages")
    return None


def in_order(conversation: Conversation, settings: FilterConfig) -> Conversation | Drop:
    """The chat with its roles in order; Drop `wrong_role_order` where that takes more than repairs, or policy forbids.

    Repairs, in this order, each counted in meta["repairs"]:
    - empty_turns_removed: user and assistant turns without text (an assistant's tool call is not empty)
    - turns_merged: neighbours of one role joined by a blank line (tool results stay apart), or
      turns_replaced: the last of them in their place
    - leading_turns_cut: assistant and tool turns before the first user turn
    - trailing_turns_cut: user and tool turns behind the last answer
    A system message anywhere but at the beginning, or a tool result that no assistant asked for, is not repaired.
    """
    problem = _problem(conversation.messages)
    if not problem:
        return conversation
    if settings.alternation == "drop":
        return Drop("wrong_role_order", problem)
    ordered = conversation
    for name, repair in _repairs(settings).items():
        messages = repair(ordered.messages)
        if num_changed := len(ordered.messages) - len(messages):
            if (setting := _FORBIDS.get(name)) and getattr(settings, setting) == "drop":
                return Drop("wrong_role_order", f"{problem}, and {setting} is drop")
            ordered = with_repair(replace(ordered, messages=messages), name, num_changed)
    if problem := _problem(ordered.messages):
        return Drop("wrong_role_order", problem)
    return ordered


def rounds_of(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The messages before the first question, and the rounds: each a question with all that follows up to the next."""
    starts = [position for position, message in enumerate(messages) if message.role == "user"]
    ends = [*starts[1:], len(messages)]
    prefix = list(messages[: starts[0]]) if starts else list(messages)
    return prefix, [
        list(messages[start:end]) for start, end in zip(starts, ends, strict=True)
    ] if starts else []


def first_round(conversation: Conversation, settings: FilterConfig) -> Conversation:
    """With `first_round_only` the chat up to the second question, what is cut counted as `later_rounds_cut`."""
    prefix, rounds = rounds_of(conversation.messages) if settings.first_round_only else ([], [])
    if len(rounds) < 2:
        return conversation
    return with_repair(
        replace(conversation, messages=prefix + rounds[0]), "later_rounds_cut", len(rounds) - 1
    )


def with_repair(conversation: Conversation, name: str, count: int) -> Conversation:
    """The chat with `count` more repairs of that name in its meta."""
    repairs = dict(conversation.meta.get("repairs", {}))
    repairs[name] = repairs.get(name, 0) + count
    return replace(conversation, meta={**conversation.meta, "repairs": dict(sorted(repairs.items()))})


def _problem(messages: list[Message]) -> str:
    """What is wrong with the order of roles, "" if nothing is."""
    before = ""
    for position, message in enumerate(messages):
        if message.role in ("user", "assistant") and not _says_something(message):
            return f"message {position} ({message.role}) is empty"
        if message.role not in _MAY_FOLLOW[before]:
            return (
                f"message {position} is {message.role} {'after ' + before if before else 'at the beginning'}"
            )
        before = message.role
    if not messages:
        return "no user turn with an answer to it"
    return "" if "" in _MAY_FOLLOW[before] else f"the chat ends with {before}"


def _says_something(message: Message) -> bool:
    return bool(message.content.strip() or message.extras.get("tool_calls"))


def _without_empty(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message.role in ("system", "tool") or _says_something(message)]


def _merged(messages: list[Message]) -> list[Message]:
    merged: list[Message] = []
    for message in messages:
        if merged and message.role == merged[-1].role != "tool":
            merged[-1] = _joined(merged[-1], message)
        else:
            merged.append(message)
    return merged


def _last_of_each(messages: list[Message]) -> list[Message]:
    return [
        message
        for message, following in zip(messages, [*messages[1:], None], strict=True)
        if following is None or message.role != following.role or message.role == "tool"
    ]


def _joined(first: Message, second: Message) -> Message:
    content = "\n\n".join(text for text in (first.content, second.content) if text.strip())
    extras: dict[str, Any] = {**second.extras, **first.extras}
    if calls := [*first.extras.get("tool_calls", ()), *second.extras.get("tool_calls", ())]:
        extras["tool_calls"] = calls
    return replace(first, content=content, extras=extras)


def _without_leading(messages: list[Message]) -> list[Message]:
    num_system = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    first = next(
        (i for i in range(num_system, len(messages)) if messages[i].role in ("user", "system")), len(messages)
    )
    return messages[:num_system] + messages[first:]


def _without_trailing(messages: list[Message]) -> list[Message]:
    end = len(messages)
    while end > 0 and messages[end - 1].role in ("user", "tool"):
        end -= 1
    return messages[:end]


_FORBIDS = {
    "turns_merged": "same_role",
    "leading_turns_cut": "leading_answers",
    "trailing_turns_cut": "trailing_questions",
}
"""Repair -> the setting that may forbid it."""


def _repairs(settings: FilterConfig) -> dict[str, Callable[[list[Message]], list[Message]]]:
    neighbours = (
        {"turns_replaced": _last_of_each} if settings.same_role == "last" else {"turns_merged": _merged}
    )
    return {
        "empty_turns_removed": _without_empty,
        **neighbours,
        "leading_turns_cut": _without_leading,
        "trailing_turns_cut": _without_trailing,
    }
