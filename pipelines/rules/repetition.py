"""Repetition that betrays a broken export or a model gone astray."""

import re
from collections import defaultdict

from pipelines.markdown import map_prose
from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import FilterConfig

MIN_BROKEN_ITEMS = 3
"""Items in a row that must all be numbered 1: two one-item lists, or an example of such a list, are no fault."""

_LINE = re.compile(r"^([ \t>]*)(?:(\d{1,9})[.)][ \t]+(?=\S))?(.*)$")


def digit_repetition(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`digit_repetition`: one digit repeated more than `max_digit_run` times in a row; 0 is off."""
    if settings.max_digit_run == 0:
        return None
    repeated = re.compile(rf"(\d)\1{{{settings.max_digit_run}}}")
    for position, message in enumerate(conversation.messages):
        if found := repeated.search(message.content):
            return Drop("digit_repetition", f"message {position}: {found[0]!r}, more than {settings.max_digit_run} times")
    return None


def broken_numbering(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`broken_numbering`: an answer with a list whose items are numbered 1. 1. 1.: an export lost the numbers."""
    if settings.broken_numbering == "keep":
        return None
    for position, message in enumerate(conversation.messages):
        if message.role == "assistant" and has_broken_numbering(message.content):
            return Drop("broken_numbering", f"message {position}: {MIN_BROKEN_ITEMS} items in a row are numbered 1")
    return None


def has_broken_numbering(text: str) -> bool:
    """Three items in a row numbered 1, of one list: at one indentation, nothing between them but what belongs to
    an item (deeper lines, bullets, blank lines). Code is not looked at."""
    if text.count("1.") + text.count("1)") < MIN_BROKEN_ITEMS:
        return False
    ones: dict[int, int] = defaultdict(int)
    for line in map_prose(text, lambda prose: prose).split("\n"):
        match = _LINE.match(line)
        indent = len(match[1].expandtabs(4)) if match else 0
        if match is None or not match[3].strip():
            continue
        for deeper in [other for other in ones if other > indent]:
            del ones[deeper]
        ones[indent] = ones[indent] + 1 if match[2] == "1" else 0
        if ones[indent] >= MIN_BROKEN_ITEMS:
            return True
    return False
