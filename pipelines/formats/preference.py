"""Preference sets: the chosen answer is the chat, the rejected one is left out; KTO: what is labelled true.

Chosen may be a text, a turn, all turns of the chat, or a transcript; the question stands in `prompt` or the like,
in `conversations` or `messages`, or is part of chosen.
"""

from typing import Any

from pipelines.formats import messages, prompt, sharegpt
from pipelines.formats.transcript import read_transcript
from pipelines.formats.turns import Reading, listed, with_system
from schemas.conversation import Drop, Message

_INSTRUCTION = "instruction"
_TRUE, _FALSE = (True, 1, "true", "True"), (False, 0, "false", "False")


def matches_pair(record: dict[str, Any]) -> bool:
    """Whether there is a chosen side and one that was rejected."""
    return "chosen" in record and ("rejected" in record or "conversations" in record)


def read_pair(record: dict[str, Any]) -> list[Message] | Drop:
    """The chat that ends with the chosen answer."""
    asked, chosen = _asked(record), record["chosen"]
    if isinstance(asked, Drop):
        return asked
    if isinstance(chosen, str) and (whole := read_transcript(chosen)):
        return with_system(record.get("system"), whole)
    answered = prompt.read_side(chosen, "assistant")
    if isinstance(answered, Drop):
        return answered
    # Some sets repeat the question in the chosen side.
    turns = [(turn.role, turn.content) for turn in asked]
    repeats = bool(turns) and [(turn.role, turn.content) for turn in answered[: len(turns)]] == turns
    return with_system(record.get("system"), answered if repeats else [*asked, *answered])


def matches_label(record: dict[str, Any]) -> bool:
    """Whether a chat is labelled good or bad."""
    return isinstance(record.get("label"), bool) and _labelled(record) is not None


def read_label(record: dict[str, Any]) -> Reading:
    """The chat, if it is labelled true."""
    label = record.get("label")
    if label in _FALSE:
        return Drop("labelled_false", "the set marks this answer as a bad one")
    if label not in _TRUE:
        return Drop("bad_value", f"label is {label!r:.100}, expected true or false")
    reader = _labelled(record)
    return reader.read(record) if reader else Drop("no_messages", "a label without a chat")


def _labelled(record: dict[str, Any]) -> Any:
    readers = (messages, sharegpt, prompt)
    return next((reader for reader in readers if reader.matches(record)), None)


def _asked(record: dict[str, Any]) -> list[Message] | Drop:
    for reader in (sharegpt, messages):
        if reader.matches(record):
            return reader.read({key: value for key, value in record.items() if key != "system"})
    key = prompt.first_key(record, (*prompt.QUESTION_KEYS, _INSTRUCTION))
    if key is None:
        return []
    value = record[key]
    if isinstance(value, str) and (transcript := read_transcript(value)):
        return transcript
    if key == _INSTRUCTION and isinstance(record.get("input"), str) and record["input"].strip():
        value = f"{value}\n\n{record['input']}"
    return prompt.read_side(listed(value) if isinstance(value, list) else value, "user")
