"""The page being read: finished blocks, and the run of inline text that the next block ends.

Handlers of elements add to the run or end it; a run becomes one block of canonical HTML, in which every character
that Markdown or a converter could take for markup stands as a mark (see html_marks.py).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from selectolax.lexbor import LexborNode

from pipelines.html_emphasis import MAX_CHECKED_CHARS, readable, tidy
from pipelines.html_marks import NON_ASCII_BLANKS, Fragment, Fragments
from pipelines.markdown import positions_to_escape
from pipelines.text_repair import without_invisible

MAX_PASSAGES = 10_000
"""Parts of an answer that are converted apart: 45,000 tables, 2 MB, took markdownify 19 s."""

_BLANKS = re.compile(r"[ \t\n\r\f]+")
_SPACES = re.compile("  +")
_LINE_BREAK = re.compile(r" *\n[ \n]*")
_AUTOLINK = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]{1,31}:[!-;=?-Z\]^_a-~]+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+", re.ASCII
)
_SPECIAL = re.compile(rf"[*_`\[\\|&~<{NON_ASCII_BLANKS}]")
_LINE_START = re.compile(r"^(?:[#>+=-]|\d{1,9}[.)])", re.MULTILINE)


class TooDeepError(Exception):
    """The tree is nested deeper than `max_depth`."""


class TooLargeError(Exception):
    """A small page would become a huge text."""


@dataclass(slots=True)
class Page:
    """State of the one pass over an answer's tree."""

    handlers: Mapping[str | None, "Handler"]
    fragments: Fragments
    images: str
    citations: str
    max_depth: int
    max_chars: int  # of the Markdown
    blocks: list[str] = field(default_factory=list)
    run: list[str] = field(default_factory=list)
    visible: list[str] = field(default_factory=list)
    wrap: str = "p"  # the element around the next run; "" for text that stands bare in a list item
    open_tags: list[str] = field(default_factory=list)
    in_cell: bool = False
    list_depth: int = 0
    num_indent_chars: int = 0
    num_passages: int = 0
    list_ends: dict[int, str] = field(default_factory=dict)  # number of blocks at the end of a list: its kind
    other_markers: bool = False  # whether that list has the other kind of markers
    has_formulas: bool = False
    has_counters: bool = False
    last_formula: str = ""
    link: str = ""  # where the open link leads
    link_start: int = 0  # index in `run` of the first piece of its text
    tags_outside_link: int = 0
    check_budget: list[int] = field(default_factory=lambda: [MAX_CHECKED_CHARS])
    bare_block: int = -1  # index of the block that is bare text of a list item, if it is the last one


Handler: TypeAlias = Callable[[LexborNode, Page, int], None]
"""Reads one element that stands `depth` levels deep. Elements without a handler count for what is in them."""


def walk(node: LexborNode, page: Page, depth: int) -> None:
    """Read the children of an element. Raises TooDeepError."""
    if depth > page.max_depth:
        raise TooDeepError
    find_handler = page.handlers.get
    for child in node.iter(include_text=True):
        tag = child.tag
        if tag != "-text":
            find_handler(tag, walk)(child, page, depth + 1)
        elif page.has_formulas:
            read_text(child, page)
        elif (
            text := child.text_content
        ):  # as read_text: half of all nodes are texts, and a call costs as much again
            if text.isprintable():
                if page.run or not text.isspace():
                    page.run.append(text)
            elif page.run or not text.isspace():
                page.run.append(_printable(text))


def read_text(node: LexborNode, page: Page) -> None:
    text = node.text_content or ""
    if not page.run and text.isspace():
        return
    # New lines, tabs, zero-width and control characters; a regex on every node costs a tenth of the time.
    if not text.isprintable():
        text = _printable(text)
    if page.has_formulas and text[:1].isdigit() and page.run and page.run[-1] == page.last_formula:
        text = f" {text}"
    page.run.append(text)


def _printable(text: str) -> str:
    text = _BLANKS.sub(" ", text)
    return text if text.isprintable() else without_invisible(text)


def block(node: LexborNode, page: Page, depth: int) -> None:
    """Handler of elements that stand on lines of their own."""
    end_run(page)
    walk(node, page, depth)
    end_run(page)


def inline_token(page: Page, text: str, *, is_code: bool = False) -> str:
    """Text to append to the run in place of Markdown that must come out as it is."""
    return page.fragments.token(Fragment(text.replace("|", "\\|") if page.in_cell else text), is_code=is_code)


def block_token(page: Page, fragment: Fragment) -> None:
    """A block of Markdown that must come out as it is. Raises TooLargeError."""
    end_run(page)
    page.num_passages += fragment.passage is not None
    if page.num_passages > MAX_PASSAGES:
        raise TooLargeError(f"more than {MAX_PASSAGES} tables, quotes and neighbouring lists")
    token = page.fragments.token(fragment)
    page.blocks.append(f"<p>{token}</p>")
    page.visible.append(token)
    if page.wrap == "":
        page.wrap = "p"


def end_run(page: Page) -> None:
    """Close the run of inline text as a block of its own."""
    if not page.run:
        return
    text = _closed_run(page) if page.open_tags or page.link else "".join(page.run)
    if not page.open_tags:
        page.run = []
        if text.isspace():
            return
    plain = _plain(text, page)
    visible, canonical = (plain, plain) if plain is not None else _with_markup(text, page)
    if not visible:
        return
    page.visible.append(visible)
    if page.wrap and not page.in_cell:
        page.blocks.append(f"<{page.wrap}>{canonical}</{page.wrap}>")
        return
    page.blocks.append(canonical)
    if not page.in_cell:
        page.wrap = "p"
        page.bare_block = len(page.blocks) - 1


