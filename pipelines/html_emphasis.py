"""Emphasis that a CommonMark reader sees as emphasis.

A page can emphasise anything; Markdown cannot: in `**Note:**text` the second `**` closes nothing, since a delimiter
behind punctuation may not stand before a letter (CommonMark 6.2). That is how Chinese, Japanese and Korean pages
often write. Here a run of text whose delimiters stand so is read by markdown-it-py, and changed until it reads as
it should: punctuation leaves the emphasis first; emphasis that cannot be written is left out. The text never changes.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache

import regex
from markdown_it import MarkdownIt

from pipelines.html_marks import Fragments, Marks

MAX_CHECKED_CHARS = 400_000
"""Read again for one answer: half a second. What is left over loses the emphasis that is hard to write."""
MAX_DROPPED_PAIRS = 6
"""Pairs left out one by one; then all of the run."""

_READER = MarkdownIt("commonmark", {"html": False}).enable("strikethrough")
_READ_MARKS = {"strong": "strong", "em": "em", "s": "del"}


def readable(text: str, fragments: Fragments, mark: Callable[[str], str], budget: list[int]) -> str:
    """The run `text`, whose emphasis stands as marks, as `mark` writes it, changed where it would not read so.

    `budget` holds how many characters may still be read again for this answer.
    """
    marks = fragments.marks
    marked = mark(text)
    if not _is_tricky(text, marks):
        return marked
    for number, candidate in enumerate(_candidates(text, marked, fragments, mark)):
        budget[0] -= len(candidate)
        if budget[0] < 0 or number > MAX_DROPPED_PAIRS + 1:
            break
        if _first_fault(candidate, fragments) is None:
            return candidate
    return mark(marks.any_tag.sub("", text))


def tidy(text: str, marks: Marks) -> str:
    """Blanks kept out of emphasis; emphasis around nothing and between two equal ones taken out."""
    while marks.untidy.search(text):
        for opener, closer in marks.tags.values():
            text = text.replace(closer + opener, "").replace(opener + closer, "")
        text = marks.blanks_behind_opener.sub(r"\2\1", text)
        text = marks.blanks_before_closer.sub(r"\2\1", text)
    return text


def _candidates(text: str, marked: str, fragments: Fragments, mark: Callable[[str], str]) -> Iterator[str]:
    """The run as it is, then with its punctuation outside, then without the pairs that don't read as such."""
    yield marked
    marks = fragments.marks
    text = tidy(_with_punctuation_outside(text, marks), marks)
    yield (marked := mark(text))
    while (fault := _first_fault(marked, fragments)) is not None:
        text = _without_pair(text, fault, marks)
        yield (marked := mark(text))


# ------------------------------------------------------------------------------------------------- which are hard


@lru_cache(maxsize=8)
def _tricky(marks: Marks) -> re.Pattern[str]:
    """Two delimiters side by side, or one that doesn't stand between a blank and a letter, or ASCII punctuation."""
    either, ascii_marks = marks.openers + marks.closers, re.escape("!\"#$%&'(),-./:;<=>?@[\\]^{|}")
    # Each place begins with the delimiter, though it asks for what is before it: so the search is for one of six signs.
    return re.compile(
        f"[{either}](?:(?=[{either}])"
        f"|(?<=[{marks.openers}])(?:(?<=[^\\s{ascii_marks}].)|(?<=[{ascii_marks}].)(?![^\\W_]))"
        f"|(?<=[{marks.closers}])(?:(?=[^\\s{ascii_marks}])|(?<![^\\W_].)(?=[{ascii_marks}])))"
    )


def _is_tricky(text: str, marks: Marks) -> bool:
    return marks.any_opener.search(text) is not None and _tricky(marks).search(text) is not None


