"""Reads an answer as its page shows it."""

import re
from collections import Counter
from dataclasses import dataclass, field

from markdown_it import MarkdownIt

from benchmarks.fidelity_elements import (
    SKIPPED,
    Element,
    TreeBuilder,
    code_of,
    code_text,
    formula_of,
    is_citation,
    is_edit_counter,
    is_footnote_reference,
    is_formula,
    table_of,
)
from benchmarks.fidelity_reading import WHITE_SPACE, Reading, Recorder

_UNSAFE = re.compile(r"[\x00-\x20]*(?:javascript|vbscript|data):", re.IGNORECASE)
_STYLES = {"strong": "strong", "b": "strong", "em": "em", "i": "em", "del": "s", "s": "s", "strike": "s",
           "sup": "sup", "sub": "sub", "summary": "strong"}  # fmt: skip


def read_page(page: str, *, images: str = "drop", citations: str = "drop") -> Reading:
    root = TreeBuilder(page).root
    reader = _PageReader(images, citations)
    for answer in _answers(root) or [root]:
        reader.children(answer)
    return reader.recorder.finish()


def _answers(element: Element) -> list[Element]:
    if "markdown" in element.classes or "data-markdown-text-style" in element.attributes:
        return [element]
    return [found for child in element.children if isinstance(child, Element) for found in _answers(child)]


