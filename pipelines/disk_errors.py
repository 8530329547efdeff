"""What a disk refuses, told on one line: which file, what the trouble is, what to do.

Python's OSError, and the errors of libraries written in Rust, which carry the number in their text alone.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from schemas.errors import StorageError
from schemas.run import TEMPORARY_PREFIX

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_ADVICE = {
    errno.EIO: "the disk is failing or was taken away: look at the kernel's log (dmesg), then run again, on "
    "another disk if need be",
    errno.ENOENT: "another program removes files there: stop it, then run again",
    errno.EFBIG: "the limit of this shell or of the file system is lower: raise it (ulimit -f), then run again",
    errno.EMFILE: "raise the limit of this shell (ulimit -n), then run again",
    errno.ENAMETOOLONG: "choose a shorter run_root, then run again",
}
_RUST = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises StorageError in place of a disk's refusal in this block; it names the file that was refused, or `path`."""
    try:
        yield
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise storage_error(error, str(path)) from error


def is_disk_error(error: Exception) -> bool:
    """Whether the system refused something to do with a file; a broken pipe or connection is none."""
    return number_of(error) is not None and not isinstance(error, ConnectionError)


def number_of(error: Exception) -> int | None:
    """The errno of an error that has one."""
    if isinstance(error, OSError):
        return error.errno
    found = _RUST.search(str(error))
    return int(found[1]) if found else None


def storage_error(error: Exception, place: str, *, num_bytes: int = 0) -> StorageError:
    """`place` is the file that is being written, or what was being done; `num_bytes` of the file were written."""
    number = number_of(error)
    assert number is not None, "is_disk_error"
    where = _refused(error, place)
    return StorageError(f"{where}: {os.strerror(number)}; {_advice(number, Path(where), num_bytes)}")


def _refused(error: Exception, place: str) -> str:
    """The file that the error names, where it is another than `place`; one being written has a name aside."""
    name = getattr(error, "filename", None)
    if not name or isinstance(name, int):
        return place
    path = Path(os.fsdecode(name))
    if not path.is_absolute() and Path(place).is_absolute():
        return place  # rmtree names its files by their last part alone
    is_aside = path.name.startswith(TEMPORARY_PREFIX) and path.name.endswith(f"-{Path(place).name}")
    return place if is_aside else str(path)


def _advice(number: int, path: Path, num_bytes: int) -> str:
    if number in FULL:
        return f"{_room(path, num_bytes)}free some space or move run_root, then run again"
    if number in FORBIDDEN:
        return "make it and its folder writable for this user, then run again"
    return _ADVICE.get(number, "see to it, then run again")


def _room(path: Path, num_bytes: int) -> str:
    """How much is needed and how much is there, as far as it is known."""
    folder = next((folder for folder in (path, *path.parents) if folder.is_dir()), None)
    if folder is None or not path.is_absolute():
        return ""
    disk = os.statvfs(folder)
    needed = f"more than {num_bytes:,} bytes are needed for this file alone, " if num_bytes else ""
    return (
        f"{needed}{disk.f_bavail * disk.f_frsize:,} bytes and {disk.f_favail:,} files are free on its disk: "
    )
