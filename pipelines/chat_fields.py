"""What a chat template is given of a chat: texts, reasoning, tool calls, tools, as transformers would hand them over.

Sources write the same things in several ways; a template reads one of them. What a template would leave out
without a word is found here, and the chat is dropped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pipelines.templates import ChatTemplate
from schemas.conversation import REASONING_EXTRAS, Drop, Message

Kind: TypeAlias = Literal["content", "reasoning", "input", "call"]
"""What a part of a turn is: its text, the reasoning before it, an Alpaca input, a tool call."""

INPUT_EXTRA = "alpaca_input"
"""The end of a user's text that is the input of an instruction: set by pipelines.policy where a template reads it."""


@dataclass(slots=True)
class GivenTurn:
    """One message: its texts by kind ("content" always there), its calls, and what else the template reads."""

    role: str
    texts: dict[Kind, str]
    calls: list[dict[str, Any]] = field(default_factory=list)
    beside: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class GivenChat:
    """A chat ready for the template."""

    turns: list[GivenTurn]
    tools: list[Any] | None = None

    @property
    def has_data(self) -> bool:
        """Whether there is more than texts: calls, names, tools."""
        return bool(self.tools) or any(turn.calls or turn.beside for turn in self.turns)


def given_chat(template: ChatTemplate, messages: Sequence[Message], tools: Any = None) -> GivenChat | Drop:
    """Drops: `content_beside_text` where the template would leave out tools, tool calls or reasoning."""
    turns: list[GivenTurn] = []
    for number, message in enumerate(messages):
        turn = _turn(template, message)
        if isinstance(turn, str):
            return Drop("content_beside_text", f"message {number}: {turn}")
        turns.append(turn)
    listed = _tools(tools)
    if isinstance(listed, str):
        return Drop("content_beside_text", listed)
    if listed and not template.writes_tools:
        return Drop("content_beside_text", f"the template leaves out the chat's {len(listed)} tools")
    return GivenChat(turns, listed or None)


def template_messages(template: ChatTemplate, chat: GivenChat) -> list[dict[str, Any]]:
    """The messages as the template reads them."""
    return [_as_dict(template, turn) for turn in chat.turns]


def reasoning_of(message: Message) -> str:
    """The reasoning beside a message's text, "" where there is none."""
    found = (message.extras.get(key) for key in REASONING_EXTRAS)
    return next((text for text in found if isinstance(text, str) and text.strip()), "")


def tool_names(tools: Sequence[Any]) -> list[str]:
    """The names of tools, as far as they have one."""
    named = [tool.get("function", tool) if isinstance(tool, Mapping) else {} for tool in tools]
    return [tool["name"] for tool in named if isinstance(tool, Mapping) and isinstance(tool.get("name"), str)]


# One message ------------------------------------------------------------------------------------------------


def _turn(template: ChatTemplate, message: Message) -> GivenTurn | str:
    turn = GivenTurn(message.role, {"content": message.content})
    if not message.extras:
        return turn
    if reasoning := reasoning_of(message):
        if template.reasoning_key is None:
            return "the template leaves out its reasoning (split.reasoning: drop takes it out of the data)"
        turn.texts["reasoning"] = reasoning
    calls = _calls(message)
    if isinstance(calls, str):
        return calls
    if calls and template.call_form is None:
        return "the template leaves out its tool calls, or does not end a turn behind them"
    turn.calls = [_call_for(template, call) for call in calls]
    given = message.extras.get(INPUT_EXTRA)
    if template.reads_input and isinstance(given, str):
        turn.texts["input"] = given
    beside = {key: message.extras.get(key) for key in template.reads}
    turn.beside = {key: value for key, value in beside.items() if isinstance(value, str)}
    return turn


def _as_dict(template: ChatTemplate, turn: GivenTurn) -> dict[str, Any]:
    given: dict[str, Any] = {"role": turn.role, "content": turn.texts["content"], **turn.beside}
    if turn.calls:
        given["tool_calls"] = turn.calls
        if (
            template.call_form is not None
            and template.call_form.without_content
            and not given["content"].strip()
        ):
            given["content"] = None
    if (reasoning := turn.texts.get("reasoning")) is not None:
        given[template.reasoning_key or "reasoning_content"] = reasoning
    if (text := turn.texts.get("input")) is not None:
        given["input"] = text
    return given


# Tools and calls --------------------------------------------------------------------------------------------


def _calls(message: Message) -> list[dict[str, Any]] | str:
    """Calls as {"id", "type": "function", "function": {"name", "arguments"}}, arguments an object where they are one."""
    found = message.extras.get("tool_calls") or message.extras.get("function_call") or []
    found = _parsed(found)
    calls: list[dict[str, Any]] = []
    for call in found if isinstance(found, list) else [found]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return f"a tool call is {json.dumps(call)[:100]}, expected a function with a name"
        arguments = _parsed(function.get("arguments", {}))
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        plain = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        calls.append({**named, "type": "function", "function": plain})
    return calls


def _parsed(value: Any) -> Any:
    """JSON in a text becomes what it says: written as a text again it would be escaped twice."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, (dict, list)) else value


def _call_for(template: ChatTemplate, call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if (
        template.call_form is not None
        and template.call_form.as_text
        and not isinstance(function["arguments"], str)
    ):
        written = json.dumps(function["arguments"], ensure_ascii=False)
        return {**call, "function": {**function, "arguments": written}}
    return call


def _tools(tools: Any) -> list[Any] | str:
    """The tools of a row, or what is wrong with them."""
    found = _parsed(tools)
    if not found or (isinstance(found, str) and not found.strip()):
        return []
    if isinstance(found, Mapping):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        return f"the chat's tools are {json.dumps(found)[:100]}, expected a list of objects"
    return found