@dataclass
class _PageReader:
    images: str
    citations: str
    recorder: Recorder = field(default_factory=Recorder)

    def children(self, element: Element) -> None:
        for child in element.children:
            if isinstance(child, str):
                self.recorder.text(child)
            else:
                self.element(child)

    def element(self, element: Element) -> None:
        tag, classes, recorder = element.tag, element.classes, self.recorder
        if tag in SKIPPED or "sr-only" in classes or is_edit_counter(element):
            if tag == "button":
                recorder.reading.num_images += len(element.all("img"))
        elif is_formula(element):
            self.formula(*formula_of(element))
        elif "katex-mathml" in classes or "katex-html" in classes:
            pass
        elif is_citation(element):
            self.citation(element)
        elif tag in _STYLES and not is_footnote_reference(element):
            recorder.styles.append(_STYLES[tag])
            self.children(element)
            recorder.styles.pop()
        elif handler := getattr(self, f"on_{'heading' if re.fullmatch('h[1-6]', tag) else tag}", None):
            handler(element)
        else:
            self.children(element)

    def formula(self, kind: str, tex: str) -> None:
        if re.search(r"(?<!\\)(?:\\\\)*\\$", tex.strip()):  # half a formula, which KaTeX shows as text
            self.recorder.text(tex)
        else:
            self.recorder.formula(kind, tex)

    def on_pre(self, element: Element) -> None:
        self.recorder.code(*code_of(element))

    def on_code(self, element: Element) -> None:
        self.recorder.inline_code(code_text(element))

    def on_heading(self, element: Element) -> None:
        self.recorder.open()
        self.children(element)
        text = self.recorder.close()
        if text and not self.recorder.in_table:
            self.recorder.reading.headings.append((element.tag, text))

    def on_blockquote(self, element: Element) -> None:
        self.recorder.open()
        self.children(element)
        text = self.recorder.close()
        if text and not self.recorder.in_table:
            self.recorder.reading.quotes.append(text)

    def on_hr(self, element: Element) -> None:
        self.recorder.reading.rules += not self.recorder.in_table

    def on_ul(self, element: Element) -> None:
        if element.parent and "footnotes" in element.parent.classes:
            self.footnotes(element)
        elif self.recorder.in_table:
            self.list_in_cell(element)
        else:
            start = element.attributes.get("start", "1")
            first = int(start) if element.tag == "ol" and re.fullmatch(r"\d{1,9}", start) else 1
            self.recorder.open_list(element.tag, first)
            self.items(element)
            self.recorder.close_list()

    on_ol = on_ul

    def items(self, element: Element) -> None:
        last = -1
        for child in element.children:
            if isinstance(child, str):
                if child.strip():
                    self.recorder.text(child)
            elif child.tag == "li" or last < 0:
                last = self.recorder.num_items
                self.recorder.open_item()
                (self.children if child.tag == "li" else self.element)(child)
                self.recorder.close_item()
            else:
                self.recorder.back_to_item(last)
                self.element(child)
                self.recorder.close_item()

    def list_in_cell(self, element: Element) -> None:
        start = element.attributes.get("start", "1")
        first = int(start) if re.fullmatch(r"\d{1,9}", start) else 1
        items = [child for child in element.children if isinstance(child, Element) and child.tag == "li"]
        for number, child in enumerate(items, start=first):
            self.recorder.text(f"{number}." if element.tag == "ol" else "-")
            self.children(child)

    def footnotes(self, element: Element) -> None:
        for item in element.all("li"):
            self.recorder.open()
            self.children(item)
            self.recorder.reading.footnotes.append(self.recorder.close())

    def on_sup(self, element: Element) -> None:
        label = WHITE_SPACE.sub("", element.text()).strip("[]")
        self.recorder.reading.footnotes.append(f"ref {label}")

    def on_table(self, element: Element) -> None:
        if self.recorder.in_table:
            self.children(element)
            return
        for caption in element.all("caption"):
            self.children(caption)
        self.recorder.open_table()
        covered: Counter[int] = Counter()  # rows that a cell from above still covers, by column
        for row in element.all("tr"):
            if table_of(row) is element:
                self.cells(row, self.recorder.open_row(), covered)
        self.recorder.close_table()

    def cells(self, row: Element, texts: list[str], covered: Counter[int]) -> None:
        for cell in row.children:
            if isinstance(cell, Element) and cell.tag in ("td", "th"):
                _skip_covered(texts, covered)
                self.recorder.open()
                self.children(cell)
                texts.append(self.recorder.close())
                first = len(texts) - 1
                texts += [""] * (_span(cell, "colspan") - 1)
                covered.update(dict.fromkeys(range(first, len(texts)), _span(cell, "rowspan") - 1))
        _skip_covered(texts, covered)

    def on_a(self, element: Element) -> None:
        if "data-footnote-backref" in element.attributes:
            return
        self.recorder.open()
        self.children(element)
        text, href = self.recorder.close(), element.attributes.get("href", "").strip()
        if text and href and not _UNSAFE.match(href):
            self.recorder.link(text, _same_address(href))

    def on_img(self, element: Element) -> None:
        self.recorder.reading.num_images += 1
        source, alt = element.attributes.get("src", "").strip(), element.attributes.get("alt", "").strip()
        if 0 < len(alt) <= 8 and not re.search(r"[\w\x00-\xff]", alt):  # an emoji drawn as a picture
            self.recorder.text(alt)
            return
        alt_is_url = bool(re.match(r"(?:https?:)?//\S+$", alt, re.IGNORECASE))
        if not re.match(r"(?:https?:)?//\S+$", source, re.IGNORECASE):
            source = alt if alt_is_url else ""
        alt = "" if alt_is_url else alt
        if self.images == "keep" and source:
            self.recorder.reading.images.append((WHITE_SPACE.sub("", alt), _same_address(source)))
        elif self.images in ("keep", "alt"):
            self.recorder.text(alt)

    def on_input(self, element: Element) -> None:
        if element.attributes.get("type", "").lower() == "checkbox":
            self.recorder.text("[x]" if "checked" in element.attributes else "[ ]")

    def citation(self, element: Element) -> None:
        self.recorder.reading.num_citations += 1
        if self.citations == "keep":
            for link in [element, *element.walk()]:
                name = next((found.text() for found in link.walk() if "truncate" in found.classes), "")
                if link.tag == "a" and link.attributes.get("href"):
                    self.recorder.text(name)
                    self.recorder.link(WHITE_SPACE.sub("", name), _same_address(link.attributes["href"]))


def _span(cell: Element, name: str) -> int:
    span = cell.attributes.get(name, "1")
    return max(1, int(span)) if span.isdecimal() else 1


def _skip_covered(texts: list[str], covered: Counter[int]) -> None:
    while covered[len(texts)] > 0:
        covered[len(texts)] -= 1
        texts.append("")


def _same_address(href: str) -> str:
    """As the Markdown reader writes addresses: percent signs where they must stand."""
    return MarkdownIt().normalizeLink(href.strip().replace("\n", "").replace("\t", ""))
