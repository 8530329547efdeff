"""Blocked words: whole words, in prose."""

import re
from collections.abc import Sequence
from functools import lru_cache

from pipelines.rules.prose import UNPARTED_SCRIPTS, prose_of
from schemas.conversation import Conversation, Drop
from schemas.pipeline_config import FilterConfig

# In scripts without blanks between words a border would never be found.
_NO_BORDERS = re.compile(f"[{UNPARTED_SCRIPTS}]")


def blocked_word(conversation: Conversation, settings: FilterConfig) -> Drop | None:
    """`blocked_word`: one of `blocked_words` as a whole word in prose, in upper or lower case."""
    if not settings.blocked_words:
        return None
    pattern = _pattern(tuple(settings.blocked_words))
    for position, message in enumerate(conversation.messages):
        if settings.blocked_words_in == "answers" and message.role != "assistant":
            continue
        # The whole text first: most texts have none, and prose costs more than the search.
        if pattern.search(message.content) and (found := pattern.search(prose_of(message.content))):
            return Drop("blocked_word", f"message {position}: {found[0]!r}")
    return None


@lru_cache(maxsize=8)
def _pattern(words: Sequence[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(_word_pattern, longest_first)), re.IGNORECASE)


def _word_pattern(word: str) -> str:
    """A border wherever the word begins or ends with a letter of a script that has borders; any white space inside."""
    words = word.split()
    text = r"\s+".join(map(re.escape, words))
    first, last = words[0][0], words[-1][-1]
    before = r"(?<!\w)" if first.isalnum() and not _NO_BORDERS.match(first) else ""
    after = r"(?!\w)" if last.isalnum() and not _NO_BORDERS.match(last) else ""
    return before + text + after
