"""The prose of a turn: what language and style rules may look at. Code, formulas, URLs, tags and tables are out."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

from pipelines.markdown import CODE_SIGN, URL, ends_as_code, without_code

UNPARTED_SCRIPTS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Ranges of Thai, Lao, Burmese, Khmer, kana and Han, which put no blanks between words; for a class of a regex."""

# Everything here is bounded: an unclosed opener must not search to the end of a long turn.
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,500}>")
_FORMULA = re.compile(r"\$\$.{1,2000}?\$\$|\$[^$\n]{1,80}\$|\\\(.{1,500}?\\\)|\\\[.{1,2000}?\\\]", re.DOTALL)
_NOT_ASCII_LETTERS = bytes(code for code in range(256) if not (code < 128 and chr(code).isalpha()))
_NOT_ASCII = re.compile("[^\x00-\x7f]+")
# Two steps, as most lines of prose have none of these signs and searching for a whole pattern takes 10 us a line.
_CODE = re.compile(r"^\s*[{}]+[;,]?\s*$|=>|[=!]==?[^=]|\w\(\)|->|</")
_CODE_START = re.compile(
    r"\s*(?://|#include|import |from \S+ import |@\w+$|(?:return|print|console\.log)\b[ (]"
    r"|(?:async )?(?:(?:def|class) \w+[(:]|for [\w, ()]+ in .*:\s*$|(?:if|elif|while|with|except)\b.*[()=<>_\[].*:\s*$"
    r"|(?:else|try|finally|except):\s*$)"
    r"|[A-Za-z_][\w.\[\]]*\s*[-+*/]?=\s*\S)"
    r"|\s{2,}#|(?:\t| {4,})(?![-*+•\d])[^\n]*[(){}\[\]=<>_;][^\n]*(?<![.!?…。！？])$"
)
# A line without any of these is none of code, data or table. Most lines of prose have some, and then cost no more.
_MAY_BE_CODE = re.compile(r"[(){}\[\]<>=_;#/@:|]|,[^\s,]+,|^\s*(?:import|from|return|print|console\.log)\b")
_INDENTED = re.compile(r"(?:\t| {4,})(?![-*+•\d])")
MIN_CODE_LINES = 4
MAX_LINE_CHARACTERS = 2_000
"""Of a longer line both ends are judged: these patterns look back and forth, and a hostile line is a megabyte."""

_TABLE_LINE = re.compile(r"^[ \t>]*\|.*\|[ \t]*$")
_DATA_LINE = re.compile(r"^\s*[^\s,]+(?:,[^\s,]+){3,}\s*$")


def prose_of(text: str) -> str:
    """The words of a turn, line by line. Lines of unfenced code, of data and of tables go, but a turn of one line
    stays: it may end in a semicolon."""
    prose = _kept.get(text)
    if prose is None:
        prose = _words_of(text)
        if _keeping:
            _kept[text] = prose
    return prose


@contextmanager
def proses_kept() -> Iterator[None]:
    """Inside, a text's prose is worked out once: the rules look at the texts of one chat again and again."""
    _keeping.append(True)
    try:
        yield
    finally:
        _keeping.pop()
        _kept.clear()


_keeping: list[bool] = []
_kept: dict[str, str] = {}


def _words_of(text: str) -> str:
    text = without_code(text).strip()
    if "://" in text or "www." in text:
        text = URL.sub(" ", text)
    if "$" in text or "\\" in text:
        text = _FORMULA.sub(" ", text)
    if "<" in text:
        text = _TAG.sub(" ", text)
    if "\n" not in text:
        return " ".join(text.split())
    return "\n".join(" ".join(line.split()) for line in _prose_lines(text) if line)


def num_letters(text: str) -> int:
    """Letters of any script. By bytes for ASCII: a tenth of the time that a regex takes."""
    num_ascii = len(text.encode("utf-8", "surrogatepass").translate(None, _NOT_ASCII_LETTERS))
    return (
        num_ascii if text.isascii() else num_ascii + sum(map(str.isalpha, "".join(_NOT_ASCII.findall(text))))
    )


def num_far_letters(text: str) -> int:
    """Letters behind U+0370: Greek, Cyrillic, Arabic, Han, ..."""
    return 0 if text.isascii() else sum(c >= "\u0370" and c.isalpha() for c in text)


def _prose_lines(text: str) -> list[str]:
    """Lines that are no code. Where there is more than an example of code, comments and docstrings go with it: indented
    lines, and what stands between lines of code in a paragraph of which half is code."""
    lines = text.split("\n")
    are_code = [bool(line) and _is_code(line) for line in lines]
    if sum(are_code) < MIN_CODE_LINES:
        return [line for line, is_code in zip(lines, are_code, strict=True) if not is_code]
    prose: list[str] = []
    for is_blank, group in groupby(zip(lines, are_code, strict=True), key=lambda pair: not pair[0].strip()):
        if not is_blank:
            prose += [line for line in _around_code(list(group)) if not _INDENTED.match(line)]
    return prose


def _around_code(paragraph: list[tuple[str, bool]]) -> list[str]:
    """The lines of a paragraph before and behind its code if half of it is code, else all that are no code."""
    places = [place for place, (_, is_code) in enumerate(paragraph) if is_code]
    if not places or 2 * len(places) < len(paragraph):
        return [line for line, is_code in paragraph if not is_code]
    return [line for line, _ in paragraph[: places[0]] + paragraph[places[-1] + 1 :]]


def _is_code(line: str) -> bool:
    if not _MAY_BE_CODE.search(line):
        return False
    if len(line) > MAX_LINE_CHARACTERS:
        line = line[: MAX_LINE_CHARACTERS // 2] + line[-MAX_LINE_CHARACTERS // 2 :]
    if _CODE_START.match(line) or (CODE_SIGN.search(line) and (ends_as_code(line) or _CODE.search(line))):
        return True
    return bool(("|" in line and _TABLE_LINE.match(line)) or ("," in line and _DATA_LINE.match(line)))
