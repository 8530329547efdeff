"""Guards before the HTML parser: one linear scan refuses what would take it, or a converter, long."""

import re

from schemas.conversation import Drop

MAX_TAGS = 200_000
"""Tags in an answer, all of them nested as a browser writes them."""
MAX_STRAY_TAGS = 3_000
"""Up to here nesting isn't looked at. A parser's work on stray tags may grow with the square: 120,000 took 11 s."""
MAX_STRAY_BYTES = 64 * 1024
"""The same for attributes: 18,000 in one tag took 1.4 s."""
MAX_COPIES = 300_000
"""Elements that a parser may make by itself: formatting that is open when a block ends is opened again in the next.
1,400 <b> before 1,400 <p>, 20 KB, took 750 MB."""
MAX_TAG_CHARS = 16 * 1024

_TAG = re.compile(
    r"<!--[^<>]*-->|<(/?)([a-zA-Z][^\s/>\"'<]*)((?:\s+[^\s\"'<>/=]+(?:=\"[^\"<]*\")?)*)\s*(/?)>"
)
_FORMATTING_TAG = re.compile(
    r"<(?:a|b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u)(?=[\s/>])", re.IGNORECASE
)
_FORMATTING = frozenset("a b big code em font i nobr s small strike strong tt u".split())
_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
_RAW_TEXT = frozenset(
    "script style textarea title xmp iframe noembed noframes noscript plaintext template".split()
)


def check_limits(html: str, *, max_bytes: int, max_depth: int) -> Drop | None:
    """Refuse, by one linear scan, what would take a parser or converter long.

    An answer with few tags is safe to parse whatever they are. One with many must be nested as browsers write it:
    each tag closed by its own, attributes in double quotes.
    """
    if len(html) > max_bytes or len(html.encode()) > max_bytes:
        return Drop("html_too_large", f"more than {max_bytes} bytes")
    num_tags = html.count("<")
    if num_tags <= MAX_STRAY_TAGS and len(html) <= MAX_STRAY_BYTES:
        if num_tags * num_tags <= 4 * MAX_COPIES:
            return None
        num_formatting = len(_FORMATTING_TAG.findall(html))
        if num_formatting * (num_tags - num_formatting) <= MAX_COPIES:
            return None
    if num_tags > 2 * MAX_TAGS:
        return Drop("html_too_large", f"{num_tags} tags, more than {2 * MAX_TAGS}")
    return _check_nesting(html, max_depth)


def _check_nesting(html: str, max_depth: int) -> Drop | None:
    opened: list[str] = []
    num_tags = num_formatting = num_copies = 0
    for match in _TAG.finditer(html):
        num_tags += 1
        closing, name, attributes, self_closing = match.groups()
        if name is None:  # a comment
            continue
        if len(attributes) > MAX_TAG_CHARS:
            return Drop("html_too_large", f"a tag of {len(attributes)} characters, more than {MAX_TAG_CHARS}")
        if closing:
            if not opened or opened.pop() != name:
                return Drop("html_unparsable", f"large and badly nested: stray </{name[:40]}>")
            num_formatting -= name in _FORMATTING
        elif opened and opened[-1] in _RAW_TEXT:
            return Drop("html_unparsable", f"large, with tags inside <{opened[-1]}>")
        elif name not in _VOID and (not self_closing or name in _FORMATTING):  # <b/> opens: this is no XML
            opened.append(name)
            num_formatting += name in _FORMATTING
            num_copies += num_formatting
            if len(opened) > max_depth:
                return Drop("html_too_deep", f"nested deeper than {max_depth} elements")
            if num_copies > MAX_COPIES:
                return Drop("html_too_large", "too much formatting around blocks")
    if num_tags != html.count("<"):
        return Drop("html_unparsable", f"large, with {html.count('<') - num_tags} malformed tags")
    return None
