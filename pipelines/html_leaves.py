"""Leaves of a ChatGPT answer: code blocks, formulas, links, pictures. Node in, Markdown or its parts out."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from selectolax.lexbor import LexborNode

from pipelines.markdown import fenced_code

_LANGUAGE_CLASS = re.compile(r"(?:^|\s)lang(?:uage)?-([^\s`]+)")
MAX_BAR_CHARS = 40
_LANGUAGE_TEXT = re.compile(r"[\w+#./ -]{1,40}")
_LANGUAGE_NAMES = {
    "c++": "cpp",
    "c#": "csharp",
    "f#": "fsharp",
    "plain-text": "text",
    "objective-c": "objectivec",
}
_NOT_CODE = frozenset(("button", "svg", "style", "script"))
_UNSAFE_SCHEMES = ("javascript:", "data:", "vbscript:")
_URL = re.compile(r"(?:https?:)?//\S+$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CodeBlock:
    code: str
    language: str

    def markdown(self) -> str:
        return fenced_code(self.code, self.language)


def has_class(node: LexborNode | None, word: str) -> bool:
    """Whether a word stands in the class attribute: pages differ in the order and number of class names."""
    return node is not None and word in (node.attrs.get("class") or "").split()


# ------------------------------------------------------------------------------------------------- code


def code_block(pre: LexborNode) -> CodeBlock:
    """Code and language of a <pre>, without its header bar and buttons.

    The language is the class `language-...` of the code, else the words of the bar. Text that stands directly in the
    <pre> means that it has no bar: all of it is code.
    """
    code = None if _has_own_text(pre) else _code_node(pre)
    if code is not None:
        language = _class_language(code) or _class_language(pre) or _bar_language(pre, code)
        return CodeBlock(_code_text(code), language)
    return _below_its_button(pre) or CodeBlock(_code_text(pre), _class_language(pre))


def _has_own_text(pre: LexborNode) -> bool:
    return any(
        child.is_text_node and (child.text_content or "").strip() for child in pre.iter(include_text=True)
    )


def _code_node(pre: LexborNode) -> LexborNode | None:
    editor = pre.css_first(".cm-content")
    if editor is not None:
        return editor
    codes = pre.css("code")
    if not codes:
        return _innermost_pre(pre)
    outermost = [code for code in codes if not _is_inside(code, "code", pre)]
    return outermost[0] if len(outermost) == 1 else _shared_parent(outermost, pre)


def _is_inside(node: LexborNode, tag: str, top: LexborNode) -> bool:
    parent = node.parent
    while parent is not None and parent.mem_id != top.mem_id:
        if parent.tag == tag:
            return True
        parent = parent.parent
    return False


def _shared_parent(codes: list[LexborNode], pre: LexborNode) -> LexborNode | None:
    """The element that holds the <code> of every line; None where that is the whole <pre>."""
    parent = codes[0].parent
    while parent is not None and parent.mem_id != pre.mem_id:
        if len(parent.css("code")) >= len(pre.css("code")):
            return parent
        parent = parent.parent
    return None


def _innermost_pre(pre: LexborNode) -> LexborNode | None:
    nested = pre.css("pre pre")
    return nested[-1] if nested else None


def _below_its_button(pre: LexborNode) -> CodeBlock | None:
    """A block without <code>: its bar is the largest element of one short line around its first button."""
    node, bar = None if _has_own_text(pre) else pre.css_first("button"), None
    while node is not None and node.mem_id != pre.mem_id and _is_short("".join(_code_pieces(node))):
        bar, node = node, node.parent
    if bar is None:
        return None
    before = "".join(_text_before(pre, bar.mem_id)[0])
    code = "".join(_code_pieces(pre, skip=bar.mem_id)).removeprefix(before)
    if not code.strip() or not _is_short(before):
        return None
    return CodeBlock(code, _class_language(pre) or _language_name(before + "".join(_code_pieces(bar))))


def _is_short(text: str) -> bool:
    return len(text.strip()) <= MAX_BAR_CHARS and "\n" not in text.strip()


def _code_text(node: LexborNode) -> str:
    """The text to the byte; <br> is a new line, and so is the end of a CodeMirror line."""
    only = node.child
    if only is not None and only.is_text_node and only.next is None:
        return only.text_content or ""
    if node.css_first("br, button, svg, style, script, .cm-line, [role=button]") is None:
        return node.text(deep=True)
    return "".join(_code_pieces(node))


def _code_pieces(node: LexborNode, skip: int = 0) -> Iterator[str]:
    """The text piece by piece, but for the subtree with id `skip`."""
    previous_line = False
    for child in node.iter(include_text=True):
        if child.is_text_node:
            yield child.text_content or ""
        elif child.tag == "br":
            # An empty CodeMirror line is <div class="cm-line"><br></div>: the line's end counts already.
            yield "" if has_class(node, "cm-line") and child.next is None else "\n"
        elif child.tag not in _NOT_CODE and child.mem_id != skip and child.attrs.get("role") != "button":
            is_line = has_class(child, "cm-line")
            yield "\n" if is_line and previous_line else ""
            previous_line = is_line
            yield from _code_pieces(child, skip)


def _class_language(node: LexborNode) -> str:
    found = _LANGUAGE_CLASS.search(node.attrs.get("class") or "")
    return found[1] if found else ""


def _bar_language(pre: LexborNode, code: LexborNode) -> str:
    return _language_name("".join(_text_before(pre, code.mem_id)[0]))


def _language_name(bar: str) -> str:
    words = " ".join(bar.split())
    if not _LANGUAGE_TEXT.fullmatch(words) or not re.search("[A-Za-z]", words):
        return ""
    name = words.lower().replace(" ", "-")
    return _LANGUAGE_NAMES.get(name, name)


def _text_before(node: LexborNode, stop: int) -> tuple[list[str], bool]:
    """Text of a subtree up to the node with id `stop`, and whether that node was met."""
    pieces: list[str] = []
    for child in node.iter(include_text=True):
        if child.is_text_node:
            pieces.append(child.text_content or "")
        elif child.mem_id == stop:
            return pieces, True
        elif child.tag not in _NOT_CODE and child.attrs.get("role") != "button":
            inner, met = _text_before(child, stop)
            pieces += inner
            if met:
                return pieces, True
    return pieces, False


def inline_code_text(node: LexborNode) -> str:
    """Text of <code> in prose, on one line."""
    text = _code_text(node)
    return re.sub(r"[ \t]*[\n\r][ \t]*", " ", text) if "\n" in text or "\r" in text else text


# ------------------------------------------------------------------------------------------------- formulas


def formula(node: LexborNode, class_names: str) -> tuple[str, bool] | None:
    """TeX of a KaTeX or MathML element, and whether it is displayed. None where there is no TeX to be had."""
    is_display = "katex-display" in class_names
    source = node.attrs.get("data-math-source")
    if source is not None:
        tex = source
        is_display = is_display or node.tag == "div" or node.css_first(".katex-display") is not None
    elif "katex-error" in class_names:
        tex = node.text(deep=True)
    else:
        annotation = node.css_first("annotation")
        if annotation is None:
            return None
        tex = annotation.text(deep=True)
    # A blank line ends a paragraph in Markdown, also between dollars.
    tex = re.sub(r"\n[ \t]*(?=\n)", "", tex.strip())
    return (tex, is_display) if tex else None


# ------------------------------------------------------------------------------------------------- links, pictures


def link_target(href: str) -> str:
    """The address to write behind a link's text, as it stands in the page; "" where it runs or embeds something."""
    href = re.sub(r"[\t\n\r]", "", href.strip())
    scheme = re.sub(r"[\x00-\x20\x7f-\x9f\u200b]", "", href).lower()
    if not href or scheme.startswith(_UNSAFE_SCHEMES):
        return ""
    href = href.replace("<", "%3C").replace(">", "%3E").replace("\\", "%5C")
    is_plain = not re.search(r"[\s()]", href) or (not re.search(r"\s", href) and _is_balanced(href))
    return href if is_plain else f"<{href}>"


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return False
    return depth == 0


