"""Tokens that keep a converter's hands off: code, formulas, links, tables, quotes, characters that look like markup.

Each stands in the canonical HTML as private-use characters that the answer itself doesn't hold, and is put back in
its place after the conversion (`Fragments.restore`), indented as its place in a list asks for.
"""

import html
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

NON_ASCII_BLANKS = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
INLINE_TAGS = ("strong", "em", "del")

_NUM_STRUCTURE_MARKS = 4 + 2 * len(INLINE_TAGS)
_WINDOW = _NUM_STRUCTURE_MARKS + 2 * len(PUNCTUATION) + len(NON_ASCII_BLANKS)
_FIRST = 0xE000
_FIRST_AREA = re.compile(r"[\ue000-\uf8ff]")  # one range alone: twice as fast
_PRIVATE_USE = re.compile(r"[\ue000-\uf8ff\U000f0000-\U000ffffd]")


@dataclass(frozen=True, slots=True)
class Passage:
    """Canonical HTML for one run of a converter, and the text that must come out of it (marks included)."""

    html: str
    visible: str


@dataclass(slots=True)
class Fragment:
    """Markdown for a token's place. A block stands alone on its lines; a `passage` is converted on its own first."""

    text: str = ""
    is_block: bool = False
    passage: Passage | None = None
    line_prefix: str = ""
    other_markers: bool = False  # a list right behind a list of its kind: "+" and "1)" keep the two apart


@dataclass(frozen=True, slots=True, eq=False)
class Marks:
    """Private-use characters with a meaning for one answer: a window of code points that it doesn't hold.

    `literal` and `escaped` stand for a character as it is and for the character behind a backslash.
    """

    open: str
    close: str
    code_close: str  # in place of `close` after a token of inline code: back-ticks near it need escaping
    cell_break: str  # a line break inside a table cell
    tags: dict[str, tuple[str, str]]
    html: tuple[tuple[str, str], ...]
    literal: dict[str, str]
    escaped: dict[str, str]
    restored: dict[str, str]
    tokens: re.Pattern[str]
    characters: re.Pattern[str]
    openers: str
    closers: str
    strikes: str
    empty: str
    any_opener: re.Pattern[str]
    any_tag: re.Pattern[str]
    tag_groups: re.Pattern[str]
    structure: re.Pattern[str]
    untidy: re.Pattern[str]  # blanks inside of emphasis, nothing in it, or nothing between two of one kind
    unusual: re.Pattern[
        str
    ]  # a run without any of these is its own canonical HTML, but for its first and last letter
    break_before_opener: re.Pattern[str]
    blanks_behind_opener: re.Pattern[str]
    blanks_before_closer: re.Pattern[str]

    def to_html(self, text: str) -> str:
        """Canonical HTML of a run: escaped, with its tags and line breaks."""
        for character, markup in self.html:
            if character in text:
                text = text.replace(character, markup)
        return text

    def to_markdown(self, text: str) -> str:
        """The text with its character marks put back. A regex: str.translate is slow where little is to be done."""
        return text if text.isascii() else self.characters.sub(lambda match: self.restored[match[0]], text)


