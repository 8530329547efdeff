"""The part of an Arrow stream that can be read without harm, told from its messages before pyarrow sees them.

pyarrow takes a message's word for its size, unpacks a whole batch at once and has no limit: one changed byte asks
for petabytes, a megabyte of Zstandard can be gigabytes of zeros. A message is a flatbuffer (Message.fbs of Apache
Arrow); with compression each buffer of its body begins with the length that it unpacks to.
"""

import io
import struct
from typing import BinaryIO, NamedTuple

from schemas.errors import InputError

MAX_BATCH_BYTES = 1 << 30
_MAX_METADATA_BYTES = 64 << 20
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3  # union MessageHeader
_MAGIC = b"ARROW1\0\0"  # before and behind the stream in a file with an index, which is not used
_CONTINUATION = b"\xff\xff\xff\xff"


class Whole(NamedTuple):
    """Bytes [start, end) hold whole messages; `damage` says why the stream goes no further, if it should."""

    start: int
    end: int
    damage: str


def whole_messages(file: BinaryIO) -> Whole:
    """Follows the messages to the end of the stream. Raises InputError for a batch that would fill the memory."""
    size = file.seek(0, 2)
    file.seek(0)
    start = at = len(_MAGIC) if file.read(len(_MAGIC)) == _MAGIC else 0
    while True:
        try:
            end = _message_end(file, at, size)
        except (struct.error, IndexError, ValueError) as error:
            return Whole(start, at, f"the Arrow data is broken at its byte {at} ({error})")
        if end is None:
            return Whole(start, at, "")
        at = end


def stream_of(file: BinaryIO, whole: Whole) -> BinaryIO:
    """The whole messages as a file of their own."""
    return io.BufferedReader(_Part(file, whole))


class _Part(io.RawIOBase):
    def __init__(self, file: BinaryIO, whole: Whole) -> None:
        self._file, self._num_left = file, whole.end - whole.start
        file.seek(whole.start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        data = self._file.read(min(len(buffer), self._num_left))
        buffer[: len(data)] = data
        self._num_left -= len(data)
        return len(data)


def _message_end(file: BinaryIO, at: int, size: int) -> int | None:
    """The byte behind the message at `at`, None where the stream ends there. ValueError where it is broken."""
    file.seek(at)
    head = file.read(8)
    if not head or head[:8] == _CONTINUATION + bytes(4) or head[:4] == bytes(4):
        return None
    prefix = 8 if head[:4] == _CONTINUATION else 4  # as written before Arrow 0.15
    num_metadata = struct.unpack_from("<I", head, prefix - 4)[0]
    metadata_end = at + prefix + num_metadata
    if num_metadata > _MAX_METADATA_BYTES or metadata_end > size:
        raise ValueError(f"a message of {num_metadata} bytes in a file of {size}")
    file.seek(at + prefix)
    metadata = file.read(num_metadata)
    root = _follow(metadata, 0)
    place = _field(metadata, root, 3)
    num_body = 0 if place is None else struct.unpack_from("<q", metadata, place)[0]
    if not 0 <= num_body <= size - metadata_end:
        raise ValueError(f"a body of {num_body} bytes where {size - metadata_end} are left")
    num_bytes = max(num_body, _unpacked_bytes(file, metadata, metadata_end, num_body))
    if num_bytes > MAX_BATCH_BYTES:
        raise InputError(
            f"the Arrow data has {num_bytes} bytes in the batch at its byte {at}, at most {MAX_BATCH_BYTES} are read "
            "at once: write it in smaller batches"
        )
    return int(metadata_end + num_body)


def _unpacked_bytes(file: BinaryIO, metadata: bytes, body: int, num_body: int) -> int:
    """What the buffers of a compressed batch say that they unpack to; 0 for other messages."""
    batch = _batch_table(metadata)
    if batch is None or _field(metadata, batch, 3) is None:  # no compression
        return 0
    buffers = _field(metadata, batch, 2)
    if buffers is None:
        return 0
    start, num_bytes = _follow(metadata, buffers), 0
    for place in range(struct.unpack_from("<I", metadata, start)[0]):
        offset, length = struct.unpack_from("<qq", metadata, start + 4 + 16 * place)
        if not 0 <= offset <= offset + length <= num_body:
            raise ValueError(f"a buffer at {offset} of {length} bytes in a body of {num_body}")
        if length >= 8:
            file.seek(body + offset)
            num_bytes += max(0, struct.unpack("<q", file.read(8))[0])
    return num_bytes


def _batch_table(metadata: bytes) -> int | None:
    """Where the RecordBatch stands, None in other messages."""
    root = _follow(metadata, 0)
    kind, header = _field(metadata, root, 1), _field(metadata, root, 2)
    if kind is None or header is None:
        return None
    table = _follow(metadata, header)
    if metadata[kind] == _RECORD_BATCH:
        return table
    data = _field(metadata, table, 1) if metadata[kind] == _DICTIONARY_BATCH else None
    return None if data is None else _follow(metadata, data)


def _follow(metadata: bytes, place: int) -> int:
    """The place that an offset points to."""
    return int(place + struct.unpack_from("<I", metadata, place)[0])


def _field(metadata: bytes, table: int, number: int) -> int | None:
    """The place of a table's field, None where it is left out."""
    vtable = table - struct.unpack_from("<i", metadata, table)[0]
    if vtable < 0:
        raise ValueError("a table without a description")
    size = struct.unpack_from("<H", metadata, vtable)[0]
    if 4 + 2 * number >= size:
        return None
    offset = struct.unpack_from("<H", metadata, vtable + 4 + 2 * number)[0]
    return table + offset if offset else None
