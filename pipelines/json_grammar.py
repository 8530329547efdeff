"""The byte patterns that follow JSON without parsing it: members, brackets, and how a record begins.

They are loose about commas and strict about everything that could hide a lost quote or bracket. All are
possessive: no input makes them go back over what they have read. `{"` cannot stand inside an intact string (its
quote is escaped there), so a beginning is never found in text.
"""

import re
import sys
from typing import TypeAlias

Pattern: TypeAlias = re.Pattern[bytes]

MAX_DEPTH = 1024  # orjson refuses deeper nesting
LOOK_AHEAD_BYTES = 1 << 20
LOOK_BEHIND_BYTES = 1024  # more than a line start and a beginning together

# Python 3.10 has no possessive quantifiers: the same matches there, but 64 bytes of memory for each escape in a
# string (measured: 1 GiB for 16 MiB of escapes) and a tenth less speed.
_P = b"+" if sys.version_info >= (3, 11) else b""
_WS = rb"[ \t\r\n]*" + _P
_COMMAS = rb"[ \t\r\n,]*" + _P
_OPEN_STRING = rb'"[^"\\\x00-\x1f]*%b(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*%b)*%b' % (_P, _P, _P)
_STRING = _OPEN_STRING + rb'"'
_VALUE = rb"(?:" + _STRING + rb"|[-+.0-9A-Za-z]+" + _P + rb")"
_KEY = _STRING + _WS + rb":" + _WS
_MEMBERS = rb"(?:%b%b%b(?:,%b|(?=\})))*%b" % (_KEY, _VALUE, _WS, _WS, _P)
_ITEMS = rb"(?:%b%b(?:,%b|(?=\])))*%b" % (_VALUE, _WS, _WS, _P)

# Each takes as many whole members as there are, then a bracket if one follows; the last two numbered groups
# before the end open a bracket, the last one closes.
OBJECT = re.compile(_COMMAS + _MEMBERS + rb"(?:%b(?:(\{)|(\[))|(\}))?" % _KEY)
ARRAY = re.compile(_COMMAS + _ITEMS + rb"(?:(\{)|(\[)|(\]))?")
OPENED: tuple[Pattern, ...] = (OBJECT, OBJECT, ARRAY)
"""By number of the group that opened it: what stands inside the new bracket."""
RECORD = re.compile(_COMMAS + rb"(\{)" + _COMMAS + _MEMBERS + rb"(?:%b(?:(\{)|(\[))|(\}))?" % _KEY)
"""Separators, an object's bracket (group 1), and as OBJECT with groups 2 to 4: flat records in one match."""

SEPARATORS = re.compile(_COMMAS + rb"(?:\xef\xbb\xbf" + _COMMAS + rb")*")
SCALAR = re.compile(_VALUE + rb"(?=[ \t\r\n,\]]|\Z)")
NEXT_BRACKET = re.compile(rb'[^"{}\[\]]*%b(?:%b[^"{}\[\]]*%b)*%b(?:([{\[])|([}\]]))?' % (_P, _STRING, _P, _P))
"""Over strings and everything else to a bracket: group 1 opens, 2 closes, none where data or string ends."""
STRING_REST = re.compile(_OPEN_STRING[1:])

# What may stand between the last whole member and the end of the data while more is to come.
_CUT_STRING = _OPEN_STRING + rb"\\?"
_CUT_OBJECT = re.compile(
    rb"(?:%b%b(?::%b(?:%b%b|%b)?)?|%b)?\Z" % (_STRING, _WS, _WS, _VALUE, _WS, _CUT_STRING, _CUT_STRING)
)
_CUT_ARRAY = re.compile(rb"(?:%b%b|%b)?\Z" % (_VALUE, _WS, _CUT_STRING))

BEGINNING = re.compile(rb'(\{[ \t\r\n]{0,128}"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f]){0,128}")[ \t\r\n]{0,16}:')


def walk(data: bytes, at: int, stack: list[Pattern]) -> tuple[bool, int]:
    """Follow brackets from index `at` until the stack of open ones is empty: (True, index behind the last one).

    (False, index behind the last whole member) where the data ends or surprises; the stack is as it is there.
    """
    while True:
        match = stack[-1].match(data, at)
        assert match is not None  # each pattern matches the empty string
        at, group = match.end(), match.lastindex
        if group is None:
            return False, at
        if group == 3:
            stack.pop()
            if not stack:
                return True, at
        elif len(stack) >= MAX_DEPTH:
            return False, at - 1
        else:
            stack.append(OPENED[group])


def count_brackets(data: bytes, at: int, depth: int) -> tuple[int, int]:
    """(brackets that are open, index behind the last that was found): 0 open where the element has ended.

    Of `depth` open brackets at index `at`, whatever they enclose. It stops before a string that the data cuts.
    """
    while True:
        match = NEXT_BRACKET.match(data, at)
        if match is None or match.lastindex is None:
            return depth, at if match is None else match.end()
        at = match.end()
        depth += 1 if match.lastindex == 1 else -1
        if depth == 0:
            return 0, at


def may_go_on(data: bytes, at: int, stack: list[Pattern]) -> bool:
    """Where `walk` stopped: whether the data only ends there, so that more of it could make sense."""
    return (_CUT_OBJECT if stack and stack[-1] is OBJECT else _CUT_ARRAY).match(data, at) is not None


def is_cut_off(raw: bytes) -> bool:
    """Whether `raw` is the beginning of an object or array that goes on behind its end."""
    if raw[:1] not in (b"{", b"["):
        return False
    stack = [OBJECT if raw[:1] == b"{" else ARRAY]
    closed, at = walk(raw, 1, stack)
    return not closed and may_go_on(raw, at, stack)


def object_end(raw: bytes) -> int | None:
    """Index behind the object that `raw` begins with; None where it is broken or goes on behind the end."""
    closed, at = walk(raw, 1, [OBJECT])
    return at if closed else None


def beginning(data: bytes, at: int) -> bytes | None:
    """How the object at index `at` begins: its line start if it begins a line, bracket, first key."""
    match = BEGINNING.match(data, at)
    if match is None:
        return None
    before = data[max(0, at - 256) : at]
    line_start = len(before.rstrip(b" \t"))
    return (before[line_start - 1 :] if before[:line_start].endswith(b"\n") else b"") + match[1]


def refute(data: bytes, at: int, known: set[bytes]) -> int | None:
    """None when the element at index `at` may be a record; else the index behind what shows that it is not."""
    num_whole, limit = 0, at + LOOK_AHEAD_BYTES
    while True:
        at = end_of(SEPARATORS, data, at)
        if at == len(data) or at > limit:
            return None
        if data[at] == 0x5D:  # ] of the file's array, or of one inside the broken record
            return at + 1 if data[at + 1 : at + 1024].strip() else None
        if data[at] != 0x7B:  # {
            return at + 1
        if num_whole and beginning(data, at) in known:
            return None
        stack = [OBJECT]
        closed, end = walk(data, at + 1, stack)
        if not closed:
            return None if num_whole or may_go_on(data, end, stack) else max(end, at + 1)
        at, num_whole = end, num_whole + 1


def end_of(pattern: Pattern, data: bytes, at: int) -> int:
    """Index behind the match of a pattern that matches the empty string too."""
    match = pattern.match(data, at)
    assert match is not None
    return match.end()
