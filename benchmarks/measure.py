"""Commands, timed: seconds by the clock, CPU seconds and peak memory of the process and of all that it starts."""

import ctypes
import os
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Cost:
    """`peak_mib` is the largest sum of PSS over the process tree, read every 50 ms; 0 where it wasn't watched."""

    seconds: float
    cpu_seconds: float
    peak_mib: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.peak_mib, other.peak_mib),
        )


def run_measured(
    command: Sequence[str], *, watch: bool = True, environment: dict[str, str] | None = None
) -> Cost:
    """Run to the end. Watching memory costs some CPU of its own, which is not counted in `cpu_seconds`."""
    adopt_orphans()
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    log = Path(f"/tmp/benchmark-{time.time_ns()}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        peak = watch_memory(psutil.Process(process.pid)) if watch else 0
        code = process.wait()
    seconds = time.monotonic() - started
    wait_for_orphans()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code != 0:
        raise SystemExit(f"failed ({code}, {log}): {' '.join(command)}\n{log.read_text()[-2000:]}")
    log.unlink()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, cpu, peak / MIB)


def adopt_orphans() -> None:
    """What a command leaves behind (a fork server and the CPU time of its children) becomes our child: Linux alone."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def wait_for_orphans() -> None:
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def watch_memory(process: psutil.Process) -> int:
    peak = 0
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        peak = max(peak, tree_pss(process))
        time.sleep(0.05)
    return peak


def tree_pss(process: psutil.Process) -> int:
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0  # a member ended while being read; the next look sees the rest
    return total
