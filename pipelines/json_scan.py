"""Cuts a file of JSON into the bytes of its records, in bounded memory and without parsing them.

Two ways of lying in a file: values (an array, several arrays, or objects one after another, with or without
commas) and lines (JSON Lines). A record is an element of an array, or an object outside of any.
What can't be followed becomes a break: a span of bytes with a reason, which stands for one record.

- A surprise inside an element (a quote or bracket too many or too few): the next record begins at the first
  `{"key":` at or behind the member that surprised, if it begins as an earlier record or the broken one itself
  did (same key; same line start and indentation where records begin lines). Otherwise what follows decides: it
  is taken if the elements from there on lead to the end of the array, to a known beginning, through 1 MiB of
  intact elements, or to another break; one whose row of elements ends inside an outer value was nested.
- An element nested too deep is a break up to its end, if it has one within `max_record_bytes`.
- An element still open at the end of the file or at `max_record_bytes` swallowed its neighbours if a known
  beginning lies inside it: then the break ends there. Otherwise it is cut off, or too large.
- What is no value: a break up to the next record.
- An array inside an array is stepped into where it begins with an object, else it is an element.

Each byte is read a bounded number of times, however broken the file is.
"""

from collections.abc import Iterator
from typing import BinaryIO

from pipelines.json_grammar import (
    ARRAY,
    BEGINNING,
    LOOK_AHEAD_BYTES,
    LOOK_BEHIND_BYTES,
    MAX_DEPTH,
    NEXT_BRACKET,
    OBJECT,
    OPENED,
    RECORD,
    SCALAR,
    SEPARATORS,
    STRING_REST,
    Pattern,
    beginning,
    count_brackets,
    end_of,
    may_go_on,
    refute,
    walk,
)
from pipelines.json_lines import Segment, Window, too_large

_MAX_BEGINNINGS = 32
_MAX_SWALLOWING = 64  # each costs one more walk over max_record_bytes
_MAX_DEEP_BYTES = 4 << 20  # gone over in vain behind elements that are nested too deep and have no end


