"""HTML answers of ChatGPT pages -> Markdown: guard, parse, read the tree, convert, check that no letter was lost.

`looks_like_page(text)` decides for one answer whether it is HTML; `convert_answer(html, config)` gives Markdown or
a Drop. Markup that the converters get wrong never reaches them: see html_tree.py and html_marks.py.

Markdown here is what ChatGPT itself writes: ATX headings, "-" bullets, back-tick fences, `$...$` formulas. A literal
"<" in prose stays bare, since chat renderers show raw HTML as text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import html_to_markdown
from selectolax.lexbor import LexborHTMLParser, LexborNode

from pipelines.html_limits import MAX_STRAY_BYTES, MAX_STRAY_TAGS, check_limits
from pipelines.html_marks import Fragments, Marks, Passage, choose_marks
from pipelines.html_page import TooDeepError, TooLargeError
from pipelines.html_tree import MAX_GROWTH, answer_roots, read_answer
from schemas.conversation import Drop
from schemas.pipeline_config import CleanConfig


@dataclass(frozen=True, slots=True)
class Converted:
    markdown: str
    is_unfinished: bool


_COUNTER = re.compile(r">\s*\d{1,4}\s*/\s*\d{1,4}\s*<")


class _UnfaithfulError(Exception):
    """A converter lost, added or moved text."""


def convert_answer(html: str, config: CleanConfig) -> Converted | Drop:
    """One HTML answer as Markdown without outer white space.

    Drops: html_too_large, html_too_deep, html_unparsable (the text didn't come through whole, or a library failed).
    """
    drop = check_limits(html, max_bytes=config.max_message_bytes, max_depth=config.max_depth)
    if drop is not None:
        return drop
    try:
        body = LexborHTMLParser(html).body
        if body is None:
            return Converted("", is_unfinished=False)
        marks = choose_marks(html)
        counters = "<button" in html and _COUNTER.search(html) is not None
        passage, fragments = read_answer(body, marks, config, has_counters=counters)
        markdown = _markdown(passage, fragments, config)
    except TooLargeError as error:
        return Drop("html_too_large", str(error))
    except (TooDeepError, RecursionError):
        return Drop("html_too_deep", f"nested deeper than {config.max_depth} elements")
    except BaseException as error:  # a Rust panic is no Exception; anything else is raised again
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        return Drop("html_unparsable", f"{type(error).__name__}: {error}"[:500])
    return Converted(markdown, is_unfinished=_is_unfinished(body))


# ------------------------------------------------------------------------------------------------- what is HTML

_BLOCK_TAG = re.compile(
    r"<(div|p|pre|ol|ul|h[1-6]|blockquote|table|section|article|details|hr)(\s[^<>]*)?>", re.I
)
_ANSWER_CLASS = re.compile(
    r"""class=["'][^"']*(?<![\w-])(?:markdown(?![\w-])|result-(?:streaming|thinking)(?![\w-])|request-:)"""
    r"""|\sdata-(?:message-author-role=["']assistant["']|markdown-text-style=)"""
)
_SOURCE_CODE = re.compile(
    r"<(?:!doctype|html|head|body|script|style|link|meta|form|nav|header|footer|template)\b|\n[ \t]+<|```|"
    r"\s(?:class|id|style|on[a-z]+)=(?![\"'](?:language-|hljs|katex|task-list|contains-task-list))",
    re.IGNORECASE,
)


def looks_like_page(text: str) -> bool:
    """Whether an answer as a whole is a piece of a ChatGPT page.

    It must begin with the opening tag of a block element and end with ">". Then one of two must hold:
    1. the first tag, or one in the next 2,500 characters after a leading <div>, <article> or <section>, has the
       class of an answer (the word `markdown`, `result-streaming` or `result-thinking`, or `request-:...`, which
       error boxes have too) or its attribute (`data-message-author-role="assistant"`, `data-markdown-text-style`);
    2. all of it is bare rendered text: no attributes such as class, id, style (but for code and formulas), no page
       elements (html, head, script, form, nav, ...), no indented tags, no code fences, no text between its blocks.
    An answer in Markdown that merely holds HTML, in fences or out of them, and an answer that is the source of a
    page, fail both.
    """
    stripped = text.strip()
    if not stripped.startswith("<") or not stripped.endswith(">"):
        return False
    first = _BLOCK_TAG.match(stripped)
    if first is None:
        return False
    reach = 2_500 if first[1].lower() in ("div", "article", "section") else first.end()
    if _ANSWER_CLASS.search(stripped[:reach]):
        return True
    return not _SOURCE_CODE.search(stripped) and _has_only_blocks(stripped)


def _has_only_blocks(html: str) -> bool:
    if check_limits(html, max_bytes=MAX_STRAY_BYTES, max_depth=MAX_STRAY_TAGS) is not None:
        return False
    body = LexborHTMLParser(html).body
    if body is None:
        return False
    nodes = list(body.iter(include_text=True))
    return all(
        not (node.text_content or "").strip() if node.is_text_node else _BLOCK_TAG.match(f"<{node.tag}>")
        for node in nodes
    )


def _is_unfinished(body: LexborNode) -> bool:
    """Whether the page says that the answer was still being written, or shows an error in its place."""
    classes = {word for root in answer_roots(body) for word in (root.attrs.get("class") or "").split()}
    return not classes.isdisjoint(("result-streaming", "result-thinking")) or _is_error_box(body)


def _is_error_box(body: LexborNode) -> bool:
    classes = [(child.attrs.get("class") or "").split() for child in body.iter()]
    return len(classes) == 1 and "text-red-500" in classes[0] and "markdown" not in classes[0]


# ------------------------------------------------------------------------------------------------- conversion

# All options of a choice as the library's own objects: names are looked up again at every call, 0.1 ms each time.
_HTML_TO_MARKDOWN = html_to_markdown.ConversionOptions(
    heading_style=html_to_markdown.HeadingStyle.ATX,
    list_indent_type=html_to_markdown.ListIndentType.SPACES,
    bullets="-",
    autolinks=False,
    highlight_style=html_to_markdown.HighlightStyle.DOUBLE_EQUAL,
    extract_metadata=False,
    whitespace_mode=html_to_markdown.WhitespaceMode.NORMALIZED,
    newline_style=html_to_markdown.NewlineStyle.SPACES,
    code_block_style=html_to_markdown.CodeBlockStyle.BACKTICKS,
    inline_data_media=html_to_markdown.InlineDataMedia.KEEP,
    hidden_content=html_to_markdown.HiddenContent.DROP,
    url_escape_style=html_to_markdown.UrlEscapeStyle.ANGLE,
    link_style=html_to_markdown.LinkStyle.INLINE,
    output_format=html_to_markdown.OutputFormat.MARKDOWN,
    tier_strategy=html_to_markdown.TierStrategy.AUTO,
    compact_tables=True,
    br_in_tables=True,
)


def _with_html_to_markdown(html: str) -> str:
    result = html_to_markdown.convert(html, _HTML_TO_MARKDOWN)
    # Past its depth limit the library leaves text out and says so only here.
    if result.warnings:
        raise _UnfaithfulError(f"html-to-markdown warns: {result.warnings[0]}")
    return result.content or ""


def _with_markdownify(html: str) -> str:
    import markdownify  # a tenth of a second, with all that it brings

    return markdownify.markdownify(
        html,
        heading_style="ATX",
        bullets="-",
        escape_asterisks=False,
        escape_underscores=False,
        escape_misc=False,
    )


CONVERTERS: dict[str, Callable[[str], str]] = {
    "html-to-markdown": _with_html_to_markdown,
    "markdownify": _with_markdownify,
}

_LIST_MARKERS = re.compile(r"^ *(?:(?:[-*+]|\d{1,9}[.)])(?: +|$))+", re.MULTILINE)
_MARKUP = bytes(code for code in range(128) if not chr(code).isalnum())


def _markdown(answer: Passage, fragments: Fragments, config: CleanConfig) -> str:
    converter = CONVERTERS[config.converter]
    max_chars = MAX_GROWTH * config.max_message_bytes

    def convert(passage: Passage) -> str:
        markdown = converter(passage.html).strip("\n ")
        _check_conservation(passage.visible, markdown, fragments.marks)
        restored = fragments.restore(markdown, convert)
        if len(restored) > max_chars:
            raise TooLargeError(f"its Markdown is longer than {max_chars} characters")
        return restored

    return convert(answer).strip()


def _check_conservation(visible: str, markdown: str, marks: Marks) -> None:
    """Letters, digits and all other characters outside ASCII come out as they went in. Raises _UnfaithfulError."""
    expected = marks.structure.sub("", visible).encode().translate(None, _MARKUP)
    found = _LIST_MARKERS.sub("", markdown).replace(marks.cell_break, "").encode().translate(None, _MARKUP)
    if expected != found:
        shorter = min(len(expected), len(found))
        place = next((i for i in range(shorter) if expected[i] != found[i]), shorter)
        before, after = (text[place : place + 60].decode(errors="replace") for text in (expected, found))
        raise _UnfaithfulError(f"the converter changed the text: {before!r} became {after!r}")
