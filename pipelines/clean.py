"""Stage 2, clean: HTML answers become Markdown, all text becomes clean Unicode.

Plain-text turns change in nothing but Unicode, unless the settings ask for repairs: no HTML parser ever sees them, and
code stays as it is. Reasoning beside an answer is repaired like text; of tool calls only what redaction finds changes.
Order and number of messages stay, but for answers that their page says were never finished
(`clean.unfinished`). Cleaning twice equals cleaning once.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from pipelines.chinese import simplifier
from pipelines.html import convert_answer, looks_like_page
from pipelines.redact import num_keys_in_code, redact
from pipelines.text_repair import MAX_PASSES, clean_unicode, mojibake_fixer, without_artefacts
from schemas.conversation import CONTENT_EXTRAS, REASONING_EXTRAS, Conversation, Drop, Message
from schemas.pipeline_config import CleanConfig, PipelineConfig

STAGE_VERSION = 4

_TAG_OR_REFERENCE = re.compile(r"<[a-zA-Z/!]|&(?:#\w{1,8}|[a-zA-Z]\w{1,31});")
_INVISIBLE_START = "\ufeff\u200b\u2060\x00"


def prepare(config: PipelineConfig) -> Callable[[Conversation], Conversation | Drop]:
    """The row step. Drops: html_too_large, html_too_deep, html_unparsable, unfinished. Raises ConfigError."""
    settings, repairers = config.clean, repairers_of(config.clean)

    def step(conversation: Conversation) -> Conversation | Drop:
        return clean(conversation, settings, repairers)

    return step


def versions(config: PipelineConfig) -> dict[str, str]:
    """What else shapes the bytes: parser, converter, Unicode tables, repairs. Raises ConfigError."""
    repairers_of(config.clean)
    used = ["selectolax", config.clean.converter, "markdown-it-py"]
    used += ["ftfy"] if config.clean.ftfy else []
    used += ["opencc"] if config.clean.chinese == "simplified" else []
    return {name: version(name) for name in used} | {"unicode": unicodedata.unidata_version}


@dataclass(frozen=True, slots=True)
class Repairers:
    """Optional repairs that need libraries, loaded once for a process."""

    fix_mojibake: Callable[[str, Counter[str]], str] | None
    simplify: Callable[[Sequence[str], Counter[str]], list[str]] | None


def repairers_of(settings: CleanConfig) -> Repairers:
    """Raises ConfigError where a library is missing."""
    return Repairers(
        mojibake_fixer() if settings.ftfy else None,
        simplifier() if settings.chinese == "simplified" else None,
    )


def clean(
    conversation: Conversation, settings: CleanConfig, repairers: Repairers | None = None
) -> Conversation | Drop:
    """A cleaned copy, or why the chat is dropped. `meta["answers"]` becomes "text": what was HTML is no longer."""
    repairers = repairers or repairers_of(settings)
    answers = conversation.meta.get("answers", "auto")
    repairs: Counter[str] = Counter()
    messages: list[Message] = []
    unfinished: list[bool] = []
    html_bytes_left = settings.max_chat_bytes
    for position, message in enumerate(conversation.messages):
        is_unfinished = False
        if message.role == "assistant" and _is_html(message.content, answers):
            html_bytes_left -= len(message.content.encode("utf-8", "surrogatepass"))
            converted = _converted(message.content, settings, repairers, html_bytes_left, repairs)
            if isinstance(converted, Drop):
                return replace(converted, detail=f"message {position}: {converted.detail}")
            text, is_unfinished = converted
        else:
            text = _repaired(message.content, settings, repairers, repairs)
        extras = _repaired_reasoning(message.extras, settings, repairers, repairs)
        messages.append(replace(message, content=text, extras=extras))
        unfinished.append(is_unfinished)
    if any(unfinished) and settings.unfinished == "drop":
        end = _finished_end(messages, unfinished)
        repairs["unfinished_answers"] = sum(unfinished[end:])
        if repairs["unfinished_answers"] and not any(m.role == "assistant" for m in messages[:end]):
            return Drop("unfinished", "the only answer was cut off while being written")
        messages, unfinished = messages[:end], unfinished[:end]
    messages = _chat_repaired(messages, settings, repairers, repairs)
    meta = _meta(conversation.meta, repairs, is_unfinished=any(unfinished))
    return replace(conversation, messages=messages, meta=_with_kept_keys(meta, messages))


def _converted(
    html: str, settings: CleanConfig, repairers: Repairers, html_bytes_left: int, repairs: Counter[str]
) -> tuple[str, bool] | Drop:
    """Markdown of an HTML answer, and whether its page says that it was cut off."""
    if html_bytes_left < 0:
        return Drop("html_too_large", f"more than {settings.max_chat_bytes} bytes in the answers of one chat")
    html = html.lstrip(_INVISIBLE_START)
    if "\r" in html:
        html = html.replace("\r\n", "\n").replace("\r", "\n")
        repairs["line_ends"] += 1
    converted = convert_answer(html, settings)
    if isinstance(converted, Drop):
        return converted
    repairs["html"] += 1
    return _repaired(converted.markdown, settings, repairers, repairs).strip(), converted.is_unfinished


def _repaired(text: str, settings: CleanConfig, repairers: Repairers, repairs: Counter[str]) -> str:
    """Until nothing changes any more: what one repair takes out can show another what was hidden in code."""
    for _ in range(MAX_PASSES):
        before = text
        if repairers.fix_mojibake is not None:  # first: it reads C1 controls, which go next
            text = repairers.fix_mojibake(text, repairs)
        text = clean_unicode(text, repairs)
        text = without_artefacts(text, repairs) if settings.unescape else text
        if text == before:
            break
    return text


def _repaired_reasoning(
    extras: dict[str, Any], settings: CleanConfig, repairers: Repairers, repairs: Counter[str]
) -> dict[str, Any]:
    given = {key: extras[key] for key in REASONING_EXTRAS if isinstance(extras.get(key), str)}
    if not given:
        return extras
    return extras | {key: _repaired(text, settings, repairers, repairs) for key, text in given.items()}


def _chat_repaired(
    messages: list[Message], settings: CleanConfig, repairers: Repairers, repairs: Counter[str]
) -> list[Message]:
    """Repairs that look at all messages of a chat."""
    if repairers.simplify is not None:
        texts = repairers.simplify(_texts(messages, REASONING_EXTRAS), repairs)
        messages = _with_texts(messages, REASONING_EXTRAS, texts)
    if settings.redact:
        texts = _texts(messages, CONTENT_EXTRAS)
        texts = redact(texts, settings.redact, in_code=settings.redact_code, repairs=repairs)
        messages = _with_texts(messages, CONTENT_EXTRAS, texts)
    return messages


def _with_kept_keys(meta: dict[str, Any], messages: list[Message]) -> dict[str, Any]:
    """Keys in code are told of whatever the settings are: not added up, they are there after a second cleaning too."""
    if not (num_keys := num_keys_in_code(_texts(messages, CONTENT_EXTRAS))):
        return meta
    return {**meta, "repairs": dict(sorted({**meta.get("repairs", {}), "api_keys_kept": num_keys}.items()))}


def _texts(messages: list[Message], extras: Sequence[str]) -> list[str]:
    """What is said in a chat: of each message its text, then all texts in these extras."""
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    for message in messages:
        _changed_message(message, extras, keep)
    return found


def _with_texts(messages: list[Message], extras: Sequence[str], texts: Sequence[str]) -> list[Message]:
    left = iter(texts)
    return [_changed_message(message, extras, lambda _: next(left)) for message in messages]


def _changed_message(message: Message, extras: Sequence[str], change: Callable[[str], str]) -> Message:
    content = change(message.content)
    inside = {key: message.extras[key] for key in extras if key in message.extras}
    if not inside:
        return replace(message, content=content)
    return replace(message, content=content, extras=message.extras | _changed_values(inside, change))


def _changed_values(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy with its texts changed, keys left alone. By a stack: records may nest as deep as Python can recurse."""
    copied: dict[str, Any] = dict(values)
    stack: list[tuple[Any, Any]] = [(copied, key) for key in reversed(copied)]
    while stack:
        holder, key = stack.pop()
        value = holder[key]
        if isinstance(value, str):
            holder[key] = change(value)
        elif isinstance(value, dict):
            holder[key] = dict(value)
            stack += [(holder[key], inner) for inner in reversed(value)]
        elif isinstance(value, list):
            holder[key] = list(value)
            stack += [(holder[key], place) for place in reversed(range(len(value)))]
    return copied


def _is_html(text: str, answers: str) -> bool:
    if answers == "html":
        return bool(_TAG_OR_REFERENCE.search(text))
    return answers == "auto" and looks_like_page(text.lstrip(_INVISIBLE_START))


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
