"""Text in other encodings than UTF-8 -> UTF-8, told by its first bytes or by what the source declares.

A byte that is none in a declared encoding becomes a lone surrogate: like every one of these it is repaired, and
counted, in the record that holds it. What is told by its first bytes alone breaks off where it is broken.
"""

import codecs
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

READ_BYTES = 1 << 16

# UTF-32-LE begins as UTF-16-LE does: longer marks first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
# JSON begins with a bracket, so the zeros around it tell what has no mark.
_UNMARKED = {
    b"[\0": "utf-16-le",
    b"{\0": "utf-16-le",
    b"\0[": "utf-16-be",
    b"\0{": "utf-16-be",
}
_UNDECODABLE = "sft-pipeline-undecodable"


class Encoding(NamedTuple):
    """How a text is written: `mark` bytes are skipped, `is_declared` decides what becomes of bytes that are none."""

    name: str
    mark: int = 0
    is_declared: bool = False


class BrokenText(Exception):
    """Text that ends or breaks too early; what came before it has been used."""


def find_encoding(head: bytes, declared: str) -> Encoding | None:
    """The encoding of a text that begins with `head`, None for UTF-8. A byte order mark outdoes what is declared."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return None if name == "utf-8" else Encoding(name, len(mark))
    if declared != "auto":
        return None if declared == "utf-8" else Encoding(declared, is_declared=True)
    name = _UNMARKED.get(head[:2], "")
    return Encoding(name) if name else None


def decoder(encoding: Encoding) -> Callable[[BinaryIO], Iterator[bytes]]:
    """What reads a file in this encoding and gives it as UTF-8. Lone surrogates pass through."""
    return lambda file: _decode(file, encoding)


def _decode(file: BinaryIO, encoding: Encoding) -> Iterator[bytes]:
    errors = _UNDECODABLE if encoding.is_declared else "surrogatepass"
    incremental = codecs.getincrementaldecoder(encoding.name)(errors)
    file.seek(encoding.mark)
    while chunk := file.read(READ_BYTES):
        try:
            yield incremental.decode(chunk).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise BrokenText(
                f"the {encoding.name} text is broken before its byte {file.tell()} ({error.reason})"
            ) from None
    if encoding.is_declared:
        yield incremental.decode(b"", final=True).encode("utf-8", "surrogatepass")
    elif incremental.getstate()[0]:
        raise BrokenText(f"the {encoding.name} text ends inside a character")


def _as_surrogate(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return chr(0xDC00 + error.object[error.start]), error.start + 1


codecs.register_error(_UNDECODABLE, _as_surrogate)
