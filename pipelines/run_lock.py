"""One run at a time on a run root, and children that end with their parent.

Two locks, both by flock, which the kernel gives up when the last process that has the descriptor is gone, however
it died. The folder's own lock is the one that counts on one machine: the file `run.lock` can be deleted by a user,
and a second run would lock a new file of that name. The file's is the one that network file systems carry to other
machines, and it names the holder. Children inherit both, so a run root is free only when nobody works in it.
"""

import errno
import fcntl
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipelines.disk_errors import disk_errors
from schemas.errors import BusyError
from schemas.run import LOCK_NAME, SPOOL_FOLDER, TEMPORARY_PREFIX

LOCK_FD_VARIABLE = "SFT_PIPELINE_LOCK_FD"
PARENT_FD_VARIABLE = "SFT_PIPELINE_PARENT_FD"
RETRY_SECONDS = 0.1

Lock = tuple[int, ...]
"""Descriptors of a held run root: its folder's, then its lock file's. Inherited, they hold it too."""


@contextmanager
def hold_run_root(run_root: Path, *, wait_seconds: float, flow_run: str = "") -> Iterator[Lock]:
    """Hold the run root, or go on holding it as the child of a run that does; yields the lock for children.

    Raises BusyError naming the holder, when `wait_seconds` were not enough.
    """
    inherited = _inherited_lock(run_root)
    if inherited:
        yield inherited
        return
    with disk_errors(run_root / LOCK_NAME):
        lock = _wait_for_lock(run_root, wait_seconds)
    try:
        with disk_errors(run_root / LOCK_NAME):
            _write_holder(lock, flow_run)
            _remove_leftovers(run_root)
        yield lock
    finally:
        for descriptor in lock:
            os.close(descriptor)


def lock_variables(lock: Lock) -> dict[str, str]:
    """The environment of a child that gets the lock's descriptors: it finds the run root held."""
    return {LOCK_FD_VARIABLE: ",".join(map(str, lock))} if lock else {}


def check_still_held(lock: Lock, run_root: Path) -> None:
    """Raises BusyError when `run_root` is not the folder that was locked: the user removed it under the run."""
    if lock and not _is_at(lock[0], run_root):
        raise BusyError(
            f"{run_root} was deleted or moved while this run worked in it, and may belong to another run now: "
            "run again"
        )


def exit_with_parent() -> None:
    """In a child: end at once when the parent is gone, however it died.

    The parent holds the write end of a pipe and never writes; its end is our end of file. PR_SET_PDEATHSIG
    is the wrong cure: it fires when the thread that forked ends, not the process.
    """
    descriptor = os.environ.get(PARENT_FD_VARIABLE)
    if descriptor is not None:
        threading.Thread(target=_wait_for_end, args=(int(descriptor),), daemon=True).start()


def _wait_for_end(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(1)


def _inherited_lock(run_root: Path) -> Lock:
    """What the parent gave us, if it holds this very folder; the variable alone proves nothing."""
    text = os.environ.get(LOCK_FD_VARIABLE)
    if not text:
        return ()
    lock = tuple(int(number) for number in text.split(","))
    try:
        # For the holder's own descriptor the lock is there already; for any other one it is refused.
        return lock if _is_at(lock[0], run_root) and _flock(lock[0]) else ()
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return ()


def _wait_for_lock(run_root: Path, wait_seconds: float) -> Lock:
    deadline = time.monotonic() + wait_seconds
    while not (lock := _try_lock(run_root)):
        if time.monotonic() >= deadline:
            raise BusyError(
                f"{run_root} is held by another run ({_holder(run_root)}): wait for it, stop it, "
                "or use another run_root"
            )
        time.sleep(RETRY_SECONDS)
    return lock


def _try_lock(run_root: Path) -> Lock:
    """Both descriptors, or () when somebody else has one of the locks."""
    run_root.mkdir(parents=True, exist_ok=True)
    lock_file = run_root / LOCK_NAME
    with ExitStack() as opened:
        folder = _open(run_root, os.O_RDONLY | os.O_DIRECTORY, opened)
        if not _flock(folder):
            return ()
        file = _open(lock_file, os.O_RDWR | os.O_CREAT, opened)
        # Both may have been deleted between open and lock: what is locked must be what others will find.
        if not (_flock(file) and _is_at(folder, run_root) and _is_at(file, lock_file)):
            return ()
        opened.pop_all()
        return folder, file


def _open(path: Path, flags: int, opened: ExitStack) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    opened.callback(os.close, descriptor)
    return descriptor


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(lock: Lock, flow_run: str) -> None:
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    os.ftruncate(lock[1], 0)
    os.pwrite(lock[1], (f"{holder}, flow run {flow_run}" if flow_run else holder).encode() + b"\n", 0)


def _remove_leftovers(run_root: Path) -> None:
    """What a killed run was writing, in all stages: nobody else writes here now."""
    for path in [*run_root.rglob(f"{TEMPORARY_PREFIX}*"), run_root / SPOOL_FOLDER]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _holder(run_root: Path) -> str:
    try:
        text = (run_root / LOCK_NAME).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return f"unknown: its {LOCK_NAME} was deleted"
    return text or "unknown: it has just begun"
