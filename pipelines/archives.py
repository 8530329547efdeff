"""The files in a zip archive, one after another in a spool. Nothing is written under a name from the archive."""

import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipelines.encodings import READ_BYTES, BrokenText
from pipelines.unpack import MIN_BUDGET_BYTES, Plain, Spool
from schemas.errors import InputError

MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
MAX_MEMBERS = 100_000
_MAX_INDEX_BYTES = 64 << 20
"""The index is held in memory, some ten times as large: a larger one is a bomb of names."""


class BadArchive(Exception):
    """An archive without an index that can be read."""


class Member(NamedTuple):
    """A file of an archive: `name` is a path with forward slashes that stays inside."""

    name: str
    plain: Plain


def members(
    path: Path, spool_path: Path, *, max_ratio: int, is_wanted: Callable[[str], bool]
) -> tuple[Iterator[Member], list[str]]:
    """The wanted files in the order of their names, each unpacked when it is asked for, and the names of the others.

    All together they may unpack to max(64 MiB, max_ratio x the archive). Raises BadArchive, InputError.
    """
    archive = _open(path)
    named = _named(archive, path)
    wanted = {name: info for name, info in named.items() if is_wanted(name)}
    budget = max(MIN_BUDGET_BYTES, max_ratio * path.stat().st_size)
    return _unpacked(archive, path, wanted, spool_path, budget), [
        name for name in named if name not in wanted
    ]


def _open(path: Path) -> zipfile.ZipFile:
    try:
        _check_index(path)
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise BadArchive(str(error)) from None


def _check_index(path: Path) -> None:
    """Before the index is read: how large it says it is, at the end of the file."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - (66 << 10)))
        tail = file.read()
    at, at64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    num_bytes = int.from_bytes(tail[at + 12 : at + 16], "little") if at >= 0 else 0
    if num_bytes == 0xFFFFFFFF and at64 >= 0:
        num_bytes = int.from_bytes(tail[at64 + 40 : at64 + 48], "little")
    if num_bytes > _MAX_INDEX_BYTES:
        raise InputError(
            f"{path} has an index of {num_bytes} bytes, at most {_MAX_INDEX_BYTES} are read: a bomb?"
        )


def _named(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if len(infos) > MAX_MEMBERS:
        raise InputError(
            f"{path} holds {len(infos)} files, at most {MAX_MEMBERS} are read: unpack it yourself"
        )
    named: dict[str, zipfile.ZipInfo] = {}
    for info in sorted(infos, key=lambda info: info.filename):
        steps = [step for step in info.filename.replace("\\", "/").split("/") if step not in ("", ".", "..")]
        name = "/".join(steps) or "unnamed"
        # Files of one name would mix up their records' numbers.
        copies = (f"#{number}/{name}" for number in range(2, len(infos) + 2))
        named[name if name not in named else next(copy for copy in copies if copy not in named)] = info
    return named


def _unpacked(
    archive: zipfile.ZipFile, path: Path, wanted: dict[str, zipfile.ZipInfo], spool_path: Path, budget: int
) -> Iterator[Member]:
    with archive:
        for number, (name, info) in enumerate(wanted.items()):
            if info.flag_bits & 1:
                raise InputError(f"{path} holds {name}, which is encrypted: unpack it yourself")
            spool = Spool(path, budget)
            target = Path(f"{spool_path}.{number}")
            plain = spool.write(lambda _, info=info: _chunks(archive, info), path, target)  # type: ignore[misc]
            budget -= plain.path.stat().st_size
            yield Member(name, plain)


def _chunks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with archive.open(info) as file:
            while chunk := file.read(READ_BYTES):
                yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise BrokenText(f"the zip data of {info.filename} is broken ({error})") from None


def is_zip(handle: BinaryIO) -> bool:
    """Whether a file begins as a zip archive does."""
    handle.seek(0)
    return handle.read(4) in MAGIC
