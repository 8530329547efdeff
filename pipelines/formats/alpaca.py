"""Alpaca: {"instruction": ..., "input": ..., "output": ...}, with `response` for output, `history` and `system`.

Also Firefly ({"kind", "input", "target"}), BELLE's multi-turn set (an instruction that is a transcript), and seed
tasks ({"instruction", "instances": [{"input", "output"}, ...]}), which are a chat an instance.
"""

import re
from typing import Any

from pipelines.formats.transcript import read_transcript
from pipelines.formats.turns import Chats, Reading, read_history, read_text, with_system
from schemas.conversation import Drop, Message

# "<noinput>", "No input.", "(no input)", "No input required": written by the model that made the instructions.
_NO_INPUT = re.compile(r"\W*no\s*input(?:\s+(?:required|needed|necessary|provided|given))?\W*", re.IGNORECASE)
_ANSWER_KEYS = ("output", "response", "target")


def matches(record: dict[str, Any]) -> bool:
    """Whether there is something to answer and an answer."""
    if "instruction" in record and isinstance(record.get("instances"), list):
        return True
    return ("instruction" in record or "input" in record) and any(key in record for key in _ANSWER_KEYS)


def read(record: dict[str, Any]) -> Reading:
    """The chat, or why it can't be read. The user's text is the instruction, a blank line, and the input if any."""
    instances = record.get("instances")
    if isinstance(instances, list) and not any(key in record for key in _ANSWER_KEYS):
        return _read_instances(record, instances)
    return _read_one(record)


def _read_instances(record: dict[str, Any], instances: list[Any]) -> Reading:
    chats: list[tuple[list[Message], Drop | None]] = []
    for instance in instances:
        chat: list[Message] | Drop = Drop("bad_value", f"an instance is {type(instance).__name__}")
        if isinstance(instance, dict):
            chat = _read_one({**instance, "instruction": record["instruction"]})
        chats.append(([], chat) if isinstance(chat, Drop) else (chat, None))
    return Chats(chats) if chats else Drop("no_messages", "a task without instances")


def _read_one(record: dict[str, Any]) -> list[Message] | Drop:
    answer = next((record[key] for key in _ANSWER_KEYS if record.get(key) is not None), None)
    texts = [read_text(value) for value in (record.get("instruction"), record.get("input"), answer)]
    earlier = read_history(record.get("history"))
    if isinstance(earlier, Drop):
        return earlier
    for text in texts:
        if isinstance(text, Drop):
            return text
    instruction, given, answer = map(str, texts)
    asked = _asked(instruction, given)
    return with_system(record.get("system"), [*earlier, *asked, Message("assistant", answer)])


def _asked(instruction: str, given: str) -> list[Message]:
    turns = None if given.strip() else read_transcript(instruction)
    if turns and turns[-1].role == "user":
        return turns
    return [Message("user", _question(instruction, given))]


def _question(instruction: str, given: str) -> str:
    if not given.strip() or _NO_INPUT.fullmatch(given):
        return instruction
    return f"{instruction}\n\n{given}" if instruction else given
