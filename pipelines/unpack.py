"""Decompresses gzip, Zstandard, bzip2 and xz, decodes other encodings than UTF-8, into a spool file, within a budget of bytes.

What a file is, is told by its first bytes, never by its name.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import zstandard

from pipelines.encodings import READ_BYTES, BrokenText, decoder, find_encoding
from schemas.errors import InputError

MIN_BUDGET_BYTES = 64 << 20  # small files may grow to this whatever their ratio

# A Zstandard block of 4 bytes can hold 128 KiB: 1 KiB of input is at most 32 MiB of output at once.
_ZSTD_READ_BYTES = 1 << 10
_XZ_MEMORY_BYTES = 256 << 20  # xz -9 asks for 65 MiB; a header may ask for 4 GiB
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_FOREIGN = {
    b"7z\xbc\xaf": "a 7z archive",
    b"\x89PNG": "a picture",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
}
# Rows and archives, never text: no encoding is looked for in them.
_BINARY = (b"PAR1", b"ARROW1", b"PK\x03\x04", b"PK\x05\x06", b"\xff\xff\xff\xff")


class Plain(NamedTuple):
    """A file of plain bytes; `damage` says where its compressed data broke off, empty when it did not."""

    path: Path
    damage: str = ""


def unpack(path: Path, spool_path: Path, *, max_ratio: int, encoding: str = "auto") -> Plain:
    """The file itself where it is plain, else a spool of its decompressed, decoded bytes.

    Spools are `spool_path`, and beside it `<spool_path>.utf8` where decompressed text had to be decoded too.
    `encoding` is what the source declares.
    Raises InputError for a file that can't be read, of a foreign kind, or that grows beyond
    max(64 MiB, max_ratio x its size).
    """
    try:
        num_bytes, head = path.stat().st_size, _head(path)
    except PermissionError as error:
        raise InputError(f"{path} can't be opened ({error.strerror}): make it readable") from None
    spool = Spool(path, max(MIN_BUDGET_BYTES, max_ratio * num_bytes))
    plain = Plain(path)
    if (decompress := _decompressor(head)) is not None:
        plain = spool.write(decompress, path, spool_path)
        head = _head(spool_path)
        if _decompressor(head) is not None:
            raise InputError(f"{path} is compressed twice: decompress it once")
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            raise InputError(
                f"{path} holds {kind}; expected JSON, CSV, Parquet, Arrow or text, plain, .gz, .zst, .bz2 or .xz, or a zip of these"
            )
    found = None if head.startswith(_BINARY) else find_encoding(head, encoding)
    if found is None:
        return plain
    target = spool_path if plain.path == path else Path(f"{spool_path}.utf8")
    decoded = spool.write(decoder(found), plain.path, target)
    return Plain(decoded.path, plain.damage or decoded.damage)


class Spool(NamedTuple):
    """Writes what a file unpacks to, and refuses to write more than a budget. Shared by all members of an archive."""

    origin: Path
    budget_bytes: int

    def write(self, convert: Callable[[BinaryIO], Iterator[bytes]], source: Path, target: Path) -> Plain:
        """The chunks that `convert` makes of a file, in `target`. Raises InputError for a bomb."""
        # No fsync: a spool is never trusted by a later run.
        target.parent.mkdir(parents=True, exist_ok=True)
        damage, num_bytes = "", 0
        with source.open("rb") as file, target.open("wb") as spool:
            try:
                for chunk in convert(file):
                    num_bytes += len(chunk)
                    self.check(num_bytes)
                    spool.write(chunk)
            except BrokenText as error:
                damage = str(error)
        return Plain(target, damage)

    def check(self, num_bytes: int) -> None:
        """Raises InputError for more than the budget."""
        if num_bytes > self.budget_bytes:
            raise InputError(
                f"{self.origin} ({self.origin.stat().st_size} bytes) unpacks to more than {self.budget_bytes} "
                "bytes: a bomb? If it is not, raise merge.max_decompressed_ratio or unpack it yourself"
            )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _decompressor(head: bytes) -> Callable[[BinaryIO], Iterator[bytes]] | None:
    return next((chunks for magic, chunks in _DECOMPRESSORS.items() if head.startswith(magic)), None)


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    """Members one after another; zeros behind the first are padding."""
    data = file.read(READ_BYTES)
    while data:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            data = data or file.read(READ_BYTES)
            try:
                # At the end of the file too: output may still be waiting inside.
                chunk = member.decompress(data, 1 << 20)
            except zlib.error as error:
                raise BrokenText(f"the gzip data is broken before its byte {file.tell()} ({error})") from None
            if not data and not chunk:
                raise BrokenText(f"the gzip data ends early, at its byte {file.tell()}")
            yield chunk
            data = member.unconsumed_tail
        data = member.unused_data.lstrip(b"\x00")
        while not data and (more := file.read(READ_BYTES)):
            data = more.lstrip(b"\x00")


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """Frames one after another."""
    data = b""
    while data := (data or file.read(_ZSTD_READ_BYTES)):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if not data and not (data := file.read(_ZSTD_READ_BYTES)):
                raise BrokenText(f"the Zstandard data ends early, at its byte {file.tell()}")
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise BrokenText(
                    f"the Zstandard data is broken before its byte {file.tell()} ({error})"
                ) from None
            data = b""
        data = frame.unused_data


def _in_bites(file: BinaryIO, kind: str, start: Callable[[], Any]) -> Iterator[bytes]:
    """bzip2 and xz: streams one after another; zeros behind the first are padding."""
    data = file.read(READ_BYTES)
    while data:
        stream = start()
        while not stream.eof:
            if stream.needs_input and not data and not (data := file.read(READ_BYTES)):
                raise BrokenText(f"the {kind} data ends early, at its byte {file.tell()}")
            try:
                # What is not needed yet stays inside: no bite becomes more than 1 MiB at once.
                chunk = stream.decompress(data if stream.needs_input else b"", 1 << 20)
            except (OSError, lzma.LZMAError) as error:
                raise BrokenText(
                    f"the {kind} data is broken before its byte {file.tell()} ({error})"
                ) from None
            data = b""
            yield chunk
        data = stream.unused_data.lstrip(b"\x00")
        while not data and (more := file.read(READ_BYTES)):
            data = more.lstrip(b"\x00")


def _unbzip(file: BinaryIO) -> Iterator[bytes]:
    return _in_bites(file, "bzip2", bz2.BZ2Decompressor)


def _unxz(file: BinaryIO) -> Iterator[bytes]:
    return _in_bites(file, "xz", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES))


_DECOMPRESSORS = {_GZIP: _gunzip, _ZSTD: _unzstd, b"BZh": _unbzip, b"\xfd7zXZ\x00": _unxz}
"""By the first bytes."""
