"""Plain text and papers: {"text": "..."}, with `title` where there is one -> rounds in the text's own words.

Each round is a passage: what it begins with (title, heading, first line or sentence) is the user's turn, what
follows is the answer. Nothing is invented and nothing left out but the white space between the two; a chat is cut
into rounds so that long papers can be split. A text that is a transcript ("### Human: ...") is read as one.
"""

import re
from typing import Any

from pipelines.formats.transcript import read_transcript
from pipelines.formats.turns import read_text
from schemas.conversation import Drop, Message
from schemas.source_config import SourceConfig

_TEXT_KEYS = ("text", "content", "article", "document", "body", "markdown")
_TITLE_KEYS = ("title", "heading")
_FENCE = re.compile(r"[ ]{0,3}(?:```|~~~)")
_HEADING = re.compile(
    r"#{1,6}[ \t]+\S|\\(?:part|chapter|(?:sub){0,2}section|paragraph|title|begin\{abstract\})\b"
)
_SENTENCE_END = re.compile(r"[.!?…]['\"”’)]*\s+|[。！？][」』”]?\s*|\n+")
MAX_OPENING_CHARS = 300
"""A longer first line is no title: then its first sentence, or its first words, are the user's turn."""


def matches(record: dict[str, Any]) -> bool:
    """Whether a text stands alone."""
    return _text_key(record) is not None


def read(record: dict[str, Any], source: SourceConfig) -> list[Message] | Drop:
    """The text as a chat, or as the chat that it is a transcript of."""
    found = title_and_text(record)
    if isinstance(found, Drop):
        return found
    title, text = found
    return read_transcript(text) or _chat(text.strip(), title, source.text_chars)


def title_and_text(record: dict[str, Any]) -> tuple[str, str] | Drop:
    """Of a record; the title is "" where there is none."""
    key = _text_key(record)
    text = (
        read_text(record.get(key)) if key else Drop("bad_value", f"none of {', '.join(_TEXT_KEYS)} is a text")
    )
    if isinstance(text, Drop):
        return text
    return next((record[k].strip() for k in _TITLE_KEYS if isinstance(record.get(k), str)), ""), text


def _text_key(record: dict[str, Any]) -> str | None:
    return next((key for key in _TEXT_KEYS if isinstance(record.get(key), str)), None)


def _chat(text: str, title: str, max_chars: int) -> list[Message] | Drop:
    messages: list[Message] = []
    for number, passage in enumerate(_passages(text, max_chars)):
        if number == 0 and title and not passage.startswith(title):
            messages += [Message("user", title), Message("assistant", passage)]
            continue
        opening, rest = _opening(passage, min(MAX_OPENING_CHARS, max_chars // 2))
        if rest:
            messages += [Message("user", opening), Message("assistant", rest)]
        elif messages:  # a passage of one line belongs to the answer before it
            messages[-1] = Message("assistant", f"{messages[-1].content}\n\n{opening}")
        else:
            return Drop(
                "text_too_short", f"{len(text)} characters without a place to cut question from answer"
            )
    return messages


def _passages(text: str, max_chars: int) -> list[str]:
    """Runs of blocks of about `max_chars`: a heading begins a new one once half of it is full."""
    passages: list[list[str]] = []
    num_chars = 0
    for block in _blocks(text, max_chars):
        is_full = num_chars + len(block) > max_chars or (num_chars * 2 > max_chars and _HEADING.match(block))
        if not passages or is_full:
            passages.append([])
            num_chars = 0
        passages[-1].append(block)
        num_chars += len(block)
    # Blank lines go, the first line keeps its indentation.
    joined = ("".join(blocks).strip("\r\n").rstrip() for blocks in passages)
    return [passage for passage in joined if passage]


def _blocks(text: str, max_chars: int) -> list[str]:
    """Paragraphs with the blank lines behind them; fenced code is one block; what is too long is cut."""
    blocks: list[str] = []
    lines: list[str] = []
    in_code = False
    for line in text.splitlines(keepends=True):
        begins = not in_code and (_HEADING.match(line) or (lines and not lines[-1].strip() and line.strip()))
        if begins and lines:
            blocks.append("".join(lines))
            lines = []
        lines.append(line)
        in_code ^= _FENCE.match(line) is not None
    blocks.append("".join(lines))
    return [piece for block in blocks for piece in _cut(block, max_chars)]


def _cut(block: str, max_chars: int) -> list[str]:
    """At the last line or sentence that ends within the limit, else at the limit."""
    pieces = []
    while len(block) > 2 * max_chars:
        head = block[:max_chars]
        end = max((match.end() for match in _SENTENCE_END.finditer(head)), default=0)
        end = end if end > max_chars // 2 else max_chars
        pieces.append(block[:end])
        block = block[end:]
    return [*pieces, block]


def _opening(passage: str, max_chars: int) -> tuple[str, str]:
    """What a passage begins with, of at most `max_chars`, and the rest: empty where it is too short to be cut."""
    line, newline, rest = passage.partition("\n")
    if newline and len(line.strip()) <= max_chars and rest.strip():
        return line.rstrip(), rest.strip("\r\n").rstrip()
    match = _SENTENCE_END.search(passage, 0, max_chars)
    if match and passage[match.end() :].strip():
        return passage[: match.end()].rstrip(), passage[match.end() :].strip()
    if len(passage) <= max_chars:
        return passage, ""
    end = len(passage[:max_chars].rpartition(" ")[0].rstrip()) or max_chars
    return passage[:end], passage[end:].strip()
