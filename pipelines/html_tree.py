"""One pass over the parsed tree of a ChatGPT answer: what the model wrote, without the page around it.

`read_answer(body, marks, images=..., max_depth=...)` gives an `Answer`: a canonical HTML that every converter reads
alike (p, h1-h6, ul, ol, li, hr, br, strong, em, del; no attributes but <ol start>), and the fragments for its tokens.

Left out: buttons (in any language: by tag), icons, frames, scripts, text for screen readers, citation pills.
U+200B goes; other blanks (U+00A0, U+3000, ...) stay as they are, converters would fold them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from selectolax.lexbor import LexborNode

from pipelines.html_leaves import (
    code_block,
    footnote_label,
    formula,
    has_class,
    image_markdown,
    inline_code_text,
    is_citation_pill,
    link_target,
)
from pipelines.html_marks import NON_ASCII_BLANKS, Fragment, Fragments, Marks, Passage
from pipelines.markdown import code_span, positions_to_escape

MAX_COLSPAN = 50
"""A page chooses its colspan; a wider cell is not padded further."""
MAX_CELLS = 50_000
"""Cells of a table, with those that pad its rows."""

_BLANKS = re.compile(r"[ \t\n\r\f]+")
_HIDDEN = re.compile(r"(?:^|\s)(?:sr-only|katex-mathml)(?:\s|$)")
_SPACES = re.compile("  +")
_LINE_BREAK = re.compile(r" *\n[ \n]*")
_SPECIAL = re.compile(rf"[*_`\[\\|&~<{NON_ASCII_BLANKS}]")
_LINE_START = re.compile(r"^(?:[#>+=-]|\d{1,9}[.)])", re.MULTILINE)


class TooDeepError(Exception):
    """The tree is nested deeper than `max_depth`."""


class TooLargeError(Exception):
    """A small page would become a huge text."""


@dataclass(frozen=True, slots=True)
class Answer:
    passage: Passage
    fragments: Fragments


@dataclass(slots=True)
class _Page:
    """What has been read so far: finished blocks, and the run of inline text that the next block ends."""

    fragments: Fragments
    images: str
    max_depth: int
    blocks: list[str] = field(default_factory=list)
    run: list[str] = field(default_factory=list)
    visible: list[str] = field(default_factory=list)
    wrap: str = "p"  # the element around the next run; "" for text that stands bare in a list item
    open_tags: list[str] = field(default_factory=list)
    in_cell: bool = False
    list_depth: int = 0
    bare_block: int = -1  # index of the block that is bare text of a list item, if it is the last one


def read_answer(body: LexborNode, marks: Marks, *, images: str, max_depth: int) -> Answer:
    """The canonical form of an answer. Raises TooDeepError.

    Where the page has elements of class `markdown`, only they are read: around them stands furniture.
    """
    page = _Page(Fragments(marks), images, max_depth)
    for root in answer_roots(body):
        _children(root, page, 1)
        _end_run(page)
    return Answer(Passage("".join(page.blocks), "".join(page.visible)), page.fragments)


def answer_roots(body: LexborNode) -> list[LexborNode]:
    """The `markdown` elements of a page, or the body of a page without any."""
    children = list(body.iter())
    if children and all(map(_is_markdown, children)):
        return children
    found = [node for node in body.css(".markdown") if not _inside_markdown(node)]
    return found or [body]


def _is_markdown(node: LexborNode) -> bool:
    return has_class(node, "markdown")


def _inside_markdown(node: LexborNode) -> bool:
    parent = node.parent
    while parent is not None:
        if _is_markdown(parent):
            return True
        parent = parent.parent
    return False


# ------------------------------------------------------------------------------------------------- the walk


def _children(node: LexborNode, page: _Page, depth: int) -> None:
    if depth > page.max_depth:
        raise TooDeepError
    for child in node.iter(include_text=True):
        tag = child.tag
        if tag == "-text":
            _text(child, page)
        else:
            _HANDLERS.get(tag, _children)(child, page, depth + 1)


def _text(node: LexborNode, page: _Page) -> None:
    text = node.text_content or ""
    if not page.run and text.isspace():
        return
    if (
        not text.isprintable()
    ):  # new lines, tabs, zero-width spaces; a regex for every node costs a tenth of the time
        text = _BLANKS.sub(" ", text).replace("\u200b", "")
    page.run.append(text)


def _skip(node: LexborNode, page: _Page, depth: int) -> None:
    """Furniture of the page."""


def _division(node: LexborNode, page: _Page, depth: int) -> None:
    if not has_class(node, "sr-only"):
        _block(node, page, depth)


def _block(node: LexborNode, page: _Page, depth: int) -> None:
    _end_run(page)
    _children(node, page, depth)
    _end_run(page)


def _span(node: LexborNode, page: _Page, depth: int) -> None:
    class_names = node.attrs.get("class") or ""
    if "katex" in class_names and (found := formula(node, class_names)) is not None:
        _formula(*found, page)
    elif not _HIDDEN.search(class_names) and node.attrs.get("data-testid") != "webpage-citation-pill":
        _children(node, page, depth)


def _math(node: LexborNode, page: _Page, depth: int) -> None:
    found = formula(node, "katex-display" if node.attrs.get("display") == "block" else "katex")
    if found is not None:
        _formula(*found, page)


def _formula(tex: str, is_display: bool, page: _Page) -> None:
    if is_display and not page.in_cell:
        _block_token(page, Fragment(f"$$\n{tex}\n$$", is_block=True))
    else:
        fence = "$$" if is_display else "$"
        page.run.append(_inline_token(page, f"{fence}{' '.join(tex.split())}{fence}"))


def _inline_token(page: _Page, text: str, *, is_code: bool = False) -> str:
    return page.fragments.token(Fragment(text.replace("|", "\\|") if page.in_cell else text), is_code=is_code)


def _block_token(page: _Page, fragment: Fragment) -> None:
    _end_run(page)
    token = page.fragments.token(fragment)
    page.blocks.append(f"<p>{token}</p>")
    page.visible.append(token)
    if page.wrap == "":
        page.wrap = "p"


def _code(node: LexborNode, page: _Page, depth: int) -> None:
    if text := inline_code_text(node):
        page.run.append(_inline_token(page, code_span(text), is_code=True))


def _pre(node: LexborNode, page: _Page, depth: int) -> None:
    block = code_block(node)
    if page.in_cell:
        if block.code.strip():
            page.run.append(_inline_token(page, code_span(" ".join(block.code.split())), is_code=True))
    else:
        _block_token(page, Fragment(block.markdown(), is_block=True))


def _emphasis(tag: str) -> Callable[[LexborNode, _Page, int], None]:
    def handler(node: LexborNode, page: _Page, depth: int) -> None:
        if tag in page.open_tags:
            _children(node, page, depth)
            return
        opener, closer = page.fragments.marks.tags[tag]
        page.run.append(opener)
        page.open_tags.append(tag)
        _children(node, page, depth)
        page.open_tags.pop()
        page.run.append(closer)

    return handler


def _html_tag(tag: str) -> Callable[[LexborNode, _Page, int], None]:
    """Elements that Markdown can only write as HTML."""

    def handler(node: LexborNode, page: _Page, depth: int) -> None:
        label = footnote_label(node) if tag == "sup" else None
        if label is not None:
            page.run.append(_inline_token(page, f"[^{label}]"))
            return
        page.run.append(_inline_token(page, f"<{tag}>"))
        _children(node, page, depth)
        page.run.append(_inline_token(page, f"</{tag}>"))

    return handler


def _link(node: LexborNode, page: _Page, depth: int) -> None:
    if is_citation_pill(node) or node.attrs.get("data-footnote-backref") is not None:
        return
    start = len(page.run)
    _children(node, page, depth)
    text = "".join(page.run[start:])
    target = link_target(node.attrs.get("href") or "", text)
    if target and text.strip() and "\n" not in text:
        page.run[start:] = [_inline_token(page, "["), *page.run[start:], _inline_token(page, f"]({target})")]


def _image(node: LexborNode, page: _Page, depth: int) -> None:
    if text := image_markdown(node, page.images):
        page.run.append(_inline_token(page, text) if page.images == "keep" else text)


def _input(node: LexborNode, page: _Page, depth: int) -> None:
    if (node.attrs.get("type") or "").lower() == "checkbox":
        page.run += [_inline_token(page, "[x]" if "checked" in node.attrs else "[ ]"), " "]


def _line_break(node: LexborNode, page: _Page, depth: int) -> None:
    page.run.append("\n")


def _rule(node: LexborNode, page: _Page, depth: int) -> None:
    _end_run(page)
    if page.in_cell:
        return
    if page.list_depth:  # "- ---" would be one rule, not an item with a rule in it
        _block_token(page, Fragment("***", is_block=True))
    else:
        page.blocks.append("<hr>")


def _heading(node: LexborNode, page: _Page, depth: int) -> None:
    if has_class(node, "sr-only"):
        return
    _end_run(page)
    outer, page.wrap = page.wrap, node.tag or "p"
    _children(node, page, depth)
    _end_run(page)
    page.wrap = outer


def _summary(node: LexborNode, page: _Page, depth: int) -> None:
    _end_run(page)
    _emphasis("strong")(node, page, depth)
    _end_run(page)


def _quote(node: LexborNode, page: _Page, depth: int) -> None:
    if page.in_cell:
        _block(node, page, depth)
        return
    _end_run(page)
    passage = _passage(node, page, depth)
    if passage.html:
        _block_token(page, Fragment(is_block=True, passage=passage, line_prefix="> "))


def _passage(node: LexborNode, page: _Page, depth: int) -> Passage:
    """The children of a quote, to be converted apart: converters put what follows a list into the list."""
    outer = page.blocks, page.visible, page.open_tags, page.wrap
    page.blocks, page.visible, page.open_tags, page.wrap, page.bare_block = [], [], [], "p", -1
    _children(node, page, depth)
    _end_run(page)
    passage = Passage("".join(page.blocks), "".join(page.visible))
    page.blocks, page.visible, page.open_tags, page.wrap = outer
    page.bare_block = -1
    return passage


# ------------------------------------------------------------------------------------------------- lists


def _list(node: LexborNode, page: _Page, depth: int) -> None:
    _end_run(page)
    is_ordered = node.tag == "ol"
    first = _list_start(node) if is_ordered else 1
    if page.in_cell:
        _list_in_cell(node, page, depth, is_ordered, first)
        return
    if has_class(node.parent, "footnotes"):
        _footnotes(node, page, depth)
        return
    wrap = "" if _is_tight(node) else "p"
    opening = f'<ol start="{first}">' if is_ordered and first != 1 else f"<{node.tag}>"
    outer_wrap, num_blocks = page.wrap or "p", len(page.blocks)
    if first != 1 and page.bare_block == num_blocks - 1 and num_blocks:
        # Only a list that starts with 1 may interrupt a paragraph: <p> asks for a blank line between.
        page.blocks[-1] = f"<p>{page.blocks[-1]}</p>"
    for child in node.iter(include_text=True):
        if not child.is_text_node or (child.text_content or "").strip():
            page.wrap = wrap
            page.list_depth += 1
            _list_item(child, page, depth, is_first=len(page.blocks) == num_blocks)
            page.list_depth -= 1
    if len(page.blocks) > num_blocks:
        page.blocks[num_blocks] = opening + page.blocks[num_blocks]
        page.blocks.append(f"</{node.tag}>")
    page.wrap = outer_wrap


def _list_item(child: LexborNode, page: _Page, depth: int, *, is_first: bool) -> None:
    """An item, or what stands in a list beside its items, which joins the item before it."""
    if child.tag == "li" or is_first:
        page.blocks.append("<li>")
    else:
        page.blocks.pop()
    if child.is_text_node:
        _text(child, page)
    else:
        (_children if child.tag == "li" else _HANDLERS.get(child.tag, _children))(child, page, depth + 1)
    _end_run(page)
    page.blocks.append("</li>")


def _list_start(node: LexborNode) -> int:
    start = node.attrs.get("start") or "1"
    return int(start) if re.fullmatch(r"\d{1,8}", start) else 1


def _is_tight(node: LexborNode) -> bool:
    """Whether the source had no blank lines between the items.

    Pages from 2025 on wrap every item in <p>, but carry the source's offsets: one character apart means one new
    line. Inside a nested list indentation blurs that; those are taken as tight. Older pages wrap loose items only.
    """
    items = [child for child in node.iter() if child.tag == "li"]
    starts = [child.attrs.get("data-start") for child in items]
    if all(starts) and items:
        if node.parent is not None and node.parent.tag == "li":
            return True
        ends = [child.attrs.get("data-end") or "" for child in items]
        return all(_difference(start, end) <= 1 for start, end in zip(starts[1:], ends[:-1], strict=True))
    return not any(child.tag == "p" for item in items for child in item.iter())


def _difference(start: str | None, end: str) -> int:
    return int(start) - int(end) if start and start.isdecimal() and end.isdecimal() else 2


def _list_in_cell(node: LexborNode, page: _Page, depth: int, is_ordered: bool, first: int) -> None:
    for number, item in enumerate((child for child in node.iter() if child.tag == "li"), start=first):
        page.run.append(_inline_token(page, f"{number}. " if is_ordered else "- "))
        _children(item, page, depth + 1)
        _end_run(page)


def _footnotes(node: LexborNode, page: _Page, depth: int) -> None:
    for number, item in enumerate((child for child in node.iter() if child.tag == "li"), start=1):
        page.run.append(_inline_token(page, f"[^{number}]: "))
        paragraphs = [child for child in item.iter() if child.tag == "p"]
        for child in paragraphs or [item]:
            _children(child, page, depth + 1)
        _end_run(page)


# ------------------------------------------------------------------------------------------------- tables


def _table(node: LexborNode, page: _Page, depth: int) -> None:
    if page.in_cell:
        _block(node, page, depth)
        return
    _end_run(page)
    outer_visible, page.visible = page.visible, []
    rows = [_cells(row, page, depth) for row in node.css("tr") if _is_row_of(row, node)]
    rows = [row for row in rows if row]
    visible, page.visible = "".join(page.visible), outer_visible
    for caption in (child for child in node.iter() if child.tag == "caption"):
        _block(caption, page, depth + 1)
    if rows:
        passage = Passage(_table_html(rows), visible)
        _block_token(page, Fragment(is_block=True, passage=passage))


def _is_row_of(row: LexborNode, table: LexborNode) -> bool:
    parent = row.parent
    while parent is not None and parent.tag != "table":
        parent = parent.parent
    return parent is not None and parent.mem_id == table.mem_id


def _cells(row: LexborNode, page: _Page, depth: int) -> list[str]:
    cells: list[str] = []
    for cell in (child for child in row.iter() if child.tag in ("td", "th")):
        outer, page.blocks = page.blocks, []
        page.in_cell = True
        _children(cell, page, depth + 3)
        _end_run(page)
        page.in_cell = False
        cells.append(page.fragments.marks.cell_break.join(page.blocks))
        page.blocks = outer
        span = cell.attrs.get("colspan") or "1"
        cells += [""] * (min(int(span), MAX_COLSPAN) - 1 if re.fullmatch(r"\d{1,4}", span) else 0)
    return cells


def _table_html(rows: list[list[str]]) -> str:
    """A GFM table: the first row is the head, all rows are as wide as the widest."""
    width = max(len(row) for row in rows)
    if width * len(rows) > MAX_CELLS:
        raise TooLargeError(f"a table of {len(rows)} rows and {width} columns, more than {MAX_CELLS} cells")
    head, *body = [row + [""] * (width - len(row)) for row in rows]
    lines = ["<table><thead><tr>", *(f"<th>{cell}</th>" for cell in head), "</tr></thead><tbody>"]
    for row in body:
        lines += ["<tr>", *(f"<td>{cell}</td>" for cell in row), "</tr>"]
    return "".join([*lines, "</tbody></table>"])


# ------------------------------------------------------------------------------------------------- runs


def _end_run(page: _Page) -> None:
    """Close the run of inline text as a block of its own."""
    if not page.run:
        return
    text = "".join(page.run)
    marks = page.fragments.marks
    if page.open_tags:
        inside = [marks.tags[tag] for tag in page.open_tags]
        text += "".join(closer for _, closer in reversed(inside))
        page.run = [opener for opener, _ in inside]
    else:
        page.run = []
        if text.isspace():
            return
    text = _tidy(text, page)
    if not text.strip(marks.empty).strip():
        return
    text = _marked(text, page)
    page.visible.append(text)
    canonical = marks.to_html(text)
    if page.wrap and not page.in_cell:
        page.blocks.append(f"<{page.wrap}>{canonical}</{page.wrap}>")
        return
    page.blocks.append(canonical)
    if not page.in_cell:
        page.wrap = "p"
        page.bare_block = len(page.blocks) - 1


def _tidy(text: str, page: _Page) -> str:
    """Blanks folded, kept out of emphasis; emphasis around nothing and between two equal ones taken out."""
    marks = page.fragments.marks
    if marks.any_opener.search(text):
        before = ""
        while before != text:
            before = text
            for opener, closer in marks.tags.values():
                text = text.replace(closer + opener, "").replace(opener + closer, "")
            text = marks.blanks_behind_opener.sub(r"\2\1", text)
            text = marks.blanks_before_closer.sub(r"\2\1", text)
    if "  " in text:
        text = _SPACES.sub(" ", text)
    if "\n" not in text:
        return text.strip(" ")
    text = _LINE_BREAK.sub("\n", text).strip(" \n")
    return text.replace("\n", " ") if page.wrap[:1] == "h" and not page.in_cell else text


def _marked(text: str, page: _Page) -> str:
    """Characters that are Markdown where they stand get their escaped mark, others that converters touch theirs."""
    marks = page.fragments.marks
    if not page.in_cell and not _needs_marks(text):
        return text
    line_starts = page.wrap[:1] != "h" and not page.in_cell
    emphasis, code = marks.openers + marks.closers, marks.code_close
    places = positions_to_escape(text, emphasis=emphasis, code=code, line_starts=line_starts)
    characters = [
        marks.escaped[character] if place in places else marks.literal.get(character, character)
        for place, character in enumerate(text)
    ]
    if page.in_cell:
        characters = [
            marks.escaped["|"]
            if character == marks.literal["|"]
            else marks.cell_break
            if character == "\n"
            else character
            for character in characters
        ]
    return "".join(characters)


def _needs_marks(text: str) -> bool:
    # Three cheap questions: one regex with "^" among its alternatives takes four times as long.
    if _SPECIAL.search(text) or text[-1] == "#":
        return True
    return ("\n" in text or not text[0].isalpha()) and _LINE_START.search(text) is not None


_Handler = Callable[[LexborNode, _Page, int], None]
_HANDLERS: dict[str | None, _Handler] = {
    **dict.fromkeys(
        "p article main header footer nav aside address center figure figcaption details form fieldset "
        "legend dl dt dd li hgroup search menu tbody thead tfoot tr td th caption body".split(),
        _block,
    ),
    **dict.fromkeys(("div", "section"), _division),
    **dict.fromkeys(
        "button svg style script iframe frame object embed applet canvas video audio source track noscript template "
        "select option textarea datalist progress meter map area head title meta link base param noembed noframes".split(),
        _skip,
    ),
    **dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), _heading),
    **dict.fromkeys(("strong", "b"), _emphasis("strong")),
    **dict.fromkeys(("em", "i"), _emphasis("em")),
    **dict.fromkeys(("del", "s", "strike"), _emphasis("del")),
    **dict.fromkeys(("code", "tt", "samp"), _code),
    **{tag: _html_tag(tag) for tag in ("sup", "sub", "kbd")},
    "ul": _list,
    "ol": _list,
    "pre": _pre,
    "blockquote": _quote,
    "table": _table,
    "a": _link,
    "img": _image,
    "input": _input,
    "br": _line_break,
    "hr": _rule,
    "span": _span,
    "math": _math,
    "summary": _summary,
}
