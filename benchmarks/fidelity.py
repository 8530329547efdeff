"""Does our Markdown say what the page said? Every answer of a ShareGPT dump, read twice and compared.

    python benchmarks/fidelity.py sharegpt_html.json.gz
    python benchmarks/fidelity.py sharegpt_html.json.gz --fastchat FOLDER   # beside FastChat's own converter

One reading is the page's (html.parser), one that of its Markdown (markdown-it-py: CommonMark with tables,
strikethrough and footnotes, raw HTML taken as HTML; formulas between dollars where the page has formulas). They are
compared in

    code        blocks: every byte, but for one last line end; their languages
    inline code spans, line ends as blanks
    cells       of each table, row by row
    lists       every item with its place (kind, first number and index of each list around it) and its own text
    headings    level and text
    quotes, rules, footnotes
    links       text and address
    formulas    inline or displayed, and their TeX without white space
    pictures    by the setting that was asked for: address and description, description, or nothing; so citations
    style       which letters and digits are strong, emphasised, struck out, raised or lowered
    text        all of it in order, without white space

Not compared: white space and paragraph borders outside code; U+200B, U+2060, U+FEFF; which formula a dollar sign
means where the page has none; and what no reader takes for the answer: buttons and all in them, icons (svg), scripts,
styles, frames, text for screen readers, code bars (but for the language), KaTeX's other two copies of a formula,
links from a footnote back, numbers of edits between their buttons. Pictures and citations are counted and printed.
"""

import argparse
import gzip
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import html_to_markdown
import markdownify
from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.dollarmath import index as dollarmath
from mdit_py_plugins.footnote import footnote_plugin

sys.path.insert(0, str(Path(__file__).parent.parent))  # also as a script, the packages of this checkout

from pipelines.html import CONVERTERS, convert_answer
from schemas.conversation import Drop
from schemas.pipeline_config import CleanConfig

MAX_DIFFERENT_SHARE = {"html-to-markdown": 0.005, "markdownify": 0.02}
_WHITE_SPACE = re.compile("[\\s\u200b\u2060\ufeff]+")
_UNSAFE = re.compile(r"[\x00-\x20]*(?:javascript|vbscript|data):", re.IGNORECASE)


def differences(page: str, markdown: str, *, images: str = "drop", citations: str = "drop") -> list[str]:
    """One line for each facet in which the Markdown differs from its page; its first word is the facet's name."""
    was = read_page(page, images=images, citations=citations)
    became = read_markdown(markdown, math=bool(was.formulas))
    return list(compare(was, became))


# ------------------------------------------------------------------------------------------------- a reading


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
        letters = _WHITE_SPACE.sub("", text)
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
            self._write(_WHITE_SPACE.sub("", code))

    def formula(self, kind: str, tex: str) -> None:
        tex = _WHITE_SPACE.sub("", tex)
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


# ------------------------------------------------------------------------------------------------- the page


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: "Element | None" = None
    children: list["Element | str"] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def walk(self) -> Iterator["Element"]:
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child.walk()

    def all(self, tag: str) -> list["Element"]:
        return [element for element in self.walk() if element.tag == tag]

    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)


_VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
_P_ENDS_BEFORE = frozenset("p div ul ol pre table blockquote h1 h2 h3 h4 h5 h6 hr section details dl".split())
_SKIPPED = frozenset(
    "button svg script style iframe noscript template object video audio canvas select textarea".split()
)
_STYLES = {"strong": "strong", "b": "strong", "em": "em", "i": "em", "del": "s", "s": "s", "strike": "s",
           "sup": "sup", "sub": "sub", "summary": "strong"}  # fmt: skip


