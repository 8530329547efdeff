"""The elements of a page, read by html.parser, and those that need a closer look: formulas, citations, code."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser


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
SKIPPED = frozenset(
    "button svg script style iframe noscript template object video audio canvas select textarea".split()
)


class TreeBuilder(HTMLParser):
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


def is_citation(element: Element) -> bool:
    if element.attributes.get("data-testid") == "webpage-citation-pill":
        return True
    return element.tag == "a" and any("truncate" in inner.classes for inner in element.walk())


def is_footnote_reference(element: Element) -> bool:
    return element.tag == "sup" and any("data-footnote-ref" in link.attributes for link in element.all("a"))


def table_of(row: Element) -> Element | None:
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
        code = "".join(map(code_text, nodes))
    return named[1] if named else _bar_language(bar), code


def _bar_and_rest(pre: Element) -> tuple[str, str]:
    """Without <code>, a short line before the first button is a bar where something follows."""
    code = code_text(pre)
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
    return element.tag in SKIPPED or element.attributes.get("role") == "button"


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


def code_text(node: Element) -> str:
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
            pieces.append(code_text(child))
    return "".join(pieces)
