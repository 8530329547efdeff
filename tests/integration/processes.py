"""Processes of a test's own, found by a marker in their environment: stopped, killed, counted; no others touched."""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

MARKER = "SFT_TEST_FAMILY"
DYING_SECONDS = 10.0

KINDS: dict[str, Callable[[str], bool]] = {
    "server": lambda command: "prefect server start" in command,
    "worker": lambda command: "prefect worker start" in command,
    "flow": lambda command: "prefect.engine" in command,
    "pool worker": lambda command: "multiprocessing.spawn" in command,
    "trainer": lambda command: "flows/child.py trainer.launch" in command,
}


class Family:
    """All processes that have our marker in their environment, which children inherit."""

    def __init__(self) -> None:
        self.marker = uuid.uuid4().hex
        self.started = time.time()

    @property
    def environment(self) -> dict[str, str]:
        return {MARKER: self.marker}

    def members(self) -> list[psutil.Process]:
        """Those that live, zombies left out."""
        return [process for process in psutil.process_iter() if self._is_member(process)]

    def of_kind(self, kind: str, *, below: psutil.Process | None = None) -> list[psutil.Process]:
        """The living members of a kind: anywhere, or below a process."""
        found = self.members() if below is None else descendants(below)
        return [process for process in found if KINDS[kind](command_line(process))]

    def flow(self, flow_run_id: str) -> psutil.Process | None:
        """The process of a flow run."""
        for process in self.of_kind("flow"):
            if environment_of(process).get("PREFECT__FLOW_RUN_ID") == flow_run_id:
                return process
        return None

    def told(self) -> str:
        return "\n".join(f"{process.pid} {command_line(process)[:160]}" for process in self.members())

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            if process.create_time() < self.started - 1 or process.uids().real != os.getuid():
                return False
            return lives(process) and environment_of(process).get(MARKER) == self.marker
        except psutil.Error:
            return False


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in process.children(recursive=True) if lives(child)]
    except psutil.NoSuchProcess:
        return []


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


def stop(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Freeze them where they are, by SIGSTOP; those that were still there."""
    return [process for process in processes if _signalled(process.suspend)]


def go_on(processes: list[psutil.Process]) -> None:
    for process in processes:
        _signalled(process.resume)


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to all before anything else happens; returns when they are dead, which takes the kernel a moment."""
    for process in processes:
        _signalled(process.kill)
    deadline = time.monotonic() + DYING_SECONDS
    while any(map(lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.01)


def _signalled(send: Callable[[], None]) -> bool:
    try:
        send()
    except psutil.NoSuchProcess:
        return False
    return True


@contextmanager
def ended_after(family: Family) -> Iterator[None]:
    """Whatever of the family is left at the end of the block is killed: a failed test leaves nobody behind."""
    try:
        yield
    finally:
        kill(family.members())
