"""What a killed run leaves half-written: found, spoiled, and watched, so that nobody can read it unseen."""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_ACCESS, IN_OPEN = 0x1, 0x20
_EVENT = struct.Struct("iIII")


def leftovers(run_root: Path) -> list[Path]:
    """All files and folders that were never to be read again, deepest first."""
    found = [path for path in run_root.rglob("*") if _is_temporary(path.relative_to(run_root))]
    return sorted(found, reverse=True)


def _is_temporary(path: Path) -> bool:
    return any(part.startswith(".tmp-") or part == ".spool" for part in path.parts)


def poison(run_root: Path) -> list[Path]:
    """Overwrite every left file with garbage, every other one cut to half its length; the files."""
    files = [path for path in leftovers(run_root) if path.is_file()]
    for number, path in enumerate(files):
        num_bytes = max(path.stat().st_size, 16)
        path.write_bytes(b"\xa5" * (num_bytes // (1 + number % 2)))
    return files


class Watch:
    """Which of some files were opened or read by anyone, as the kernel tells."""

    def __init__(self, descriptor: int, path_by_watch: dict[int, Path]) -> None:
        self._descriptor = descriptor
        self._path_by_watch = path_by_watch

    def opened(self) -> set[Path]:
        """All so far."""
        found = set()
        while data := self._read():
            while data:
                watch, mask, _, num_bytes = _EVENT.unpack_from(data)
                if mask & (IN_ACCESS | IN_OPEN):
                    found.add(self._path_by_watch[watch])
                data = data[_EVENT.size + num_bytes :]
        return found

    def _read(self) -> bytes:
        try:
            return os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return b""


@contextmanager
def watched(paths: list[Path]) -> Iterator[Watch]:
    """Watch files by inotify until the block ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    try:
        watches = {
            libc.inotify_add_watch(descriptor, os.fsencode(path), IN_ACCESS | IN_OPEN): path for path in paths
        }
        assert all(watch >= 0 for watch in watches), os.strerror(ctypes.get_errno())
        yield Watch(descriptor, watches)
    finally:
        os.close(descriptor)
