"""Alpaca: {"instruction": ..., "input": ..., "output": ...}, with `response` for output, `history` and `system`."""

import re
from typing import Any

from pipelines.formats.turns import read_text, with_system
from schemas.conversation import Drop, Message

# "<noinput>", "No input.", "(no input)", "No input required": written by the model that made the instructions.
_NO_INPUT = re.compile(r"\W*no\s*input(?:\s+(?:required|needed|necessary|provided|given))?\W*", re.IGNORECASE)


def matches(record: dict[str, Any]) -> bool:
    """Whether there is something to answer and an answer."""
    return ("instruction" in record or "input" in record) and ("output" in record or "response" in record)


def read(record: dict[str, Any]) -> list[Message] | Drop:
    """The chat, or why it can't be read. The user's text is the instruction, a blank line, and the input if any."""
    answer = record["output"] if record.get("output") is not None else record.get("response")
    texts = [read_text(value) for value in (record.get("instruction"), record.get("input"), answer)]
    rounds = _history(record.get("history"))
    if isinstance(rounds, Drop):
        return rounds
    for text in texts:
        if isinstance(text, Drop):
            return text
    instruction, given, answer = map(str, texts)
    messages = []
    for asked, answered in [*rounds, (_question(instruction, given), answer)]:
        messages += [Message("user", asked), Message("assistant", answered)]
    return with_system(record.get("system"), messages)


def _question(instruction: str, given: str) -> str:
    if not given.strip() or _NO_INPUT.fullmatch(given):
        return instruction
    return f"{instruction}\n\n{given}" if instruction else given


def _history(value: Any) -> list[tuple[str, str]] | Drop:
    if not value:
        return []
    pairs = value if isinstance(value, list) else [value]
    rounds = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            return Drop("bad_value", f"history holds {pair!r:.200}, expected pairs of strings")
        rounds.append((pair[0], pair[1]))
    return rounds
