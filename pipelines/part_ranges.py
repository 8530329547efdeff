"""Parts: runs of records of one file, cut at borders that hang on content alone.

Where a part ends depends on the bytes of its last record (and on how much came before since the last border), so
records added to or taken from a file change the parts that hold them and leave the others byte-equal.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, NamedTuple, TypeAlias

from pipelines.json_lines import Segment
from schemas.conversation import blake2b_128

Container: TypeAlias = Literal["values", "lines", "parquet"]

_CHUNK_BYTES = 1 << 20
_RECORD_BYTES = 256
"""What a record costs beside its bytes: millions of tiny ones are shared out too."""


class Break(NamedTuple):
    """A span of a part's file that holds no readable record and counts as one, with the reason."""

    start: int
    end: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class PartRange:
    """A run of records of one file of a source; what a worker needs to read them again."""

    source_name: str
    file: str
    """Path inside the source, with forward slashes."""
    path: str
    """Where the bytes are: the file itself, or its spool."""
    container: Container
    start: int
    end: int
    """Bytes [start, end) of `path`; for Parquet, rows."""
    first_record: int
    num_records: int
    digest: str
    """blake2b-128 of the raw bytes of its records, and of its breaks."""
    depth: int = 0
    """How many arrays are open at `start`."""
    breaks: tuple[Break, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Values that JSON can hold."""
        return dataclasses.asdict(self) | {"breaks": [list(item) for item in self.breaks]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PartRange":
        """The inverse of to_json."""
        return cls(**values | {"breaks": tuple(Break(*item) for item in values["breaks"])})


@dataclass(slots=True)
class Draft:
    """The part of a file that is being filled, and those that are full."""

    source_name: str
    file: str
    path: str
    container: Container
    part_bytes: int
    _parts: list[PartRange] = field(default_factory=list)
    _first_record: int = 0
    _num_records: int = 0
    _num_bytes: int = 0
    _depth: int = 0
    _start: int = 0
    _end: int = 0
    _breaks: list[Break] = field(default_factory=list)
    _digest: Any = None

    def add(self, segment: Segment, depth: int, handle: BinaryIO) -> None:
        """Put in the next segment, with `depth` arrays open around it."""
        num_bytes = segment.end - segment.start + _RECORD_BYTES
        if self._num_records and self._num_bytes + num_bytes > 4 * self.part_bytes:
            self._close()
        if not self._num_records:
            self._depth, self._start = depth, segment.start
            self._digest = hashlib.blake2b(digest_size=16)
        record_hash = segment_hash(segment, handle)
        self._digest.update(segment_identity(segment, record_hash))
        if segment.raw is None:
            self._breaks.append(Break(segment.start, segment.end, segment.reason, segment.detail))
        self._end, self._num_records = segment.end, self._num_records + 1
        self._num_bytes += num_bytes
        # A record is a border by its bytes alone, as often as it is long, and at half the size at least: parts of
        # part_bytes on average, few much larger, since it is the large ones that a change mostly falls into.
        is_border = int(record_hash[:16], 16) * self.part_bytes < num_bytes << 65
        if is_border and self._num_bytes * 2 >= self.part_bytes:
            self._close()

    def full(self) -> Iterator[PartRange]:
        """The parts that have become full since the last time."""
        while self._parts:
            yield self._parts.pop(0)

    def finish(self) -> Iterator[PartRange]:
        """All parts that are left."""
        if self._num_records:
            self._close()
        yield from self.full()

    def _close(self) -> None:
        part = PartRange(
            source_name=self.source_name,
            file=self.file,
            path=self.path,
            container=self.container,
            start=self._start,
            end=self._end,
            first_record=self._first_record,
            num_records=self._num_records,
            digest=self._digest.hexdigest(),
            depth=self._depth,
            breaks=tuple(self._breaks),
        )
        self._parts.append(part)
        self._first_record += self._num_records
        self._num_records = self._num_bytes = 0
        self._breaks = []


def segment_identity(segment: Segment, record_hash: str) -> bytes:
    """What a segment adds to the digest of its part: breaks name bytes of the file, so these count too."""
    if segment.raw is not None:
        return record_hash.encode()
    return repr((record_hash, *segment)).encode()


def segment_hash(segment: Segment, handle: BinaryIO) -> str:
    """blake2b_128 of a segment's bytes; those of a break are read for it, however many."""
    if segment.raw is not None:
        return blake2b_128(segment.raw)
    num_left = segment.end - segment.start
    digest = hashlib.blake2b(num_left.to_bytes(8, "little"), digest_size=16)
    handle.seek(segment.start)
    while num_left and (chunk := handle.read(min(num_left, _CHUNK_BYTES))):
        digest.update(chunk)
        num_left -= len(chunk)
    return digest.hexdigest()
