"""Blocks with a structure of their own: headings, rules, quotes, lists, footnotes, tables."""

import re

from selectolax.lexbor import LexborNode

from pipelines.html_leaves import has_class
from pipelines.html_marks import Fragment, Passage
from pipelines.html_page import (
    Page,
    TooLargeError,
    block,
    block_token,
    end_run,
    inline_token,
    read_text,
    walk,
)

MAX_COLSPAN = 50
"""A page chooses its colspan; a wider cell is not padded further."""
MAX_CELLS = 50_000
"""Cells of a table, with those that pad its rows."""


def read_heading(node: LexborNode, page: Page, depth: int) -> None:
    if has_class(node, "sr-only"):
        return
    end_run(page)
    outer, page.wrap = page.wrap, node.tag or "p"
    walk(node, page, depth)
    end_run(page)
    page.wrap = outer


def read_rule(node: LexborNode, page: Page, depth: int) -> None:
    end_run(page)
    if page.in_cell:
        return
    if page.list_depth:  # "- ---" would be one rule, not an item with a rule in it
        block_token(page, Fragment("***", is_block=True))
    else:
        page.blocks.append("<hr>")


def read_quote(node: LexborNode, page: Page, depth: int) -> None:
    if page.in_cell:
        block(node, page, depth)
        return
    end_run(page)
    passage = _passage(node, page, depth)
    if passage.html:
        block_token(page, Fragment(is_block=True, passage=passage, line_prefix="> "))


def _passage(node: LexborNode, page: Page, depth: int) -> Passage:
    """The children of a quote, to be converted apart: converters put what follows a list into the list."""
    outer = page.blocks, page.visible, page.open_tags, page.wrap
    page.blocks, page.visible, page.open_tags, page.wrap, page.bare_block = [], [], [], "p", -1
    walk(node, page, depth)
    end_run(page)
    passage = Passage("".join(page.blocks), "".join(page.visible))
    page.blocks, page.visible, page.open_tags, page.wrap = outer
    page.bare_block = -1
    return passage


# ------------------------------------------------------------------------------------------------- lists


def read_list(node: LexborNode, page: Page, depth: int) -> None:
    end_run(page)
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


def _list_item(child: LexborNode, page: Page, depth: int, *, is_first: bool) -> None:
    """An item, or what stands in a list beside its items, which joins the item before it."""
    if child.tag == "li" or is_first:
        page.blocks.append("<li>")
    else:
        page.blocks.pop()
    if child.is_text_node:
        read_text(child, page)
    else:
        (walk if child.tag == "li" else page.handlers.get(child.tag, walk))(child, page, depth + 1)
    end_run(page)
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


def _list_in_cell(node: LexborNode, page: Page, depth: int, is_ordered: bool, first: int) -> None:
    for number, item in enumerate((child for child in node.iter() if child.tag == "li"), start=first):
        page.run.append(inline_token(page, f"{number}. " if is_ordered else "- "))
        walk(item, page, depth + 1)
        end_run(page)


def _footnotes(node: LexborNode, page: Page, depth: int) -> None:
    for number, item in enumerate((child for child in node.iter() if child.tag == "li"), start=1):
        page.run.append(inline_token(page, f"[^{number}]: "))
        paragraphs = [child for child in item.iter() if child.tag == "p"]
        for child in paragraphs or [item]:
            walk(child, page, depth + 1)
        end_run(page)


# ------------------------------------------------------------------------------------------------- tables


def read_table(node: LexborNode, page: Page, depth: int) -> None:
    if page.in_cell:
        block(node, page, depth)
        return
    end_run(page)
    outer_visible, page.visible = page.visible, []
    rows = [_cells(row, page, depth) for row in node.css("tr") if _is_row_of(row, node)]
    rows = [row for row in rows if row]
    visible, page.visible = "".join(page.visible), outer_visible
    for caption in (child for child in node.iter() if child.tag == "caption"):
        block(caption, page, depth + 1)
    if rows:
        passage = Passage(_table_html(rows), visible)
        block_token(page, Fragment(is_block=True, passage=passage))


def _is_row_of(row: LexborNode, table: LexborNode) -> bool:
    parent = row.parent
    while parent is not None and parent.tag != "table":
        parent = parent.parent
    return parent is not None and parent.mem_id == table.mem_id


def _cells(row: LexborNode, page: Page, depth: int) -> list[str]:
    cells: list[str] = []
    for cell in (child for child in row.iter() if child.tag in ("td", "th")):
        outer, page.blocks = page.blocks, []
        page.in_cell = True
        walk(cell, page, depth + 3)
        end_run(page)
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
