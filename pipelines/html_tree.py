"""One pass over the parsed tree of a ChatGPT answer: what the model wrote, without the page around it.

`read_answer(body, images=..., max_depth=...)` gives a `Passage`: a small canonical HTML that every converter reads
alike (p, h1-h6, ul, ol, li, hr, br, strong, em, del; no attributes but <ol start>), and `Fragments`: everything that
a converter could harm (code, formulas, links, tables, quotes, characters that Markdown would take for markup).
A fragment stands in the canonical HTML as a token between two private-use characters that the answer doesn't hold,
and is put in its place after the conversion (`Fragments.restore`), indented as its place in a list asks for.

What pages hold, by generation (2022 to 2026), and what becomes of it:
- code: `<pre>` around a header bar (language, copy button in the reader's language) and `<code>`; or CodeMirror
  (`cm-content`, new lines are `<br>`, no `<code>`, sometimes a `<pre>` inside the `<pre>`) -> fenced code, to the byte
- KaTeX: each formula three times -> its TeX annotation, `$...$` or `$$...$$`
- buttons, icons, frames, citation pills (links around truncated site names), texts for screen readers -> gone
- U+200B outside code -> gone; other non-ASCII blanks (U+00A0, U+3000, ...) are kept, converters would fold them
"""

import html
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

from selectolax.lexbor import LexborNode

from pipelines.markdown import code_span, fenced_code, positions_to_escape

MAX_COLUMNS = 200
"""Cells of a table row beyond this are not padded: colspan is the page's to choose."""


class TooDeepError(Exception):
    """The tree is nested deeper than `max_depth`."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Canonical HTML for one run of a converter, and the text that must come out of it (tokens included)."""

    html: str
    visible: str


@dataclass(frozen=True, slots=True)
class Fragment:
    """Markdown to put in a token's place; a block stands alone on its lines. `passage` is converted on its own."""

    text: str = ""
    is_block: bool = False
    passage: Passage | None = None
    line_prefix: str = ""


# ---------------------------------------------------------------------------------------------------- marks

_NON_ASCII_BLANKS = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_STRUCTURE = 12
_WINDOW = _STRUCTURE + 2 * len(_PUNCTUATION) + len(_NON_ASCII_BLANKS) + 1
_INLINE_TAGS = ("strong", "em", "del")


@dataclass(frozen=True, slots=True)
class Marks:
    """Private-use characters with a meaning for this answer only: a window of code points that it doesn't hold."""

    open: str
    close: str
    code: str
    tags: dict[str, tuple[str, str]]
    html: dict[int, str]
    literal: dict[str, str]
    escaped: dict[str, str]
    cell_break: str
    restored: dict[int, str]

    @property
    def openers(self) -> str:
        return "".join(opener for opener, _ in self.tags.values())

    @property
    def closers(self) -> str:
        return "".join(closer for _, closer in self.tags.values())


@lru_cache(maxsize=8)
def _marks(first: int) -> Marks:
    opened, closed, code, *rest = (chr(first + offset) for offset in range(_STRUCTURE))
    tags = {tag: (rest[2 * i], rest[2 * i + 1]) for i, tag in enumerate(_INLINE_TAGS)}
    after = first + _STRUCTURE
    literal = {character: chr(after + i) for i, character in enumerate(_PUNCTUATION + _NON_ASCII_BLANKS)}
    escaped = {character: chr(after + len(literal) + i) for i, character in enumerate(_PUNCTUATION)}
    cell_break = chr(after + len(literal) + len(escaped))
    restored = {ord(mark): character for character, mark in literal.items()}
    restored |= {ord(mark): "\\" + character for character, mark in escaped.items()}
    restored[ord(cell_break)] = "<br>"
    to_html = {ord(a): f"<{tag}>" for tag, (a, _) in tags.items()} | {ord(z): f"</{tag}>" for tag, (_, z) in tags.items()}
    to_html |= {ord("\n"): "<br>", ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}
    return Marks(opened, closed, code, tags, to_html, literal, escaped, cell_break, restored)


def choose_marks(source: str) -> Marks:
    """A window of private-use characters that stand nowhere in the answer, not even as a character reference."""
    text = html.unescape(source) if "&#" in source else source
    taken = sorted({ord(c) for c in re.findall(r"[\ue000-\uf8ff\U000f0000-\U0010ffff]", source + text)})
    first = 0xE000
    for code_point in taken:
        if code_point - first >= _WINDOW:
            break
        first = max(first, code_point + 1)
        if 0xF8FF - _WINDOW < first < 0xF0000:
            first = 0xF0000
    return _marks(first)


# ---------------------------------------------------------------------------------------------------- fragments


@dataclass(slots=True)
class Fragments:
    """What stands for the tokens of one answer."""

    marks: Marks
    items: list[Fragment] = field(default_factory=list)

    def token(self, fragment: Fragment) -> str:
        self.items.append(fragment)
        return f"{self.marks.open}{len(self.items) - 1}{self.marks.close}"

    def restore(self, markdown: str, convert: Callable[[Passage], str]) -> str:
        """Markdown with every token replaced, in one pass: what is put in is never searched for tokens again.

        A block's further lines are indented to the column of its token, so that a CommonMark reader sees it inside
        the same list item; empty lines stay empty.
        """
        opened, closed = self.marks.open, self.marks.close
        tokens = re.compile(rf"^([ \d.*+-]*){opened}(\d+){closed}$|{opened}(\d+){closed}", re.MULTILINE)

        def replace(match: re.Match[str]) -> str:
            fragment = self.items[int(match[2] or match[3])]
            before = match[1] or ""
            if not fragment.is_block:
                return before + fragment.text
            text = convert(fragment.passage) if fragment.passage else fragment.text
            lines = [(fragment.line_prefix + line).rstrip(" ") if fragment.line_prefix and not line else
                     fragment.line_prefix + line for line in text.split("\n")]
            indent = " " * len(before)
            return before + "\n".join([lines[0], *(indent + line if line else "" for line in lines[1:])])

        pieces = tokens.sub(replace, markdown)
        return pieces
