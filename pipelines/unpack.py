"""Decompresses gzip and Zstandard and decodes UTF-16 and UTF-32 into a spool file, within a budget of bytes.

What a file is, is told by its first bytes, never by its name. Nothing is extracted as an archive.
"""

import codecs
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard

from schemas.errors import InputError

MIN_BUDGET_BYTES = 64 << 20  # small files may grow to this whatever their ratio

_READ_BYTES = 1 << 20
# A Zstandard block of 4 bytes can hold 128 KiB: 1 KiB of input is at most 32 MiB of output at once.
_ZSTD_READ_BYTES = 1 << 10
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf": "a 7z archive",
    b"ARROW1": "an Arrow file",
    b"\x89PNG": "a picture",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
}
# UTF-32-LE begins as UTF-16-LE does: longer marks first.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


class Plain(NamedTuple):
    """A file of plain bytes; `damage` says where its compressed data broke off, empty when it did not."""

    path: Path
    damage: str = ""


class _Damage(Exception):
    """Compressed data that ends or breaks too early; what came before it has been used."""


def unpack(path: Path, spool_path: Path, *, max_ratio: int) -> Plain:
    """The file itself where it is plain, else `spool_path` filled with its decompressed, decoded bytes.

    Raises InputError for a file that can't be read, of a foreign kind, or that grows beyond
    max(64 MiB, max_ratio x its size).
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(0)
            _refuse_foreign(path, head)
            budget = max(MIN_BUDGET_BYTES, max_ratio * path.stat().st_size)
            if head.startswith((_GZIP, _ZSTD)):
                return _spool_compressed(path, file, head, spool_path, budget)
            if (encoding := _encoding(head)) is not None:
                return _spool(path, _decoded(_chunks(file, _READ_BYTES), encoding), spool_path, budget)
    except PermissionError as error:
        raise InputError(f"{path} can't be opened ({error.strerror}): make it readable") from None
    return Plain(path)


def _spool_compressed(path: Path, file: BinaryIO, head: bytes, spool_path: Path, budget: int) -> Plain:
    inflate = _gunzip(file) if head.startswith(_GZIP) else _unzstd(file)
    first = next(inflate_or_damage := _until_some(inflate), b"")
    if first.startswith((_GZIP, _ZSTD)):
        raise InputError(f"{path} is compressed twice: decompress it once")
    _refuse_foreign(path, first)
    chunks = _chain(first, inflate_or_damage)
    encoding = _encoding(first)
    return _spool(path, chunks if encoding is None else _decoded(chunks, encoding), spool_path, budget)


def _spool(path: Path, chunks: Iterator[bytes], spool_path: Path, budget: int) -> Plain:
    # No fsync: a spool is never trusted by a later run.
    spool_path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes, damage = 0, ""
    with spool_path.open("wb") as spool:
        try:
            for chunk in chunks:
                num_bytes += len(chunk)
                if num_bytes > budget:
                    raise InputError(
                        f"{path} ({path.stat().st_size} bytes) unpacks to more than {budget} bytes: a bomb? "
                        "If it is not, raise merge.max_decompressed_ratio or unpack it yourself"
                    )
                spool.write(chunk)
        except _Damage as error:
            damage = str(error)
    return Plain(spool_path, damage)


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    """Members one after another; zeros behind the last are padding."""
    data = b""
    while data := (data or file.read(_READ_BYTES)):
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if not data and not (data := file.read(_READ_BYTES)):
                raise _Damage(f"the gzip data ends early, at its byte {file.tell()}")
            try:
                yield member.decompress(data, _READ_BYTES)
            except zlib.error as error:
                raise _Damage(f"the gzip data is broken before its byte {file.tell()} ({error})") from None
            data = member.unconsumed_tail
        data = member.unused_data.lstrip(b"\x00")


def _unzstd(file: BinaryIO) -> Iterator[bytes]:
    """Frames one after another."""
    data = b""
    while data := (data or file.read(_ZSTD_READ_BYTES)):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            if not data and not (data := file.read(_ZSTD_READ_BYTES)):
                raise _Damage(f"the Zstandard data ends early, at its byte {file.tell()}")
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise _Damage(f"the Zstandard data is broken before its byte {file.tell()} ({error})") from None
            data = b""
        data = frame.unused_data


def _decoded(chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """As UTF-8. Lone surrogates pass through: they are the business of the one record that holds them."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    is_first = True
    for chunk in chunks:
        text = decoder.decode(chunk)
        yield (text.removeprefix("\ufeff") if is_first else text).encode("utf-8", "surrogatepass")
        is_first = is_first and not text
    if decoder.getstate()[0]:
        raise _Damage(f"the {encoding} text ends inside a character")


def _refuse_foreign(path: Path, head: bytes) -> None:
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            raise InputError(f"{path} is {kind}; expected JSON, JSON Lines or Parquet, plain, .gz or .zst")


def _encoding(head: bytes) -> str | None:
    return next((name for mark, name in _ENCODINGS.items() if head.startswith(mark)), None)


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while chunk := file.read(size):
        yield chunk