class _TreeBuilder(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.current = Element("root", {})
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _P_ENDS_BEFORE and self.current.tag == "p":
            self._leave("p")
        if tag in ("li", "td", "th", "tr") and self.current.tag == tag:
            self._leave(tag)
        element = Element(tag, {name: value or "" for name, value in attrs}, self.current)
        self.current.children.append(element)
        if tag not in _VOID:
            self.current = element

    def handle_endtag(self, tag: str) -> None:
        self._leave(tag)

    def _leave(self, tag: str) -> None:
        element: Element | None = self.current
        while element is not None and element.tag != tag:
            element = element.parent
        if element is not None and element.parent is not None:
            self.current = element.parent

    def handle_data(self, data: str) -> None:
        if self.current.tag == "pre" and not self.current.children:
            data = data.removeprefix("\n")  # HTML: a new line right behind <pre> is none
        self.current.children.append(data)


def read_page(page: str, *, images: str = "drop", citations: str = "drop") -> Reading:
    root = _TreeBuilder(page).root
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
        if tag in _SKIPPED or "sr-only" in classes or is_edit_counter(element):
            if tag == "button":
                recorder.reading.num_images += len(element.all("img"))
        elif is_formula(element):
            self.formula(*formula_of(element))
        elif "katex-mathml" in classes or "katex-html" in classes:
            pass
        elif is_citation(element):
            self.citation(element)
        elif tag in _STYLES and not _footnote_reference(element):
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
        self.recorder.inline_code(_code_text(element))

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
        label = _WHITE_SPACE.sub("", element.text()).strip("[]")
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
            if _table_of(row) is element:
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
            self.recorder.reading.images.append((_WHITE_SPACE.sub("", alt), _same_address(source)))
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
                    self.recorder.link(_WHITE_SPACE.sub("", name), _same_address(link.attributes["href"]))


def _span(cell: Element, name: str) -> int:
    span = cell.attributes.get(name, "1")
    return max(1, int(span)) if span.isdecimal() else 1


def _skip_covered(texts: list[str], covered: Counter[int]) -> None:
    while covered[len(texts)] > 0:
        covered[len(texts)] -= 1
        texts.append("")


def is_citation(element: Element) -> bool:
    if element.attributes.get("data-testid") == "webpage-citation-pill":
        return True
    return element.tag == "a" and any("truncate" in inner.classes for inner in element.walk())


def _footnote_reference(element: Element) -> bool:
    return element.tag == "sup" and any("data-footnote-ref" in link.attributes for link in element.all("a"))


def _table_of(row: Element) -> Element | None:
    parent = row.parent
    while parent is not None and parent.tag != "table":
        parent = parent.parent
    return parent


def is_formula(element: Element) -> bool:
    if "data-math-source" in element.attributes or element.tag == "math":
        return "data-math-source" in element.attributes or bool(element.all("annotation"))
    if element.attributes.get("data-testid") == "math-block-layout":
        return any(map(is_formula, element.walk()))
    marked = {"katex", "katex-display", "katex-error"} & set(element.classes)
    return bool(marked) and ("katex-error" in marked or bool(element.all("annotation")))


def formula_of(element: Element) -> tuple[str, str]:
    if element.attributes.get("data-testid") == "math-block-layout":
        return "display", formula_of(next(filter(is_formula, element.walk())))[1]
    is_display = "katex-display" in element.classes or element.attributes.get("display") == "block"
    if (tex := element.attributes.get("data-math-source")) is not None:
        is_display |= element.tag == "div" or any(
            "katex-display" in inner.classes for inner in element.walk()
        )
        return ("display" if is_display else "inline"), tex
    source = element if "katex-error" in element.classes else element.all("annotation")[0]
    return ("display" if is_display else "inline"), source.text()


def code_of(pre: Element) -> tuple[str, str]:
    """Language and text of a code block. Text right in the <pre> beside its code: all of it is code."""
    editors = [element for element in pre.walk() if "cm-content" in element.classes]
    codes, inner = [code for code in pre.all("code") if not _within(code, "code", pre)], pre.all("pre")
    beside = any(isinstance(child, str) and child.strip() for child in pre.children)
    nodes = [pre] if beside else editors[:1] or codes or inner[-1:] or [pre]
    classes = " ".join(" ".join(element.classes) for node in nodes for element in (node, *node.walk()))
    named = re.search(r"(?:^|\s)lang(?:uage)?-([^\s`]+)", f"{classes} {' '.join(pre.classes)}")
    if nodes == [pre] and not beside:
        bar, code = _bar_and_rest(pre)
    else:
        bar = "" if beside else "".join(_before(pre, nodes[0]))
        code = "".join(map(_code_text, nodes))
    return named[1] if named else _bar_language(bar), code


def _bar_and_rest(pre: Element) -> tuple[str, str]:
    """Without <code>, a short line before the first button is a bar where something follows."""
    code = _code_text(pre)
    button = next((element for element in pre.walk() if element.tag == "button"), None)
    if button is None:
        return "", code
    bar = "".join(_before(pre, button))
    rest = code.removeprefix(bar)
    return (bar, rest) if len(bar) <= 40 and "\n" not in bar and rest.strip() else ("", code)


def _within(element: Element, tag: str, top: Element) -> bool:
    parent = element.parent
    while parent is not None and parent is not top:
        if parent.tag == tag:
            return True
        parent = parent.parent
    return False


def _is_button(element: Element) -> bool:
    return element.tag in _SKIPPED or element.attributes.get("role") == "button"


def is_edit_counter(element: Element) -> bool:
    """ "2 / 3" between the buttons that lead to the other edits."""
    if element.tag not in ("div", "span") or not re.fullmatch(r"\s*\d{1,4}\s*/\s*\d{1,4}\s*", element.text()):
        return False
    siblings = element.parent.children if element.parent else []
    place = next(i for i, sibling in enumerate(siblings) if sibling is element)
    around = siblings[max(0, place - 1) : place] + siblings[place + 1 : place + 2]
    return any(isinstance(sibling, Element) and sibling.tag == "button" for sibling in around)


_NAMES = {"c++": "cpp", "c#": "csharp", "f#": "fsharp", "plain-text": "text", "objective-c": "objectivec"}


def _bar_language(bar: str) -> str:
    words = " ".join(bar.split())
    name = words.lower().replace(" ", "-")
    return _NAMES.get(name, name) if re.fullmatch(r"(?=.*[A-Za-z])[\w+#./ -]{1,40}", words) else ""


def _before(element: Element, stop: Element) -> Iterator[str]:
    for child in element.children:
        if child is stop:
            return
        if isinstance(child, str):
            yield child
        elif not _is_button(child):
            yield from _before(child, stop)
            if stop in list(child.walk()):
                return


def _code_text(node: Element) -> str:
    pieces: list[str] = []
    for number, child in enumerate(node.children):
        if isinstance(child, str):
            pieces.append(child)
        elif child.tag == "br":
            is_last_of_line = "cm-line" in node.classes and number == len(node.children) - 1
            pieces.append("" if is_last_of_line else "\n")
        elif not _is_button(child):
            if "cm-line" in child.classes and pieces:
                pieces.append("\n")
            pieces.append(_code_text(child))
    return "".join(pieces)


def _same_address(href: str) -> str:
    """As the Markdown reader writes addresses: percent signs where they must stand."""
    return MarkdownIt().normalizeLink(href.strip().replace("\n", "").replace("\t", ""))


# ------------------------------------------------------------------------------------------------- the Markdown


def _is_escaped(state: StateInline, place: int, mod: int = 0) -> bool:
    """As in the plugin, which looks for back-slashes at the text's end where a dollar sign is its first character."""
    before = state.src[: max(0, place)]
    return (len(before) - len(before.rstrip("\\"))) % 2 != mod


dollarmath.is_escaped = _is_escaped


def _reader(math: bool) -> MarkdownIt:
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).use(footnote_plugin)
    reader.validateLink = lambda url: True  # type: ignore[method-assign]
    if math:
        reader.use(
            dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=True, double_inline=True
        )
    return reader


