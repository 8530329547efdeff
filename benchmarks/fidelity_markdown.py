"""Reads an answer as a CommonMark reader shows its Markdown."""

import re

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.dollarmath import index as dollarmath
from mdit_py_plugins.footnote import footnote_plugin

from benchmarks.fidelity_reading import WHITE_SPACE, Reading, Recorder


def _is_escaped(state: StateInline, back_pos: int, mod: int = 0) -> bool:
    """As in the plugin, which looks for back-slashes at the text's end where a dollar sign is its first character."""
    before = state.src[: max(0, back_pos)]
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
            description = WHITE_SPACE.sub("", token.content)
            recorder.reading.images.append((re.sub(r"\\(?=\W)", "", description), str(token.attrGet("src"))))
        elif token.type == "footnote_ref":
            recorder.reading.footnotes.append(f"ref {token.meta.get('label')}")


def _style(recorder: Recorder, style: str, *, opens: bool) -> None:
    if opens:
        recorder.styles.append(style)
    elif style in recorder.styles:
        recorder.styles.remove(style)