@lru_cache(maxsize=8)
def _punctuation_inside(marks: Marks) -> tuple[regex.Pattern[str], regex.Pattern[str]]:
    """As CommonMark sees it: whatever is neither a blank nor punctuation is a letter, vowel signs and icons too."""
    token = f"{marks.open}\\d+[{marks.close}{marks.code_close}]"
    either = f"{marks.openers}{marks.closers}{marks.open}{marks.close}{marks.code_close}"
    letter = f"[^\\s\\p{{P}}\\p{{S}}{either}]"
    outside = f"((?:{token}|(?![{either}])[\\p{{P}}\\p{{S}}])+)"
    return (
        regex.compile(f"(?:(?<={letter})|(?<=[{marks.closers}]))([{marks.openers}]+){outside}"),
        regex.compile(f"{outside}([{marks.closers}]+)(?=[{marks.openers}]*{letter})"),
    )


def _with_punctuation_outside(text: str, marks: Marks) -> str:
    for pattern in _punctuation_inside(marks):
        text = pattern.sub(r"\2\1", text)
    return text


# ------------------------------------------------------------------------------------------------- reading again


def _first_fault(marked: str, fragments: Fragments) -> int | None:
    """How many delimiters read as they should before the first that doesn't; None where all do."""
    marks = fragments.marks
    expected = _expected(marked, fragments)
    found = _sorted_groups(_read(_markdown(marked, fragments), marks), marks)
    if expected == found:
        return None
    shorter = min(len(expected), len(found))
    place = next((i for i in range(shorter) if expected[i] != found[i]), shorter)
    return len(marks.any_tag.findall(expected[:place]))


def _markdown(marked: str, fragments: Fragments) -> str:
    marks = fragments.marks
    text = marks.tokens.sub(
        lambda m: m[1] + _stand_in(fragments, m[2]) if m[2] else _stand_in(fragments, m[3]), marked
    )
    for tag, delimiter in (("strong", "**"), ("em", "*"), ("del", "~~")):
        for character in marks.tags[tag]:
            text = text.replace(character, delimiter)
    return marks.to_markdown(text)


def _stand_in(fragments: Fragments, number: str) -> str:
    """A short text with the same first and last kind of character; links stay links."""
    text = fragments.items[int(number)].text
    if text == "[":
        return "["
    if text.startswith("]("):
        return "](x)"
    if text.startswith("`"):
        return f"`{number}`"
    first = number if not text or text[0].isalnum() else f"\\{text[0]}{number}"
    return first + (
        "" if not text or text[-1].isalnum() else text[-1] if text[-1].isspace() else f"\\{text[-1]}"
    )


def _expected(marked: str, fragments: Fragments) -> str:
    """Letters, and marks for emphasis, as `_read` should find them."""
    marks = fragments.marks

    def letters(match: re.Match[str]) -> str:
        stand_in = _stand_in(fragments, match[2] or match[3])
        return (match[1] or "") + ("" if stand_in in ("[", "](x)") else re.sub(r"[\\`]", "", stand_in))

    text = marks.tokens.sub(letters, marked)
    text = marks.characters.sub(lambda m: marks.restored[m[0]].removeprefix("\\") or "\\", text)
    return _sorted_groups("".join(text.split()), marks)


def _read(markdown: str, marks: Marks) -> str:
    pieces: list[str] = []
    for token in _READER.parseInline(markdown)[0].children or []:
        name, _, side = token.type.rpartition("_")
        if name in _READ_MARKS:
            pieces.append(marks.tags[_READ_MARKS[name]][side == "close"])
        elif token.type in ("text", "code_inline"):
            pieces.append(token.content)
    return "".join("".join(pieces).split())


def _sorted_groups(text: str, marks: Marks) -> str:
    """`***a***` may be read as either nesting."""
    return marks.tag_groups.sub(lambda match: "".join(sorted(match[0])), text)


def _without_pair(text: str, number: int, marks: Marks) -> str:
    """Without the delimiter that has `number` others before it, and without its partner."""
    places = [match.start() for match in marks.any_tag.finditer(text)]
    if not places:
        return text
    opened: list[int] = []
    for index, place in enumerate(places):
        if text[place] in marks.openers:
            opened.append(index)
            continue
        first = opened.pop() if opened else index
        if index >= number or (first >= number and not opened):
            return "".join(c for i, c in enumerate(text) if i not in (places[first], place))
    return marks.any_tag.sub("", text)
