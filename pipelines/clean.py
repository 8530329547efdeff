"""Stage 2, clean: HTML answers become Markdown, all text becomes clean Unicode.

Plain-text turns change in nothing but Unicode: no HTML parser ever sees them. Order and number of messages stay,
but for answers that their page says were never finished (`clean.unfinished`). Cleaning twice equals cleaning once.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from pipelines.html import Converted, convert_answer, looks_like_page
from pipelines.markdown import map_prose
from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import CleanConfig, PipelineConfig

STAGE_VERSION = 2

# C0 but for new line and tab (a lone carriage return has become a new line before), DEL, C1, byte order mark.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
_TAG_OR_REFERENCE = re.compile(r"<[a-zA-Z/!]|&(?:#\w{1,8}|[a-zA-Z]\w{1,31});")


def prepare(config: PipelineConfig) -> Callable[[Conversation], Conversation | Drop]:
    """The row step. Drops: html_too_large, html_too_deep, html_unparsable, unfinished."""
    settings = config.clean

    def step(conversation: Conversation) -> Conversation | Drop:
        return clean(conversation, settings)

    return step


def versions(config: PipelineConfig) -> dict[str, str]:
    """What else shapes the bytes: parser, converter, Unicode tables."""
    converter = config.clean.converter
    return {
        "selectolax": version("selectolax"),
        converter: version(converter),
        "markdown-it-py": version("markdown-it-py"),
        "unicode": unicodedata.unidata_version,
    }


def clean(conversation: Conversation, settings: CleanConfig) -> Conversation | Drop:
    """A cleaned copy, or why the chat is dropped. `meta["answers"]` becomes "text": what was HTML is no longer."""
    answers = conversation.meta.get("answers", "auto")
    repairs: Counter[str] = Counter()
    messages: list[Message] = []
    unfinished: list[bool] = []
    for position, message in enumerate(conversation.messages):
        text = clean_text(message.content, repairs)
        is_unfinished = False
        if message.role == "assistant" and _is_html(text, answers):
            converted = convert_answer(text, settings)
            if isinstance(converted, Drop):
                return replace(converted, detail=f"message {position}: {converted.detail}")
            repairs["html"] += 1
            text, is_unfinished = _cleaned_markdown(converted), converted.is_unfinished
        messages.append(replace(message, content=text))
        unfinished.append(is_unfinished)
    if any(unfinished) and settings.unfinished == "drop":
        end = _finished_end(messages, unfinished)
        repairs["unfinished_answers"] = sum(unfinished[end:])
        if repairs["unfinished_answers"] and not any(m.role == "assistant" for m in messages[:end]):
            return Drop("unfinished", "the only answer was cut off while being written")
        messages, unfinished = messages[:end], unfinished[:end]
    meta = _meta(conversation.meta, repairs, is_unfinished=any(unfinished))
    return replace(conversation, messages=messages, meta=meta)


def clean_text(text: str, repairs: Counter[str]) -> str:
    """Line ends as "\\n", no control characters, NFC outside fenced code. Counts what it changed in `repairs`.

    U+FFFD stays: it says that something was lost. So do blanks and characters that steer direction or joining.
    """
    if text.isascii() and text.isprintable():
        return text
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        repairs["line_ends"] += 1
    text, num_removed = _CONTROLS.subn("", text)
    if num_removed:
        repairs["control_characters"] += num_removed
    if unicodedata.is_normalized("NFC", text):
        return text
    # U+1FEF normalises to a back-tick: put first, else what is a code fence would differ the second time.
    composed = map_prose(text.replace("\u1fef", "`"), _nfc)
    if composed != text:
        repairs["nfc"] += 1
    return composed


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _is_html(text: str, answers: str) -> bool:
    if answers == "html":
        return bool(_TAG_OR_REFERENCE.search(text))
    return answers == "auto" and looks_like_page(text)


def _cleaned_markdown(converted: Converted) -> str:
    """Character references may have brought in what was cleaned away before the conversion."""
    return clean_text(converted.markdown, Counter()).strip()


def _finished_end(messages: list[Message], unfinished: list[bool]) -> int:
    """Where the chat ends without the unfinished answers at its end and the questions to them."""
    end = len(messages)
    while (last := _last_answer(messages[:end])) is not None and unfinished[last]:
        end = last
        while end > 0 and messages[end - 1].role == "user":
            end -= 1
    return end


def _last_answer(messages: list[Message]) -> int | None:
    return next((i for i in reversed(range(len(messages))) if messages[i].role == "assistant"), None)


def _meta(meta: dict[str, Any], repairs: Counter[str], *, is_unfinished: bool) -> dict[str, Any]:
    counted = Counter(meta.get("repairs", {})) + repairs
    changed: dict[str, Any] = {**meta, "answers": "text"}
    if counted:
        changed["repairs"] = dict(sorted(counted.items()))
    if is_unfinished:
        changed["unfinished"] = True
    return changed
