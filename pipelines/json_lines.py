"""A window that slides over a file, what a scan finds in it, and the scan of JSON Lines."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pipelines.json_grammar import is_cut_off

_CHUNK_BYTES = 1 << 20


class Segment(NamedTuple):
    """One record, or one break: `raw` is then None and `reason` says why. Offsets count bytes of the file."""

    start: int
    end: int
    raw: bytes | None
    reason: str = ""
    detail: str = ""


class Window:
    """The part of a file that is in memory: `data` begins at byte `base`; `complete` when nothing follows it."""

    __slots__ = ("_file", "_num_left", "base", "complete", "data")

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._num_left = file, end - start
        self.base, self.data, self.complete = start, b"", False
        self.slide(0)

    def slide(self, keep: int) -> int:
        """Forget the data before index `keep` and read on; returns by how much indices have become smaller.

        It grows by half of what is kept at least, so a long record is gone over a bounded number of times.
        """
        self._file.seek(self.base + len(self.data))
        chunk = self._file.read(min(max(_CHUNK_BYTES, (len(self.data) - keep) // 2), self._num_left))
        self._num_left -= len(chunk)
        self.data = self.data[keep:] + chunk
        self.base += keep
        self.complete = not chunk or self._num_left == 0
        return keep


class LineScanner:
    """Records of JSON Lines in bytes [start, end) of a file; blank lines are no records.

    `ends_file`: whether a last line without its end may have been cut off.
    """

    depth = 0

    def __init__(
        self, file: BinaryIO, start: int, end: int, *, max_record_bytes: int, ends_file: bool = True
    ) -> None:
        self.window = Window(file, start, end)
        self.max_record_bytes = max_record_bytes
        self.ends_file = ends_file

    def __iter__(self) -> Iterator[Segment]:
        window, at = self.window, 0
        while True:
            end = window.data.find(b"\n", at)
            if end >= 0 or window.complete:
                line = window.data[at : len(window.data) if end < 0 else end]
                if raw := line.strip(b" \t\r\n"):
                    start = window.base + at + len(line) - len(line.lstrip(b" \t\r\n"))
                    yield self._line(start, raw, is_last=end < 0)
                if end < 0:
                    return
                at = end + 1
            elif len(window.data) - at > self.max_record_bytes:
                yield self._too_large(at)
                at = 0
            else:
                at -= window.slide(at)

    def _line(self, start: int, raw: bytes, *, is_last: bool) -> Segment:
        end = start + len(raw)
        if len(raw) > self.max_record_bytes:
            return too_large(start, end, self.max_record_bytes)
        if is_last and self.ends_file and is_cut_off(raw):
            detail = f"the file ends inside the line that begins at byte {start}"
            return Segment(start, end, None, "truncated_file", detail)
        return Segment(start, end, raw)

    def _too_large(self, at: int) -> Segment:
        """Go to the next line without holding this one; the window then begins there."""
        window, start = self.window, self.window.base + at
        while (end := window.data.find(b"\n", at)) < 0 and not window.complete:
            window.slide(len(window.data))
            at = 0
        window.slide(len(window.data) if end < 0 else end + 1)
        return too_large(start, window.base, self.max_record_bytes)


def too_large(start: int, end: int, max_record_bytes: int) -> Segment:
    """The break for a record that is not to be held in memory."""
    detail = f"{end - start} bytes from byte {start} on, merge.max_record_bytes is {max_record_bytes}"
    return Segment(start, end, None, "record_too_large", detail)