class ValueScanner:
    """Records of JSON values in bytes [start, end) of a file, with `depth` arrays open at `start`.

    Iterating moves `depth` along: at a segment it says how many arrays are open around it.
    """

    def __init__(
        self,
        file: BinaryIO,
        start: int,
        end: int,
        *,
        depth: int,
        max_record_bytes: int,
    ) -> None:
        self.window = Window(file, start, end)
        self.depth = depth
        self.max_record_bytes = max_record_bytes
        self._at = 0  # index of the first byte that is in no segment yet
        self._known: set[bytes] = set()  # how records began so far
        self._num_whole = 0
        self._num_swallowing = 0
        self._num_deep_bytes_left = _MAX_DEEP_BYTES

    def __iter__(self) -> Iterator[Segment]:
        window = self.window
        while True:
            match = RECORD.match(window.data, self._at)
            if match is None:
                if (at := self._step()) is None:
                    return
                if at >= 0:
                    yield self._not_an_object(at)
            elif match.lastindex == 4:
                yield self._whole(match.start(1), match.end())
            else:
                group = match.lastindex or 0
                stack = [OBJECT] if group == 1 else [OBJECT, OPENED[group - 1]]
                yield self._open(match.start(1), match.end(), stack)

    def _step(self) -> int | None:
        """One step on where no object begins: -1, None at the end, or the index of what is no object."""
        window = self.window
        at = self._at = end_of(SEPARATORS, window.data, self._at)
        following = end_of(SEPARATORS, window.data, at + 1) if at < len(window.data) else at
        if following == len(window.data) and not window.complete:
            self._at -= window.slide(max(0, at - LOOK_BEHIND_BYTES))
            return -1
        if at == len(window.data):
            return None
        byte, next_byte = window.data[at], window.data[following : following + 1]
        if byte == 0x5D and self.depth:  # ]
            self.depth -= 1
        elif byte == 0x5B and (not self.depth or next_byte == b"{"):  # [
            self.depth += 1
        elif byte != 0x7B:  # {
            return at
        else:
            return -1
        self._at += 1
        return -1

    def _not_an_object(self, start: int) -> Segment:
        if not self.depth:
            return self._broken(start, start + 1)
        if self.window.data[start] == 0x5B:  # [
            return self._open(start, start + 1, [ARRAY])
        return self._scalar(start)

    def _open(self, start: int, at: int, stack: list[Pattern]) -> Segment:
        """The element from `start` on, whose brackets in `stack` are open at `at`."""
        window = self.window
        while True:
            closed, at = walk(window.data, at, stack)
            if closed:
                return self._whole(start, at)
            if len(stack) >= MAX_DEPTH:
                return self._too_deep(start, at, len(stack))
            if not may_go_on(window.data, at, stack):
                return self._broken(start, at)
            if window.complete:
                return self._cut_off(start)
            if len(window.data) - start > self.max_record_bytes:
                return self._too_large(start, at, len(stack))
            shift = window.slide(max(0, start - LOOK_BEHIND_BYTES))
            start, at = start - shift, at - shift

    def _too_deep(self, start: int, deep: int, depth: int) -> Segment:
        """Go to the element's end by counting brackets; where it has none within the limit, it is broken."""
        window, at, counted = self.window, deep, 0
        while self._num_deep_bytes_left > 0:
            counted -= at
            depth, at = count_brackets(window.data, at, depth)
            counted += at
            if not depth:
                self._at = at
                detail = f"nested deeper than {MAX_DEPTH} brackets"
                return Segment(window.base + start, window.base + at, None, "invalid_json", detail)
            is_long = len(window.data) - start > self.max_record_bytes
            if window.complete or is_long or counted > self._num_deep_bytes_left:
                break
            shift = window.slide(max(0, start - LOOK_BEHIND_BYTES))
            start, deep, at = start - shift, deep - shift, at - shift
        self._num_deep_bytes_left -= counted
        return self._broken(start, deep)

    def _scalar(self, start: int) -> Segment:
        window = self.window
        while True:
            match = SCALAR.match(window.data, start)
            if match and (match.end() < len(window.data) or window.complete):
                return self._whole(start, match.end())
            is_long = len(window.data) - start > self.max_record_bytes
            if is_long or not may_go_on(window.data, start, []):
                return self._broken(start, start + 1)
            if window.complete:
                return self._cut_off(start)
            start -= window.slide(start)

    def _whole(self, start: int, end: int) -> Segment:
        window, self._at = self.window, end
        self._num_whole += 1
        if self._num_whole < 64 or self._num_whole % 64 == 0:
            self._learn(start)
        if end - start > self.max_record_bytes:
            return too_large(window.base + start, window.base + end, self.max_record_bytes)
        return Segment(window.base + start, window.base + end, window.data[start:end])

    def _learn(self, start: int) -> None:
        if len(self._known) < _MAX_BEGINNINGS:
            self._known |= _as_set(beginning(self.window.data, start))

    def _broken(self, start: int, at: int) -> Segment:
        first, near = self.window.base + start, self.window.base + at
        known = self._known | _as_set(beginning(self.window.data, start))
        end = self._restart(max(at, start + 1), known)
        return Segment(
            first, end, None, "invalid_json", f"the element at byte {first} is broken near byte {near}"
        )

    def _cut_off(self, start: int) -> Segment:
        if (segment := self._swallowing(start)) is not None:
            return segment
        first, self._at = self.window.base + start, len(self.window.data)
        detail = f"the file ends inside the element that begins at byte {first}"
        return Segment(first, self.window.base + self._at, None, "truncated_file", detail)

    def _too_large(self, start: int, at: int, depth: int) -> Segment:
        """Go to the element's end by counting brackets, holding nothing of it."""
        if (segment := self._swallowing(start)) is not None:
            return segment
        first = self.window.base + start
        closed, self._at = self._skip(at, depth)
        end = self.window.base + self._at if closed else self._restart(self._at, self._known)
        return too_large(first, end, self.max_record_bytes)

    def _swallowing(self, start: int) -> Segment | None:
        """The break up to the first known beginning inside the open element, if there is one."""
        data, base = self.window.data, self.window.base
        if self._num_swallowing == _MAX_SWALLOWING:
            return None
        inner = (match.start() for match in BEGINNING.finditer(data, start + 1))
        at = next((at for at in inner if beginning(data, at) in self._known), None)
        if at is None:
            return None
        self._num_swallowing += 1
        self._at = at
        detail = f"the element at byte {base + start} has no end before the next begins at byte {base + at}"
        return Segment(base + start, base + at, None, "invalid_json", detail)

    def _restart(self, at: int, known: set[bytes]) -> int:
        """Go to the next record's beginning at or behind index `at`; returns its byte, or the end of the file."""
        window = self.window
        while True:
            match = BEGINNING.search(window.data, at)
            if match is None:
                if window.complete:
                    self._at = len(window.data)
                    return window.base + self._at
                at = max(0, at - window.slide(max(0, len(window.data) - LOOK_BEHIND_BYTES)))
                continue
            self._at = at = match.start()
            if beginning(window.data, at) in known:
                return window.base + at
            if not window.complete and len(window.data) - at < LOOK_AHEAD_BYTES:
                at -= window.slide(max(0, at - LOOK_BEHIND_BYTES))
            elif (refuted_at := refute(window.data, at, known)) is None:
                return window.base + at
            else:
                at = refuted_at

    def _skip(self, at: int, depth: int) -> tuple[bool, int]:
        """(whether the open brackets were all closed, index behind what was understood); the window slides."""
        window, in_string = self.window, False
        while True:
            if in_string:
                at = end_of(STRING_REST, window.data, at)
                if window.data[at : at + 1] == b'"':
                    in_string, at = False, at + 1
                elif window.complete or window.data[at:] not in (b"", b"\\"):
                    return False, at
                else:
                    at -= window.slide(at)
                continue
            match = NEXT_BRACKET.match(window.data, at)
            at = match.end() if match is not None else at
            if match is not None and match.lastindex is not None:
                depth += 1 if match.lastindex == 1 else -1
                if depth == 0:
                    return True, at
            elif window.data[at : at + 1] == b'"':
                in_string, at = True, at + 1
            elif window.complete:
                return False, at
            else:
                at -= window.slide(at)


def _as_set(value: bytes | None) -> set[bytes]:
    return set() if value is None else {value}
