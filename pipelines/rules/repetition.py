"""Repetition that betrays a broken export or a model gone astray."""

import re
from collections import defaultdict

from pipelines.markdown import without_fences
from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import FilterConfig

MIN_BROKEN_ITEMS = 3
"""Items in a row that must all be numbered 1: two one-item lists, or an example of such a list, are no fault."""

_NUMBERED_ONE = re.compile(r"^[ \t>]*1[.)][ \t]+\S", re.MULTILINE)
_BULLET = re.compile(r"[-*+][ \t]")


def digit_repetition(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`digit_repetition`: one digit repeated more than `max_digit_run` times in a row; 0 is off."""
    if settings.max_digit_run == 0:
        return None
    repeated = re.compile(rf"(\d)\1{{{settings.max_digit_run}}}")
    for position, message in enumerate(conversation.messages):
        if found := repeated.search(message.content):
            return Drop(
                "digit_repetition",
                f"message {position}: {found[0]!r}, more than {settings.max_digit_run} times",
            )
    return None


def broken_numbering(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`broken_numbering`: an answer with a list whose items are numbered 1. 1. 1.: an export lost the numbers."""
    if settings.broken_numbering == "keep":
        return None
    for position, message in enumerate(conversation.messages):
        if message.role == "assistant" and has_broken_numbering(message.content):
            return Drop(
                "broken_numbering", f"message {position}: {MIN_BROKEN_ITEMS} items in a row are numbered 1"
            )
    return None


def has_broken_numbering(text: str) -> bool:
    """Three items in a row numbered 1 at one indentation, with nothing between them but what may belong to an item:
    deeper lines, bullets, code and blank lines."""
    if len(_NUMBERED_ONE.findall(text)) < MIN_BROKEN_ITEMS:
        return False
    num_ones: dict[int, int] = defaultdict(int)
    for line in without_fences(text).split("\n"):
        stripped = line.lstrip(" \t>")
        if not stripped:
            continue
        indent = len(line[: len(line) - len(stripped)].expandtabs(4))
        num_ones = defaultdict(int, {other: ones for other, ones in num_ones.items() if other <= indent})
        if _BULLET.match(stripped):
            continue
        num_ones[indent] = num_ones[indent] + 1 if _NUMBERED_ONE.match(stripped) else 0
        if num_ones[indent] >= MIN_BROKEN_ITEMS:
            return True
    return False
