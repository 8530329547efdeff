"""What somebody reads in an answer, and how two readings differ."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

WHITE_SPACE = re.compile("[\\s\u200b\u2060\ufeff]+")

Place: TypeAlias = tuple[tuple[str, int, int], ...]
"""Of an item: kind and first number of each list around it, and the item's index, from outside in."""


@dataclass
class Reading:
    """What somebody reads in an answer."""

    code: list[tuple[str, str]] = field(default_factory=list)
    inline_code: list[str] = field(default_factory=list)
    cells: list[list[list[str]]] = field(default_factory=list)
    lists: list[tuple[Place, str]] = field(default_factory=list)
    headings: list[tuple[str, str]] = field(default_factory=list)
    quotes: list[str] = field(default_factory=list)
    rules: int = 0
    footnotes: list[str] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)
    formulas: list[tuple[str, str]] = field(default_factory=list)
    images: list[tuple[str, str]] = field(default_factory=list)
    style: list[tuple[str, str]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    num_images: int = 0
    num_citations: int = 0


FACETS = (
    "code inline_code cells lists headings quotes rules footnotes links formulas images style text".split()
)


def compare(was: Reading, became: Reading) -> Iterator[str]:
    for facet in FACETS:
        before, after = getattr(was, facet), getattr(became, facet)
        if before == after:
            continue
        if isinstance(before, int):
            yield f"{facet}: {before} became {after}"
            continue
        pairs = enumerate(zip(before, after, strict=False))
        place = next((i for i, (old, new) in pairs if old != new), min(len(before), len(after)))
        length = 40 if facet in ("text", "style") else 1
        shown = [repr(found[place : place + length])[:300] for found in (before, after)]
        yield f"{facet}: {len(before)} became {len(after)}, at {place}: {shown[0]} became {shown[1]}"


class Recorder:
    """Both readers tell it what they meet, in order; it writes the Reading."""

    def __init__(self) -> None:
        self.reading = Reading()
        self.styles: list[str] = []
        self._sinks: list[list[str]] = []
        self._lists: list[tuple[str, int, int]] = []  # kind, start, number of items so far
        self._items: list[list[str]] = []  # the open ones
        self._own_texts: list[tuple[Place, list[str]]] = []
        self._tables: list[list[list[str]]] = []

    def text(self, text: str) -> None:
        letters = WHITE_SPACE.sub("", text)
        if not letters:
            return
        style = " ".join(sorted(set(self.styles)))
        self.reading.style += [(letter, style) for letter in letters if letter.isalnum()] if style else []
        self._write(letters)

    def _write(self, letters: str) -> None:
        self.reading.text += letters
        for sink in self._sinks:
            sink.append(letters)
        if self._items:
            self._items[-1].append(letters)

    def code(self, language: str, code: str) -> None:
        whole = code if code.endswith("\n") or not code else code + "\n"
        if self._tables:  # a table cell can only hold it as a span
            self.inline_code(" ".join(code.split()))
            return
        self.reading.code.append((language, whole))
        self._write("⟦code⟧")

    def inline_code(self, code: str) -> None:
        code = re.sub(r"[ \t]*\n[ \t]*", " ", code)
        if code:
            self.reading.inline_code.append(code)
            self._write(WHITE_SPACE.sub("", code))

    def formula(self, kind: str, tex: str) -> None:
        tex = WHITE_SPACE.sub("", tex)
        if tex:
            self.reading.formulas.append((kind, tex))
            self._write(f"⟦{tex}⟧")

    def open(self) -> None:
        self._sinks.append([])

    def close(self) -> str:
        return "".join(self._sinks.pop())

    def link(self, text: str, address: str) -> None:
        """Two neighbours with one address are one link: Markdown has no link around several paragraphs."""
        links = self.reading.links
        if links and links[-1][1] == address:
            links[-1] = (links[-1][0] + text, address)
        elif text:
            links.append((text, address))

    def open_list(self, kind: str, start: int) -> None:
        self._lists.append((kind, start, 0))

    def close_list(self) -> None:
        self._lists.pop()

    def open_item(self) -> None:
        kind, start, index = self._lists.pop() if self._lists else ("none", 1, 0)
        self._lists.append((kind, start, index + 1))
        self._items.append([])
        self._own_texts.append((tuple(self._lists), self._items[-1]))

    def close_item(self) -> None:
        self._items.pop()

    def open_table(self) -> None:
        self._tables.append([])

    def open_row(self) -> list[str]:
        self._tables[-1].append([])
        return self._tables[-1][-1]

    def add_cell(self, text: str) -> None:
        self._tables[-1][-1].append(text)

    def close_table(self) -> None:
        rows = [row for row in self._tables.pop() if row]
        width = max(map(len, rows), default=0)
        if rows:
            self.reading.cells.append([row + [""] * (width - len(row)) for row in rows])

    @property
    def in_table(self) -> bool:
        return bool(self._tables)

    def back_to_item(self, number: int) -> None:
        """What stands beside the items of a list belongs to the item before it."""
        self._items.append(self._own_texts[number][1])

    @property
    def num_items(self) -> int:
        return len(self._own_texts)

    def finish(self) -> Reading:
        self.reading.lists = [(place, "".join(own)) for place, own in self._own_texts]
        return self.reading
