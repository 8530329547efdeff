"""What the answers of a chat are made of: signs, digits, code."""

import unicodedata

from pipelines.markdown import without_code
from pipelines.rules.prose import prose_of
from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import FilterConfig

MIN_CHARS = 40
"""Prose of fewer characters has no telling shares: "42" is a fair answer."""


def too_many_symbols(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`too_many_symbols`: more than `max_symbol_share` of the answers' prose is neither letter nor digit nor blank.

    Vowel signs and accents of Indic, Thai, Arabic, Hebrew belong to their letters.
    """
    if settings.max_symbol_share >= 1:
        return None
    prose = _visible(_answers_prose(conversation))
    num_symbols = sum(not (character.isalnum() or _is_mark(character)) for character in prose)
    return _drop("too_many_symbols", "signs", num_symbols, prose, settings.max_symbol_share)


def too_many_digits(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`too_many_digits`: more than `max_digit_share` of the answers' prose are digits."""
    if settings.max_digit_share >= 1:
        return None
    prose = _visible(_answers_prose(conversation))
    return _drop("too_many_digits", "digits", sum(map(str.isdigit, prose)), prose, settings.max_digit_share)


def too_much_code(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`too_much_code`: more than `max_code_share` of the answers stands in code blocks and code spans."""
    if settings.max_code_share >= 1:
        return None
    answers = [message.content for message in conversation.messages if message.role == "assistant"]
    total = sum(len(_visible(answer)) for answer in answers)
    prose = sum(len(_visible(without_code(answer))) for answer in answers)
    if total and (share := 1 - prose / total) > settings.max_code_share:
        return Drop(
            "too_much_code", f"{share:.0%} of the answers is code, more than {settings.max_code_share:.0%}"
        )
    return None


def _answers_prose(conversation: Conversation) -> str:
    return "\n".join(
        prose_of(message.content) for message in conversation.messages if message.role == "assistant"
    )


def _visible(text: str) -> str:
    return "".join(text.split())


def _is_mark(character: str) -> bool:
    """Combining marks: no letters for Python, though every Hindi word has them."""
    return character > "\u02ff" and unicodedata.category(character)[0] == "M"


def _drop(reason: str, what: str, count: int, text: str, max_share: float) -> Drop | None:
    share = count / len(text) if len(text) >= MIN_CHARS else 0.0
    if share > max_share:
        return Drop(reason, f"{share:.0%} of the answers' prose are {what}, more than {max_share:.0%}")
    return None
