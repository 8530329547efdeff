"""Small pieces of Markdown that several stages need: code fences, code spans, and what must be escaped.

Grammar: CommonMark 0.31 (https://spec.commonmark.org/0.31.2/), tables and strikethrough as in GFM.
"""

import html
import re
from collections.abc import Callable, Iterator

URL = re.compile(r"(?:https?://|www\.)[^\s<>\"'`，。）】」]+")
CODE_SIGN = re.compile(r"[(){}<>=\[\]]")
_FENCE_LINE = re.compile(r"^([ \t>]*)((?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
_FENCE = re.compile("[`~]{3}")
_BACKTICKS = re.compile(r"`+")
_CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.{1,2000}?)(?<!`)\1(?!`)", re.DOTALL)
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_HTML = re.compile(
    r"<(?:[A-Za-z][A-Za-z0-9-]*"
    r"(?:\s+[A-Za-z_:][\w:.-]*(?:\s*=\s*(?:[^\s\"'=<>`]+|'[^']*'|\"[^\"]*\"))?)*\s*/?>"
    r"|/[A-Za-z][A-Za-z0-9-]*\s*>|!--|\?|![A-Za-z]|!\[CDATA\[)"
)
_HTML_BLOCK = re.compile(
    r"^</?(?:address|article|aside|base|basefont|blockquote|body|caption|center|col|colgroup|dd|details|dialog|dir|div"
    r"|dl|dt|fieldset|figcaption|figure|footer|form|frame|frameset|h[1-6]|head|header|hr|html|iframe|legend|li|link"
    r"|main|menu|menuitem|nav|noframes|ol|optgroup|option|p|param|search|section|summary|table|tbody|td|tfoot|th|thead"
    r"|title|tr|track|ul|script|pre|style|textarea)(?=\s|/?>|$)",
    re.IGNORECASE | re.MULTILINE,
)
_AUTOLINK = re.compile(r"<(?:[A-Za-z][A-Za-z0-9+.-]{1,31}:[^\s<>]*|[^\s<>@]+@[^\s<>@]+)>")
_BACKSLASH = re.compile(r"\\(?=[!-/:-@\[-`{-~]|\n|[\ue000-\uf8ff\U000f0000-\U000ffffd])")  # or before a mark
_LINK_LIKE = re.compile(r"!?\[[^\[\]\n]*\](?=[(\[])|^\[[^\[\]\n]*\](?=:)", re.MULTILINE)
_BLOCK_START = re.compile(
    r"^(?:(?P<heading>\#{1,6})(?=\s|$)"
    r"|(?P<bullet>[-+*])(?=\s|$)"
    r"|\d{1,9}(?P<number>[.)])(?=\s|$)"
    r"|(?P<quote>>)"
    r"|(?P<rule>[-=_*])(?=[-=_* ]*$)"
    r"|(?P<fence>```|~~~)"
    r"|(?P<columns>\|(?=[-:| ]*-[-:| ]*$)|[:-](?=[-:| ]*\|[-:| ]*$)))",
    re.MULTILINE,
)


def fenced_blocks(text: str) -> list[tuple[int, int]]:
    """Spans [start, end) of fenced code with its fence lines, inside lists and quotes too.

    A fence that nobody closes runs to the end of the text, as CommonMark says. Indented code is not looked for:
    in chats four spaces are more often a nested list.
    """
    blocks: list[tuple[int, int]] = []
    if "```" not in text and "~~~" not in text:
        return blocks
    opened: re.Match[str] | None = None
    for line in _fence_lines(text):
        if opened is None:
            if line[3][0] == "~" or "`" not in line[4]:
                opened = line
        elif line[3].startswith(opened[3]) and not line[2] and not line[4].strip():
            blocks.append((opened.start(), line.end()))
            opened = None
    if opened is not None:
        blocks.append((opened.start(), len(text)))
    return blocks


def _fence_lines(text: str) -> Iterator[re.Match[str]]:
    """Matches of _FENCE_LINE. Only lines that hold a fence are tried: a fifth of the time."""
    position = 0
    while match := _FENCE.search(text, position):
        line = _FENCE_LINE.match(text, text.rfind("\n", 0, match.start()) + 1)
        if line is not None:
            yield line
        position = text.find("\n", match.end())
        if position < 0:
            return


def map_prose(text: str, function: Callable[[str], str]) -> str:
    """`function` applied to everything outside fenced code."""
    blocks = fenced_blocks(text)
    if not blocks:
        return function(text)
    pieces, position = [], 0
    for start, end in blocks:
        pieces += [function(text[position:start]), text[start:end]]
        position = end
    pieces.append(function(text[position:]))
    return "".join(pieces)


def map_outside_code(text: str, function: Callable[[str], str]) -> str:
    """`function` applied to everything outside fenced code and code spans."""
    if "`" not in text and "~~~" not in text:
        return function(text)
    return map_prose(text, lambda prose: _map_outside_spans(prose, function))


def _map_outside_spans(prose: str, function: Callable[[str], str]) -> str:
    pieces, position = [], 0
    for span in _CODE_SPAN.finditer(prose):
        pieces += [function(prose[position : span.start()]), span[0]]
        position = span.end()
    return "".join([*pieces, function(prose[position:])])