_READERS = {math: _reader(math) for math in (False, True)}


def read_markdown(markdown: str, *, math: bool) -> Reading:
    recorder = Recorder()
    tokens = _READERS[math].parse(markdown)
    opened: list[str] = []
    for token in tokens:
        if token.type == "inline":
            _read_inline(token.children or [], recorder)
        elif token.type.endswith("_open"):
            opened.append(token.type)
            _open_block(token, recorder)
        elif token.type.endswith("_close"):
            _close_block(token, recorder)
        else:
            _read_leaf(token, recorder)
    return recorder.finish()


def _open_block(token: Token, recorder: Recorder) -> None:
    if token.type in ("bullet_list_open", "ordered_list_open"):
        start = token.attrGet("start")
        recorder.open_list(token.tag, 1 if start is None else int(start))
    elif token.type == "list_item_open":
        recorder.open_item()
    elif token.type == "table_open":
        recorder.open_table()
    elif token.type == "tr_open":
        recorder.open_row()
    elif token.type in ("heading_open", "blockquote_open", "td_open", "th_open", "footnote_open"):
        recorder.open()


def _close_block(token: Token, recorder: Recorder) -> None:
    reading = recorder.reading
    if token.type in ("bullet_list_close", "ordered_list_close"):
        recorder.close_list()
    elif token.type == "list_item_close":
        recorder.close_item()
    elif token.type == "table_close":
        recorder.close_table()
    elif token.type in ("td_close", "th_close"):
        recorder.add_cell(recorder.close())
    elif token.type == "heading_close":
        if text := recorder.close():
            reading.headings.append((token.tag, text))
    elif token.type == "blockquote_close":
        if text := recorder.close():
            reading.quotes.append(text)
    elif token.type == "footnote_close":
        reading.footnotes.append(recorder.close())