def _plain(text: str, page: Page) -> str | None:
    """The run without outer blanks if nothing in it could be taken for markup, as in most; else None."""
    if page.in_cell or page.fragments.marks.unusual.search(text):
        return None
    text = (_SPACES.sub(" ", text) if "  " in text else text).strip()
    if text and (text[-1] == "#" or (not text[0].isalpha() and _LINE_START.match(text))):
        return None
    if page.list_depth:
        _count_indent(page, text)
    return text


def _with_markup(text: str, page: Page) -> tuple[str, str]:
    """The text that must come out of the converter, marks included, and its canonical HTML; "" twice for nothing."""
    marks = page.fragments.marks
    text = _tidy(text, page)
    if not text.strip(marks.empty).strip():
        return "", ""
    _count_indent(page, text)
    text = readable(text, page.fragments, lambda run: _marked(run, page), page.check_budget)
    if page.list_depth and "\n" in text:
        text = _with_breaks_indented(text, page)
    return text, marks.to_html(text)


def _with_breaks_indented(text: str, page: Page) -> str:
    """html-to-markdown forgets to indent a line that begins with emphasis: something has to stand before it."""
    nothing = Fragment()
    return page.fragments.marks.break_before_opener.sub(
        lambda match: f"\n{page.fragments.token(nothing)}{match[1]}", text
    )


def _count_indent(page: Page, text: str) -> None:
    """Deep lists indent every line. A converter builds all of it before it can be refused: so ask here."""
    page.num_indent_chars += 2 * page.list_depth * (1 + text.count("\n"))
    if page.num_indent_chars > page.max_chars:
        raise TooLargeError(f"its Markdown is longer than {page.max_chars} characters")


def _closed_run(page: Page) -> str:
    """The run with an end to the link and the emphasis that go on in the next; that one begins with them."""
    pairs = [page.fragments.marks.tags[tag] for tag in page.open_tags]
    outside, inside = pairs[: page.tags_outside_link], pairs[page.tags_outside_link :]
    if not page.link:
        outside, inside = pairs, []
    page.run += [closer for _, closer in reversed(inside)]
    close_link(page)
    text = "".join([*page.run, *(closer for _, closer in reversed(outside))])
    page.run = [opener for opener, _ in outside]
    page.link_start = len(page.run)
    page.run += [opener for opener, _ in inside]
    return text


def close_link(page: Page) -> None:
    """Put the brackets around what the run holds of the open link's text."""
    if not page.link:
        return
    marks = page.fragments.marks
    text = "".join(page.run[page.link_start :])
    bare = text.strip(" \n")
    if not bare.strip(marks.empty):
        return
    before, after = text[: text.index(bare)], text[text.index(bare) + len(bare) :]
    if _is_its_own_address(page.link, bare):
        page.run[page.link_start :] = [before, inline_token(page, f"<{bare}>"), after]
        return
    for bracket in "[]":
        bare = bare.replace(bracket, marks.escaped[bracket])
    if page.link_start and page.run[page.link_start - 1].endswith("!"):
        page.run[page.link_start - 1] = page.run[page.link_start - 1][:-1] + marks.escaped["!"]
    link = [inline_token(page, "["), bare, inline_token(page, f"]({page.link})")]
    page.run[page.link_start :] = [before, *link, after]


def _is_its_own_address(target: str, text: str) -> bool:
    return bool(_AUTOLINK.fullmatch(text)) and target in (text, f"mailto:{text}")


def _tidy(text: str, page: Page) -> str:
    """Blanks folded, emphasis tidied."""
    marks = page.fragments.marks
    if marks.any_opener.search(text):
        text = tidy(text, marks)
    if "  " in text:
        text = _SPACES.sub(" ", text)
    if "\n" not in text:
        return text.strip(" ")
    text = _LINE_BREAK.sub("\n", text).strip(" \n")
    return text.replace("\n", " ") if page.wrap[:1] == "h" and not page.in_cell else text


def _marked(text: str, page: Page) -> str:
    """Characters that are Markdown where they stand get their escaped mark, others that converters touch theirs."""
    marks = page.fragments.marks
    dollars = page.has_formulas and "$" in text
    if not page.in_cell and not dollars and not _needs_marks(text):
        return text
    line_starts = page.wrap[:1] != "h" and not page.in_cell
    emphasis, code = marks.openers + marks.closers, marks.code_close
    places = positions_to_escape(
        text, emphasis=emphasis, strikes=marks.strikes, code=code, line_starts=line_starts, dollars=dollars
    )
    characters = [
        marks.escaped[character] if place in places else marks.literal.get(character, character)
        for place, character in enumerate(text)
    ]
    if page.in_cell:
        in_cell = {marks.literal["|"]: marks.escaped["|"], "\n": marks.cell_break}
        characters = [in_cell.get(character, character) for character in characters]
    return "".join(characters)


def _needs_marks(text: str) -> bool:
    # Three cheap questions: one regex with "^" among its alternatives takes four times as long.
    if _SPECIAL.search(text) or text[-1] == "#":
        return True
    return ("\n" in text or not text[0].isalpha()) and _LINE_START.search(text) is not None
