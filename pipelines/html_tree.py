"""One pass over the parsed tree of a ChatGPT answer: what the model wrote, without the page around it.

`read_answer(body, marks, config)` gives a `Passage` of canonical HTML that every converter reads
alike (p, h1-h6, ul, ol, li, hr, br, strong, em, del; no attributes but <ol start>), and the fragments for its tokens.

Left out: buttons (in any language: by tag), icons, frames, scripts, text for screen readers, edit counters, and, as
the settings say, pictures and citations.
U+200B goes; other blanks (U+00A0, U+3000, ...) stay as they are, converters would fold them.
"""

import re

from selectolax.lexbor import LexborNode

from pipelines.html_blocks import read_heading, read_list, read_quote, read_rule, read_table
from pipelines.html_leaves import (
    citation_links,
    code_block,
    footnote_label,
    formula,
    has_class,
    image_markdown,
    inline_code_text,
    is_citation_pill,
    is_emoji,
    link_target,
)
from pipelines.html_marks import Fragment, Fragments, Marks, Passage
from pipelines.html_page import Handler, Page, block, block_token, close_link, end_run, inline_token, walk
from pipelines.markdown import code_span
from schemas.pipeline_config import CleanConfig

MAX_GROWTH = 4
"""Markdown may be this many times as long as the largest message: deep quotes and lists indent every line."""

_FORMULAS = ".katex, .katex-display, .katex-error, math, [data-math-source]"
_COUNTER = re.compile(r"\s*\d{1,4}\s*/\s*\d{1,4}\s*")
_SCREEN_READER = re.compile(r"(?:^|\s)sr-only(?:\s|$)")
_HIDDEN = re.compile(r"(?:^|\s)(?:sr-only|katex-mathml)(?:\s|$)")


def read_answer(
    body: LexborNode, marks: Marks, config: CleanConfig, *, has_counters: bool = True
) -> tuple[Passage, Fragments]:
    """The canonical form of an answer. Raises TooDeepError, TooLargeError.

    Where the page has elements of class `markdown`, only they are read: around them stands furniture.
    `has_counters`: somewhere in it may stand which of several edits it is.
    """
    max_chars = MAX_GROWTH * config.max_message_bytes
    page = Page(HANDLERS, Fragments(marks), config.images, config.citations, config.max_depth, max_chars)
    page.has_formulas = body.css_first(_FORMULAS) is not None
    page.has_counters = has_counters
    for root in answer_roots(body):
        if root.tag != "body" and _is_plain_text(root):  # shown line by line: the boxes around say so
            _preformatted_prose(root, page)
        else:
            walk(root, page, 1)
            end_run(page)
    return Passage("".join(page.blocks), "".join(page.visible)), page.fragments


def answer_roots(body: LexborNode) -> list[LexborNode]:
    """The `markdown` elements of a page, or the body of a page without any."""
    children = list(body.iter())
    if children and all(map(_is_markdown, children)):
        return children
    known: dict[int, bool] = {}
    found = [
        node
        for node in body.css(".markdown, [data-markdown-text-style]")
        if not _inside_markdown(node.parent, known)
    ]
    return found or [body]


def _is_markdown(node: LexborNode) -> bool:
    return has_class(node, "markdown") or "data-markdown-text-style" in node.attrs


def _inside_markdown(node: LexborNode | None, known: dict[int, bool]) -> bool:
    """Whether `node` or one around it is a root. `known` holds what was found before: pages are deep."""
    passed: list[int] = []
    inside = False
    while node is not None and node.is_element_node:
        if node.mem_id in known:
            inside = known[node.mem_id]
            break
        passed.append(node.mem_id)
        if _is_markdown(node):
            inside = True
            break
        node = node.parent
    known.update(dict.fromkeys(passed, inside))
    return inside


# ------------------------------------------------------------------------------------------------- handlers


def _skip(node: LexborNode, page: Page, depth: int) -> None:
    """Furniture of the page."""


def _division(node: LexborNode, page: Page, depth: int) -> None:
    class_names = node.attrs.get("class") or ""
    if page.has_formulas and (found := _widget_formula(node, class_names)) is not None:
        _formula(*found, page)
        return
    if _SCREEN_READER.search(class_names) or (page.has_counters and _is_edit_counter(node)):
        return
    if "whitespace-pre-wrap" in class_names and all(
        child.is_text_node for child in node.iter(include_text=True)
    ):
        _preformatted_prose(node, page)
    else:
        block(node, page, depth)


def _widget_formula(node: LexborNode, class_names: str) -> tuple[str, bool] | None:
    """A formula with its own source, or the one that a box of controls is about."""
    if "data-math-source" in node.attrs or "katex-display" in class_names:
        return formula(node, class_names)
    if node.attrs.get("data-testid") == "math-block-layout":
        source = node.css_first("[data-math-source], .katex")
        return formula(source, "katex-display") if source is not None else None
    return None


def _is_edit_counter(node: LexborNode) -> bool:
    """Whether an element is "2 / 3" between the buttons that lead to the other edits of a message."""
    return bool(_COUNTER.fullmatch(node.text(deep=True))) and any(
        neighbour is not None and neighbour.tag == "button" for neighbour in (node.prev, node.next)
    )


def _is_plain_text(node: LexborNode) -> bool:
    return all(child.is_text_node for child in node.iter(include_text=True))


def _preformatted_prose(node: LexborNode, page: Page) -> None:
    for paragraph in re.split(r"\n[ \t]*\n\s*", node.text(deep=True)):
        end_run(page)
        page.run.append(paragraph.strip("\n"))
    end_run(page)