def _read_leaf(token: Token, recorder: Recorder) -> None:
    if token.type in ("fence", "code_block"):
        recorder.code(token.info.strip(), token.content)
    elif token.type == "hr":
        recorder.reading.rules += 1
    elif token.type == "math_block":
        recorder.formula("display", token.content)


_INLINE_STYLES = {"strong": "strong", "em": "em", "s": "s"}


def _read_inline(tokens: list[Token], recorder: Recorder) -> None:
    hrefs: list[str] = []
    for token in tokens:
        kind = token.type.removesuffix("_open").removesuffix("_close")
        if token.type == "text":
            recorder.text(token.content)
        elif token.type == "code_inline":
            recorder.inline_code(token.content)
        elif token.type in ("math_inline", "math_inline_double"):
            recorder.formula("inline" if token.type == "math_inline" else "display", token.content)
        elif kind in _INLINE_STYLES:
            _style(recorder, _INLINE_STYLES[kind], opens=token.type.endswith("_open"))
        elif token.type == "html_inline" and (tag := re.fullmatch(r"<(/?)(su[bp])>", token.content)):
            _style(recorder, tag[2], opens=not tag[1])
        elif token.type == "link_open":
            hrefs.append(str(token.attrGet("href")))
            recorder.open()
        elif token.type == "link_close":
            recorder.link(recorder.close(), hrefs.pop())
        elif token.type == "image":
            description = _WHITE_SPACE.sub("", token.content)
            recorder.reading.images.append((re.sub(r"\\(?=\W)", "", description), str(token.attrGet("src"))))
        elif token.type == "footnote_ref":
            recorder.reading.footnotes.append(f"ref {token.meta.get('label')}")


def _style(recorder: Recorder, style: str, *, opens: bool) -> None:
    if opens:
        recorder.styles.append(style)
    elif style in recorder.styles:
        recorder.styles.remove(style)


# ------------------------------------------------------------------------------------------------- the table

Writer: TypeAlias = Callable[[str], str]


def ours(converter: str) -> Writer:
    def write(page: str) -> str:
        converted = convert_answer(page, CleanConfig(converter=converter))  # type: ignore[arg-type]
        return (
            f"DROPPED {converted.reason} {converted.detail}"
            if isinstance(converted, Drop)
            else converted.markdown
        )

    return write


def writers(fastchat: Path | None) -> dict[str, Writer]:
    found: dict[str, Writer] = {f"{name} behind our pre-pass": ours(name) for name in CONVERTERS}
    found["markdownify alone"] = lambda page: markdownify.markdownify(page)
    found["html-to-markdown alone"] = lambda page: html_to_markdown.convert(page).content or ""
    if fastchat is not None:
        sys.path.append(str(fastchat))
        from fastchat.data.clean_sharegpt import html_to_markdown as convert  # type: ignore[import-not-found]

        found["FastChat"] = convert
    return found


def answers_of(path: Path) -> dict[str, str]:
    """Answers by place: id#turn."""
    raw = path.read_bytes()
    chats = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    return {
        f"{chat['id']}#{number}": turn["value"]
        for chat in chats
        for number, turn in enumerate(chat["conversations"])
        if turn["from"] not in ("human", "user")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dump", type=Path)
    parser.add_argument("--fastchat", type=Path, help="folder into which `pip install --target` put fschat")
    parser.add_argument("--show", type=int, default=10, help="differences to print for each of ours")
    arguments = parser.parse_args()
    answers = answers_of(arguments.dump)
    pages = [read_page(page) for page in answers.values()]
    counts = f"{sum(p.num_images for p in pages)} pictures, {sum(p.num_citations for p in pages)} citations"
    packages = ("markdown-it-py", "mdit-py-plugins", "html-to-markdown", "markdownify", "selectolax")
    print(
        f"{len(answers)} answers with {counts}; " + ", ".join(f"{name} {version(name)}" for name in packages)
    )
    for name, write in writers(arguments.fastchat).items():
        start = time.process_time()
        written = {place: write(page) for place, page in answers.items()}
        seconds = time.process_time() - start
        found = {p: d for p, page in answers.items() if (d := differences(page, written[p]))}
        facets = Counter(difference.split(":")[0] for lines in found.values() for difference in lines)
        share = 1 - len(found) / len(answers)
        print(f"{name}: {share:.2%} without a difference, {len(found)} with, {seconds:.1f} s; {dict(facets)}")
        if "pre-pass" in name:
            for place, lines in list(found.items())[: arguments.show]:
                print(f"  {place}", *lines, sep="\n    ")


if __name__ == "__main__":
    main()