def is_citation_pill(node: LexborNode) -> bool:
    """A link whose text is the truncated names of its sources, and how many more there are."""
    return node.css_first("span.truncate") is not None


def citation_links(pill: LexborNode) -> list[tuple[str, str]]:
    """Name and address of each source that a pill names with an address."""
    links = [pill] if pill.tag == "a" else pill.css("a")
    found = []
    for link in links:
        truncated = link.css_first(".truncate")
        name = " ".join((truncated or link).text(deep=True).split()).replace("[", "(").replace("]", ")")
        if name and link.attrs.get("href"):
            found.append((name, link.attrs["href"] or ""))
    return found


def is_emoji(alt: str) -> bool:
    """Whether a picture's text is one symbol: some pages draw them as pictures."""
    return 0 < len(alt) <= 8 and all(ord(character) > 0xFF and not character.isalnum() for character in alt)


def footnote_label(node: LexborNode) -> str | None:
    """The label where a <sup> is a reference to a footnote."""
    link = node.css_first("a")
    if link is None:
        return None
    href = link.attrs.get("href") or ""
    if "data-footnote-ref" not in link.attrs and not re.match(r"#(?:user-content-)?fn-?\w", href):
        return None
    label = link.text(deep=True).strip().strip("[]")
    return label if re.fullmatch(r"[\w-]+", label) else None


def image_markdown(node: LexborNode, images: str) -> str:
    """A picture as `clean.images` asks. Saved pages hold dead local paths as src and, often, the URL as alt."""
    if images == "drop":
        return ""
    source, alt = (node.attrs.get("src") or "").strip(), " ".join((node.attrs.get("alt") or "").split())
    alt_is_url = bool(_URL.match(alt))
    if images == "alt":
        return "" if alt_is_url else alt
    target = source if _URL.match(source) else alt if alt_is_url else ""
    if not target:
        return "" if alt_is_url else alt
    description = "" if alt_is_url else alt.replace("[", "\\[").replace("]", "\\]")
    return f"![{description}]({link_target(target)})"
