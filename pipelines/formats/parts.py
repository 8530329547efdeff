"""Content that is a list of parts: texts joined, reasoning and tool calls kept beside the text."""

from typing import Any, NamedTuple

import orjson

from schemas.conversation import Drop

_TEXT_KINDS = ("text", "input_text", "output_text")
_REASONING_KINDS = ("reasoning", "thinking")
_CALL_KINDS = ("tool_call", "tool_use")


class Parts(NamedTuple):
    """What a list of parts says. `extras` may hold `reasoning_content` and `tool_calls`."""

    text: str
    extras: dict[str, Any]


def read_parts(parts: list[Any]) -> Parts | Drop:
    """[{"type": "text", "text": "..."}, ...]; pictures, audio and files are `unsupported_content`."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[Any] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = _text(part, kind)
        if kind in _CALL_KINDS:
            call = _call(part)
            if isinstance(call, Drop):
                return call
            calls.append(call)
        elif text is None or kind not in (*_TEXT_KINDS, *_REASONING_KINDS):
            return Drop("unsupported_content", f"a content part of type {kind!r:.100}, only text is read")
        else:
            (texts if kind in _TEXT_KINDS else reasoning).append(text)
    extras = {"reasoning_content": "".join(reasoning), "tool_calls": calls}
    return Parts("".join(texts), {key: value for key, value in extras.items() if value})


def _text(part: Any, kind: Any) -> str | None:
    if not isinstance(part, dict):
        return None
    keys = ("text", "value", "thinking") if kind in _REASONING_KINDS else ("text", "value")
    return next((part[key] for key in keys if isinstance(part.get(key), str)), None)


def _call(part: dict[str, Any]) -> dict[str, Any] | Drop:
    """As OpenAI writes calls: {"type": "function", "function": {"name", "arguments"}}."""
    said: Any = part.get("value", part)
    if isinstance(said, str):
        try:
            said = orjson.loads(said)
        except orjson.JSONDecodeError:
            said = None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return Drop(
            "bad_value", f"a tool call is {part.get('value', part)!r:.200}, expected name and arguments"
        )
    function = {"name": said["name"], "arguments": said.get("arguments", said.get("input", {}))}
    named = {"id": said["id"]} if isinstance(said.get("id"), str) else {}
    return {**named, "type": "function", "function": function}