def code_of(text: str) -> str:
    """All fenced code and code spans, each on lines of its own."""
    pieces: list[str] = []
    fences = fenced_blocks(text)
    pieces += [text[start:end] for start, end in fences]
    pieces += [span[0] for span in _CODE_SPAN.finditer(without_fences(text) if fences else text)]
    return "\n".join(pieces)


def without_fences(text: str) -> str:
    """The text without its fenced code."""
    pieces, position = [], 0
    for start, end in fenced_blocks(text):
        pieces.append(text[position:start])
        position = end
    return "".join([*pieces, text[position:]])


def without_code(text: str) -> str:
    """The text without fenced code, and a blank for each code span."""
    text = without_fences(text)
    return _CODE_SPAN.sub(" ", text) if "`" in text else text


def fenced_code(code: str, language: str) -> str:
    """A fenced block whose content is `code` to the byte; one final newline more where it had none."""
    longest = max(map(len, _BACKTICKS.findall(code)), default=0) if "```" in code else 0
    fence = "`" * max(3, 1 + longest)
    end_of_code = "" if code.endswith("\n") or not code else "\n"
    return f"{fence}{language}\n{code}{end_of_code}{fence}"


def code_span(code: str) -> str:
    """Inline code; the delimiter is one that the code does not hold."""
    if "`" not in code and code[0] != " ":
        return f"`{code}`"
    runs = {len(run) for run in _BACKTICKS.findall(code)}
    length = next(n for n in range(1, len(runs) + 2) if n not in runs)
    padded = code[0] == "`" or code[-1] == "`" or (code[0] == code[-1] == " " and code.strip(" ") != "")
    pad = " " if padded else ""
    return f"{'`' * length}{pad}{code}{pad}{'`' * length}"


def positions_to_escape(
    run: str, *, emphasis: str, strikes: str, code: str, line_starts: bool, dollars: bool
) -> set[int]:
    """Places in the text of one paragraph where CommonMark would read a character as markup.

    `emphasis`, `strikes` and `code` are characters that stand in `run` for real emphasis, its struck out kind, and
    real code spans. Lines are separated by "\\n". With `line_starts` false (headings, table cells) no block can begin here. `dollars`: a
    dollar sign may open a formula.
    """
    places: set[int] = set()
    has_emphasis = any(mark in run for mark in emphasis)
    if "*" in run:
        places |= _active_delimiters(run, "*", has_emphasis)
    if "_" in run:
        places |= _active_delimiters(run, "_", False)
    if dollars:
        places |= {place for place, character in enumerate(run) if character == "$"}
    if "~" in run and any(mark in run for mark in strikes):
        places |= {place for place, character in enumerate(run) if character == "~"}
    elif "~~" in run:
        places |= {place for m in re.finditer("~~+", run) for place in range(*m.span())}
    if "`" in run and (run.count("`") > 1 or any(mark in run for mark in code)):
        places |= {place for place, character in enumerate(run) if character == "`"}
    if "<" in run:
        places |= {m.start() for pattern in (_AUTOLINK, _HTML) for m in pattern.finditer(run)}
        places |= {m.start() for m in _HTML_BLOCK.finditer(run)} if line_starts else set()
    if "[" in run:
        places |= {run.index("[", m.start()) for m in _LINK_LIKE.finditer(run)}
    if "\\" in run:
        places |= {m.start() for m in _BACKSLASH.finditer(run)}
    if "&" in run:
        places |= {m.start() for m in _ENTITY.finditer(run) if html.unescape(m[0]) != m[0]}
    if line_starts:
        places |= {m.start(m.lastgroup or 0) for m in _BLOCK_START.finditer(run)}
    elif closing := re.search(r"(?:^|(?<= ))#+$", run):  # a heading may be closed by #
        places.add(closing.start())
    return places


def _active_delimiters(run: str, delimiter: str, has_emphasis: bool) -> set[int]:
    """Places of `delimiter` runs that can open or close emphasis, if any opener has a closer behind it."""
    active: list[range] = []
    opened = paired = False
    for match in re.finditer(re.escape(delimiter) + "+", run):
        before = run[match.start() - 1] if match.start() else " "
        after = run[match.end()] if match.end() < len(run) else " "
        can_open, can_close = _flanking(before, after, delimiter)
        if can_open or can_close:
            active.append(range(*match.span()))
        paired = paired or (opened and can_close)
        opened = opened or can_open
    if not (paired or (has_emphasis and active)):
        return set()
    return {place for places in active for place in places}


def _flanking(before: str, after: str, delimiter: str) -> tuple[bool, bool]:
    """Whether a delimiter run may open and may close emphasis (CommonMark 6.2)."""
    space_before, space_after = before.isspace(), after.isspace()
    mark_before, mark_after = bool(_PUNCTUATION.match(before)), bool(_PUNCTUATION.match(after))
    left = not space_after and (not mark_after or space_before or mark_before)
    right = not space_before and (not mark_before or space_after or mark_after)
    if delimiter == "_":
        return left and (not right or mark_before), right and (not left or mark_after)
    return left, right


def ends_as_code(line: str) -> bool:
    """A brace or semicolon at the end, with a sign of code before it. As one pattern it takes quadratic time."""
    line = line.rstrip()
    return line.endswith(("{", "}", ";")) and CODE_SIGN.search(line, 0, len(line) - 1) is not None
