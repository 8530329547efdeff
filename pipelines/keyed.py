"""An object of records, {"id 1": {...}, "id 2": {...}} -> one JSON line a record, with its key as `id`."""

import re
from collections.abc import Iterator
from typing import BinaryIO

from pipelines.encodings import BrokenText
from pipelines.json_grammar import NEXT_BRACKET, OBJECT, end_of, walk
from pipelines.json_lines import Window
from pipelines.tables import BrokenRow, Line

_STRING = rb'"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f]){0,4096}"'
_WS = rb"[ \t\r\n]{0,4096}"
_MEMBER = re.compile(rb"%b,?%b(%b)%b:%b(\{)" % (_WS, _WS, _STRING, _WS, _WS))
_END = re.compile(rb"%b\}%b\Z" % (_WS, _WS))
_WORDS = {
    b'"%b"' % word for word in b"chosen rejected prompt completion mapping chat data meta metadata".split()
}
_LONGEST_MEMBER_BYTES = 32 << 10  # more than a match of _MEMBER can have


def is_keyed(head: bytes, *, is_cut: bool) -> bool:
    """Whether all members of the one object that `head` begins with are objects, under keys that are no words of ours.

    `is_cut`: the object may go on behind the head. Where it is wrong, `container: json` of the source says that such an object is one record.
    """
    if not head.startswith(b"{"):
        return False
    num_members, at, closed = 0, 1, True
    while closed and (member := _MEMBER.match(head, at)):
        if member[1] in _WORDS:
            return False
        num_members += 1
        closed, at = walk(head, member.end(), [OBJECT])
    ends_well = _END.match(head, at) is not None or (is_cut and len(head) - at < _LONGEST_MEMBER_BYTES)
    return num_members >= 2 and (not closed or ends_well)


def keyed_lines(file: BinaryIO, start: int, *, max_record_bytes: int) -> Iterator[Line]:
    """The records in their order. What can't be followed ends them: the rest is one break."""
    window = Window(file, start, file.seek(0, 2))
    at = 1 + len(window.data) - len(window.data.lstrip(b" \t\r\n"))
    while True:
        if len(window.data) - at < _LONGEST_MEMBER_BYTES and not window.complete:
            at -= window.slide(at)
            continue
        member = _MEMBER.match(window.data, at)
        if member is None:
            if not _END.match(window.data, at):
                raise BrokenText(f"the object of records can't be followed from byte {window.base + at} on")
            return
        key, begin = member[1], member.start(2)
        closed, end, begin = _record_end(window, begin, max_record_bytes)
        if not closed:
            detail = f"{end - begin} bytes or more from byte {window.base + begin} on"
            yield BrokenRow(
                window.data[begin : begin + (1 << 16)].decode("utf-8", "replace"), "record_too_large", detail
            )
            raise BrokenText(
                f"the record that begins at byte {window.base + begin} has no end within the limit"
            )
        yield _line(key, window.data[begin:end])
        at = end


def _record_end(window: Window, begin: int, max_record_bytes: int) -> tuple[bool, int, int]:
    """(whether the record ends within the limit, index behind it, its first index); the window may slide."""
    depth, at = 0, begin
    while True:
        match = NEXT_BRACKET.match(window.data, at)
        group = match.lastindex if match is not None else None
        if group is not None:
            assert match is not None
            depth += 1 if group == 1 else -1
            at = match.end()
            if depth == 0:
                return True, at, begin
        elif window.complete or len(window.data) - begin > max_record_bytes:
            return False, len(window.data), begin
        else:
            # A string may be cut at the end of the window: it is looked at again from its beginning.
            at = end_of(NEXT_BRACKET, window.data, at)
            shift = window.slide(begin)
            begin, at = begin - shift, at - shift


def _line(key: bytes, record: bytes) -> bytes:
    # Line breaks stand between tokens only. The record's own `id` comes behind ours and wins.
    flat = record.replace(b"\r", b" ").replace(b"\n", b" ")
    comma = b"" if flat[1:].strip() == b"}" else b","
    return b'{"id":' + key + comma + flat[1:]