@lru_cache(maxsize=8)
def _marks(first: int) -> Marks:
    opened, closed, code_closed, cell_break, *rest = (chr(first + i) for i in range(_NUM_STRUCTURE_MARKS))
    tags = {tag: (rest[2 * i], rest[2 * i + 1]) for i, tag in enumerate(INLINE_TAGS)}
    after = first + _NUM_STRUCTURE_MARKS
    literal = {character: chr(after + i) for i, character in enumerate(PUNCTUATION + NON_ASCII_BLANKS)}
    escaped = {character: chr(after + len(literal) + i) for i, character in enumerate(PUNCTUATION)}
    restored = {mark: character for character, mark in literal.items()}
    restored |= {mark: "\\" + character for character, mark in escaped.items()} | {cell_break: "<br>"}
    as_html = [("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("\n", "<br>")]
    for tag, (opener, closer) in tags.items():
        as_html += [(opener, f"<{tag}>"), (closer, f"</{tag}>")]
    token = rf"{opened}(\d+)[{closed}{code_closed}]"
    openers = "".join(opener for opener, _ in tags.values())
    closers = "".join(closer for _, closer in tags.values())
    return Marks(
        open=opened,
        close=closed,
        code_close=code_closed,
        cell_break=cell_break,
        tags=tags,
        html=tuple(as_html),
        literal=literal,
        escaped=escaped,
        restored=restored,
        tokens=re.compile(rf"^([ \d.)*+-]*){token}$|{token}", re.MULTILINE),
        characters=re.compile(f"[{''.join(restored)}]"),
        openers=openers,
        closers=closers,
        strikes="".join(tags["del"]),
        empty=f" \n{openers}{closers}",
        structure=re.compile(f"[{openers}{closers}{cell_break}]"),
        untidy=re.compile(
            f"[{openers}{closers}](?:(?<=[{openers}])(?=[ \n])|(?<=[{closers}])(?<=[ \n].)"
            + "".join(
                f"|(?<={one})(?={other})" for pair in tags.values() for one, other in (pair, pair[::-1])
            )
            + ")"
        ),
        unusual=re.compile(rf"[{opened}-{chr(first + _WINDOW - 1)}*_`\[\\|&~<>$\n{NON_ASCII_BLANKS}]"),
        any_opener=re.compile(f"[{openers}]"),
        any_tag=re.compile(f"[{openers}{closers}]"),
        tag_groups=re.compile(f"[{openers}{closers}]{{2,}}"),
        break_before_opener=re.compile(f"\n([{openers}])"),
        blanks_behind_opener=re.compile(f"([{openers}])([ \n]+)"),
        blanks_before_closer=re.compile(f"([ \n]+)([{closers}])"),
    )


def choose_marks(source: str) -> Marks:
    """Marks that stand nowhere in the answer, not even as a character reference.

    Raises ValueError when every window of the private-use areas is taken.
    """
    text = source + html.unescape(source) if "&#" in source else source
    if text.isascii() or not _may_hold_private_use(text) or not _FIRST_AREA.search(text):
        return _marks(_FIRST)
    first = _FIRST
    for code_point in sorted({ord(character) for character in _PRIVATE_USE.findall(text)}):
        if code_point - first >= _WINDOW:
            break
        first = code_point + 1
        if 0xF8FF - _WINDOW < first < 0xF0000:
            first = 0xF0000
    if first > 0xFFFFD - _WINDOW:
        raise ValueError("the answer holds nearly every private-use character there is")
    return _marks(first)


def _may_hold_private_use(text: str) -> bool:
    """By the first byte of U+E000-F8FF: a fifth of the time of the pattern."""
    data = text.encode("utf-8", "surrogatepass")
    return b"\xee" in data or b"\xef" in data


@dataclass(slots=True)
class Fragments:
    """What stands for the tokens of one answer."""

    marks: Marks
    items: list[Fragment] = field(default_factory=list)

    def token(self, fragment: Fragment, *, is_code: bool = False) -> str:
        self.items.append(fragment)
        return (
            f"{self.marks.open}{len(self.items) - 1}{self.marks.code_close if is_code else self.marks.close}"
        )

    def restore(self, markdown: str, convert: Callable[[Passage], str]) -> str:
        """Markdown with every token replaced, in one pass: what is put in is never searched for tokens again."""

        def replace(match: re.Match[str]) -> str:
            before, alone, inline = match.groups("")
            fragment = self.items[int(alone or inline)]
            if not fragment.is_block:
                return before + fragment.text
            text = convert(fragment.passage) if fragment.passage else fragment.text
            if fragment.other_markers:
                text = _with_other_markers(text)
            if not text:
                return before.rstrip(" ")
            return before + _indented(text, " " * len(before), line_prefix=fragment.line_prefix)

        restored = self.marks.tokens.sub(replace, markdown)
        return self.marks.to_markdown(restored)


def _with_other_markers(one_list: str) -> str:
    """Only the markers of its own items stand at the beginning of a line: all else in a list is indented."""
    return re.sub(
        r"^(?:-|(\d{1,9})\.)(?= |$)", lambda m: f"{m[1]})" if m[1] else "+", one_list, flags=re.MULTILINE
    )


def _indented(text: str, indent: str, *, line_prefix: str) -> str:
    """A block inside a list item: a CommonMark reader takes the indent off again. Empty lines stay empty."""
    lines = text.split("\n")
    if line_prefix:
        lines = [line_prefix + line if line else line_prefix.rstrip() for line in lines]
    return "\n".join([lines[0], *(indent + line if line else "" for line in lines[1:])])
