"""Blocks with a structure of their own: headings, rules, quotes, lists, footnotes, tables."""

import re

from selectolax.lexbor import LexborNode

from pipelines.html_leaves import has_class
from pipelines.html_marks import Fragment, Passage
from pipelines.html_page import (
    Handler,
    Page,
    TooLargeError,
    block,
    block_token,
    end_run,
    inline_token,
    read_text,
    walk,
)

MAX_SPAN = 50
"""A page chooses its colspan and rowspan; a larger cell is not padded further."""
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


def _passage(node: LexborNode, page: Page, depth: int, *, read: Handler = walk) -> Passage:
    """What `read` finds in a quote or list, to be converted apart: converters put what follows a list into it."""
    outer = page.blocks, page.visible, page.open_tags, page.wrap
    page.blocks, page.visible, page.open_tags, page.wrap, page.bare_block = [], [], [], "p", -1
    page.list_ends = {}
    read(node, page, depth)
    end_run(page)
    passage = Passage("".join(page.blocks), "".join(page.visible))
    page.blocks, page.visible, page.open_tags, page.wrap = outer
    page.bare_block, page.list_ends = -1, {}
    return passage


# ------------------------------------------------------------------------------------------------- lists


def read_list(node: LexborNode, page: Page, depth: int) -> None:
    end_run(page)
    if page.in_cell:
        _list_in_cell(node, page, depth)
    elif has_class(node.parent, "footnotes"):
        _footnotes(node, page, depth)
    elif _follows_its_kind(node, page):
        _read_apart(node, page, depth)
    else:
        _items(node, page, depth)


def _follows_its_kind(node: LexborNode, page: Page) -> bool:
    """Whether Markdown would take the list for more items of the list before it."""
    return bool(page.blocks) and page.list_ends.get(len(page.blocks)) == node.tag


def _read_apart(node: LexborNode, page: Page, depth: int) -> None:
    others = not page.other_markers
    passage = _passage(node, page, depth, read=_items)
    if passage.html:
        block_token(page, Fragment(is_block=True, passage=passage, other_markers=others))
        _note_list_end(node, page, others=others)


def _items(node: LexborNode, page: Page, depth: int) -> None:
    first = _list_start(node)
    wrap = "" if _is_tight(node) else "p"
    opening = f"<{node.tag}>" if first == 1 else f'<ol start="{first}">'
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
        _note_list_end(node, page, others=False)
    page.wrap = outer_wrap


def _note_list_end(node: LexborNode, page: Page, *, others: bool) -> None:
    page.list_ends = {len(page.blocks): node.tag or ""}
    page.other_markers = others


def _list_item(child: LexborNode, page: Page, depth: int, *, is_first: bool) -> None:
    """An item, or what stands in a list beside its items, which joins the item before it."""
    if child.tag == "li" or is_first:
        page.blocks.append("<li>")
    else:
        page.blocks.pop()
    num_blocks = len(page.blocks)
    if child.is_text_node:
        read_text(child, page)
    else:
        (walk if child.tag == "li" else page.handlers.get(child.tag, walk))(child, page, depth + 1)
    end_run(page)
    if len(page.blocks) == num_blocks and page.blocks[-1] == "<li>":
        token = page.fragments.token(Fragment(is_block=True))  # markdownify leaves empty items out
        page.blocks.append(token)
        page.visible.append(token)
    page.blocks.append("</li>")


def _list_start(node: LexborNode) -> int:
    start = (node.attrs.get("start") if node.tag == "ol" else None) or "1"
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


def _list_in_cell(node: LexborNode, page: Page, depth: int) -> None:
    items = (child for child in node.iter() if child.tag == "li")
    for number, item in enumerate(items, start=_list_start(node)):
        page.run.append(inline_token(page, f"{number}. " if node.tag == "ol" else "- "))
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
    filled: dict[int, int] = {}
    rows = [_cells(row, page, depth, filled) for row in node.css("tr") if _is_row_of(row, node)]
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


def _cells(row: LexborNode, page: Page, depth: int, filled: dict[int, int]) -> list[str]:
    """Cells of a row. `filled` says of each column how many rows a cell from above still covers: those stay empty."""
    cells: list[str] = []
    for cell in (child for child in row.iter() if child.tag in ("td", "th")):
        _skip_filled(cells, filled)
        outer, page.blocks = page.blocks, []
        page.in_cell = True
        walk(cell, page, depth + 3)
        end_run(page)
        page.in_cell = False
        text = page.fragments.marks.cell_break.join(page.blocks)
        page.blocks = outer
        for column in range(_span(cell, "colspan")):
            filled[len(cells)] = _span(cell, "rowspan") - 1
            cells.append("" if column else text)
    _skip_filled(cells, filled)
    return cells


def _skip_filled(cells: list[str], filled: dict[int, int]) -> None:
    while filled.get(len(cells), 0) > 0:
        filled[len(cells)] -= 1
        cells.append("")


def _span(cell: LexborNode, name: str) -> int:
    span = cell.attrs.get(name) or "1"
    return max(1, min(int(span), MAX_SPAN)) if re.fullmatch(r"\d{1,4}", span) else 1


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