def _span(node: LexborNode, page: Page, depth: int) -> None:
    class_names = node.attrs.get("class") or ""
    is_formula = "katex" in class_names or (page.has_formulas and "data-math-source" in node.attrs)
    if is_formula and (found := formula(node, class_names)) is not None:
        _formula(*found, page)
    elif node.attrs.get("data-testid") == "webpage-citation-pill":
        _citation(node, page)
    elif not _HIDDEN.search(class_names) and not (page.has_counters and _is_edit_counter(node)):
        walk(node, page, depth)


def _citation(node: LexborNode, page: Page) -> None:
    if page.citations == "drop":
        return
    for name, href in citation_links(node):
        if target := link_target(href):
            page.run += [" ", inline_token(page, f"[{name}]({target})"), " "]


def _math(node: LexborNode, page: Page, depth: int) -> None:
    found = formula(node, "katex-display" if node.attrs.get("display") == "block" else "katex")
    if found is not None:
        _formula(*found, page)


def _formula(tex: str, is_display: bool, page: Page) -> None:
    if re.search(r"(?<!\\)(?:\\\\)*\\$", tex):  # cut off while being written: its end would hide the dollar
        page.run.append(" ".join(tex.split()))
    elif is_display and not page.in_cell:
        block_token(page, Fragment(f"$$\n{tex}\n$$", is_block=True))
    else:
        fence = "$$" if is_display else "$"
        if page.run and page.run[-1][-1:].isdigit():
            page.run.append(" ")  # readers take a dollar beside a digit for an amount
        page.last_formula = inline_token(page, f"{fence}{' '.join(tex.split())}{fence}")
        page.run.append(page.last_formula)


def _code(node: LexborNode, page: Page, depth: int) -> None:
    if text := inline_code_text(node):
        _append_code_span(text, page)


def _append_code_span(text: str, page: Page) -> None:
    if page.run and page.run[-1].endswith(page.fragments.marks.code_close):
        page.run.append(" ")  # "`a``b`" would be one span
    page.run.append(inline_token(page, code_span(text), is_code=True))


def _pre(node: LexborNode, page: Page, depth: int) -> None:
    block = code_block(node)
    if page.in_cell:
        if block.code.strip():
            _append_code_span(" ".join(block.code.split()), page)
    else:
        block_token(page, Fragment(block.markdown(), is_block=True))


def _emphasis(tag: str) -> Handler:
    def handler(node: LexborNode, page: Page, depth: int) -> None:
        if tag in page.open_tags:
            walk(node, page, depth)
            return
        opener, closer = page.fragments.marks.tags[tag]
        page.run.append(opener)
        page.open_tags.append(tag)
        walk(node, page, depth)
        page.open_tags.pop()
        page.run.append(closer)

    return handler


def _html_tag(tag: str) -> Handler:
    """Elements that Markdown can only write as HTML."""

    def handler(node: LexborNode, page: Page, depth: int) -> None:
        label = footnote_label(node) if tag == "sup" else None
        if label is not None:
            page.run.append(inline_token(page, f"[^{label}]"))
            return
        page.run.append(inline_token(page, f"<{tag}>"))
        walk(node, page, depth)
        page.run.append(inline_token(page, f"</{tag}>"))

    return handler


def _link(node: LexborNode, page: Page, depth: int) -> None:
    if "data-footnote-backref" in node.attrs:
        return
    if is_citation_pill(node):
        _citation(node, page)
        return
    target = "" if page.link else link_target(node.attrs.get("href") or "")
    if not target:
        walk(node, page, depth)
        return
    page.link, page.link_start, page.tags_outside_link = target, len(page.run), len(page.open_tags)
    walk(node, page, depth)
    close_link(page)
    page.link = ""


def _image(node: LexborNode, page: Page, depth: int) -> None:
    alt = (node.attrs.get("alt") or "").strip()
    if is_emoji(alt):
        page.run.append(alt)
    elif text := image_markdown(node, page.images):
        page.run.append(inline_token(page, text) if page.images == "keep" else text)


def _input(node: LexborNode, page: Page, depth: int) -> None:
    if (node.attrs.get("type") or "").lower() == "checkbox":
        page.run += [inline_token(page, "[x]" if "checked" in node.attrs else "[ ]"), " "]


def _line_break(node: LexborNode, page: Page, depth: int) -> None:
    page.run.append("\n")


def _summary(node: LexborNode, page: Page, depth: int) -> None:
    end_run(page)
    _emphasis("strong")(node, page, depth)
    end_run(page)


HANDLERS: dict[str | None, Handler] = {
    **dict.fromkeys(
        "p article main header footer nav aside address center figure figcaption details form fieldset "
        "legend dl dt dd li hgroup search menu tbody thead tfoot tr td th caption body".split(),
        block,
    ),
    **dict.fromkeys(("div", "section"), _division),
    **dict.fromkeys(
        "button svg style script iframe frame object embed applet canvas video audio source track noscript template "
        "select option textarea datalist progress meter map area head title meta link base param noembed noframes".split(),
        _skip,
    ),
    **dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), read_heading),
    **dict.fromkeys(("strong", "b"), _emphasis("strong")),
    **dict.fromkeys(("em", "i"), _emphasis("em")),
    **dict.fromkeys(("del", "s", "strike"), _emphasis("del")),
    **dict.fromkeys(("code", "tt", "samp"), _code),
    **{tag: _html_tag(tag) for tag in ("sup", "sub", "kbd")},
    "ul": read_list,
    "ol": read_list,
    "pre": _pre,
    "blockquote": read_quote,
    "table": read_table,
    "a": _link,
    "img": _image,
    "input": _input,
    "br": _line_break,
    "hr": read_rule,
    "span": _span,
    "math": _math,
    "summary": _summary,
}
