"""Repetition that betrays a broken export or a model gone astray."""

import re
from collections import defaultdict

from pipelines.markdown import without_fences
from pipelines.rules.prose import UNPARTED_SCRIPTS, prose_of
from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import FilterConfig

MIN_BROKEN_ITEMS = 3
"""Items in a row that must all be numbered 1: two one-item lists, or an example of such a list, are no fault."""

MIN_LINES = 6
MIN_WORDS = 50
NGRAM_WORDS = 8
"""Shorter answers repeat themselves by chance. Stretches of eight words, because songs, lists and recipes repeat
shorter ones; a model that has gone astray repeats whole sentences."""

# A word, or one character of the scripts that don't part words.
_WORD = re.compile(rf"[{UNPARTED_SCRIPTS}]|[^\W{UNPARTED_SCRIPTS}]+")
_NUMBERED_ONE = re.compile(r"^[ \t>]*1[.)][ \t]+\S", re.MULTILINE)
_BULLET = re.compile(r"[-*+][ \t]")


def digit_repetition(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`digit_repetition`: one digit repeated more than `max_digit_run` times in a row in prose; 0 is off."""
    if settings.max_digit_run == 0:
        return None
    max_run = settings.max_digit_run
    repeated = _repeated(r"\d", max_run)
    for position, message in enumerate(conversation.messages):
        # The whole text first: prose costs a hundred times as much as these searches.
        if not may_have_run(message.content, max_run) or not repeated.search(message.content):
            continue
        if found := repeated.search(prose_of(message.content)):
            return Drop(
                "digit_repetition",
                f"message {position}: {found[0][:60]!r}, more than {max_run} times",
            )
    return None


def character_repetition(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`character_repetition`: one sign or letter repeated more than `max_character_run` times in an answer's prose.

    Rules and leaders are no fault: lines of nothing else, and runs of . _ - = *.
    """
    if settings.max_character_run == 0:
        return None
    repeated = _repeated(r"[^\d\s._\-=*…·]", settings.max_character_run)
    for position, message in _answers(conversation):
        if not may_have_run(message, settings.max_character_run) or not repeated.search(message):
            continue
        if found := repeated.search(_without_rules(prose_of(message))):
            return Drop(
                "character_repetition",
                f"message {position}: {found[0][:60]!r}, more than {settings.max_character_run} times",
            )
    return None


def line_repetition(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`line_repetition`: more than `max_repeated_line_share` of an answer's lines of prose stood before in it."""
    if settings.max_repeated_line_share >= 1:
        return None
    for position, message in _answers(conversation):
        lines = prose_of(message).split("\n") if message.count("\n") >= MIN_LINES else []
        share = 1 - len(set(lines)) / len(lines) if len(lines) >= MIN_LINES else 0.0
        if share > settings.max_repeated_line_share:
            return Drop("line_repetition", f"message {position}: {share:.0%} of its lines stood before in it")
    return None


def ngram_repetition(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`ngram_repetition`: more than `max_repeated_ngram_share` of an answer's words lie in repeated stretches."""
    if settings.max_repeated_ngram_share >= 1:
        return None
    for position, message in _answers(conversation):
        share = repeated_ngram_share(prose_of(message))
        if share > settings.max_repeated_ngram_share:
            return Drop(
                "ngram_repetition",
                f"message {position}: {share:.0%} of its words lie in stretches of {NGRAM_WORDS} that stood before in it",
            )
    return None


def repeated_ngram_share(text: str) -> float:
    """Share of words inside of n-grams that stood before in the text; 0.0 for a text of fewer than MIN_WORDS."""
    words = _WORD.findall(text.casefold())
    if len(words) < MIN_WORDS:
        return 0.0
    num_ngrams = len(words) - NGRAM_WORDS + 1
    if len(set(zip(*(words[shift:] for shift in range(NGRAM_WORDS)), strict=False))) == num_ngrams:
        return 0.0
    seen: set[tuple[str, ...]] = set()
    num_repeated, counted_to = 0, 0
    for start in range(num_ngrams):
        ngram = tuple(words[start : start + NGRAM_WORDS])
        if ngram in seen:
            num_repeated += start + NGRAM_WORDS - max(start, counted_to)
            counted_to = start + NGRAM_WORDS
        seen.add(ngram)
    return num_repeated / len(words)


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


def may_have_run(text: str, max_run: int) -> bool:
    """False only where no character stands more than `max_run` times in a row: every quarter of that is looked at, a
    tenth of the time of the pattern with its back reference."""
    if max_run < 4:
        return True
    seen = text[:: max_run // 4]
    return any(a == b == c == d for a, b, c, d in zip(seen, seen[1:], seen[2:], seen[3:], strict=False))


def _repeated(character: str, max_run: int) -> re.Pattern[str]:
    return re.compile(rf"({character})\1{{{max_run}}}")


def _answers(conversation: Conversation) -> list[tuple[int, str]]:
    return [(n, m.content) for n, m in enumerate(conversation.messages) if m.role == "assistant"]


def _without_rules(prose: str) -> str:
    return "\n".join(line for line in prose.split("\n") if any(map(str.isalnum, line)))


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
