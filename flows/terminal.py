"""Chat text on a terminal: it is hostile input, and may hold escape sequences that hide or rewrite lines."""

import os
import re
import sys
from typing import TextIO

# C0 and C1 controls but line feed and tab, direction marks (CVE-2021-42574), line separators, tag characters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\U000e0000-\U000e007f]"
)
SHOWN_CHARACTERS = 160


def safe_text(text: str) -> str:
    """The same text with every character that could steer a terminal replaced; \\r\\n is a line break.

    Lone surrogates, which JSON can carry and no terminal takes, are replaced too.
    """
    text = text.replace("\r\n", "\n").encode("utf-8", "replace").decode("utf-8")
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


def shortened(text: str, num_characters: int = SHOWN_CHARACTERS) -> str:
    """One safe line: white space folded, the middle left out and counted."""
    line = " ".join(safe_text(text).split())
    if len(line) <= num_characters:
        return line
    half = num_characters // 2
    return f"{line[:half]} ...{len(line) - 2 * half:,} characters... {line[-half:]}"


def wants_color(choice: bool | None, *, stream: TextIO | None = None) -> bool:
    """What the user asked for; else colour on a terminal alone, never against NO_COLOR or TERM=dumb."""
    if choice is not None:
        return choice
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return (stream or sys.stdout).isatty()
