"""Control strings taken out of what a template writes of tools, calls and quoted texts, and put back.

While the skeleton of a chat is looked at, each of them is replaced by private characters of the same length: every
control token that is then found is one that the template wrote.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pipelines.chat_fields import GivenChat, GivenTurn
from pipelines.templates import ChatTemplate

_PLANES = (0xF0000, 0x100000)


def disarmed(
    template: ChatTemplate, chat: GivenChat, as_it_is: frozenset[int]
) -> tuple[GivenChat, Callable[[str], str]]:
    """The chat without control strings in its data, and the way back."""
    if not chat.has_data and not as_it_is:
        return chat, str
    texts = [chat.turns[number].texts["content"] for number in sorted(as_it_is)]
    data = [chat.tools, texts, *([turn.calls, turn.beside] for turn in chat.turns)]
    shown = json.dumps(data, ensure_ascii=False)
    # In JSON a quote or a back-slash is escaped: such control strings are looked for in the texts themselves.
    found = sorted({text for value in _strings(data) for text in template.control_pattern.findall(value)})
    if not found:
        return chat, str
    plane = next((p for p in _PLANES if not re.search(f"[{chr(p)}-{chr(p + len(found))}]", shown)), None)
    if plane is None:
        raise ValueError(
            "private characters of planes 15 and 16 stand beside a control string in tools or calls"
        )
    aliases = {token: chr(plane + number) * len(token) for number, token in enumerate(found)}

    def disarm(text: str) -> str:
        return template.control_pattern.sub(lambda match: aliases[match.group()], text)

    def restore(text: str) -> str:
        for token, alias in aliases.items():
            text = text.replace(alias, token)
        return text

    turns = [
        GivenTurn(
            turn.role,
            {**turn.texts, "content": disarm(turn.texts["content"])} if number in as_it_is else turn.texts,
            _mapped(turn.calls, disarm),
            _mapped(turn.beside, disarm),
        )
        for number, turn in enumerate(chat.turns)
    ]
    return GivenChat(turns, _mapped(chat.tools, disarm)), restore


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    return [text for part in value for text in _strings(part)] if isinstance(value, (list, tuple)) else []


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _mapped(part, change) for key, part in value.items()}
    return [_mapped(part, change) for part in value] if isinstance(value, list) else value
