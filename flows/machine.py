"""Checks of `sft-pipeline doctor` on the machine: the interpreter, the disk, its kind of file system, and locks."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # nothing of ours is imported: doctor asks first whether it can be
    from schemas.pipeline_config import PipelineConfig

OLDEST_PYTHON = (3, 10)
WANTED_FREE_GIB = 10
NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "ceph",
    "lustre",
    "glusterfs",
    "fuse.sshfs",
    "fuse.glusterfs",
    "fuse.s3fs",
    "afs",
}

Level = Literal["ok", "warns", "fails"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`fails` stops the pipeline, `warns` does not. Expected and remedy are empty where all is well."""

    level: Level
    subject: str
    found: str
    expected: str = ""
    remedy: str = ""


def check_python() -> Iterator[Finding]:
    """The interpreter is new enough, and not one whose packages other programs share."""
    version = ".".join(map(str, sys.version_info[:3]))
    wanted = f"Python {'.'.join(map(str, OLDEST_PYTHON))} or later"
    if sys.version_info < OLDEST_PYTHON:
        yield Finding("fails", "python", version, wanted, "install one and make the environment anew")
    elif sys.prefix == sys.base_prefix:
        remedy = (
            "install in one (`make install` does): other programs may have packages called trainer or flows"
        )
        yield Finding("warns", "python", f"{version} at {sys.prefix}", "a virtual environment", remedy)
    else:
        yield Finding("ok", "python", f"{version} in {sys.prefix}")


# Disk -------------------------------------------------------------------------------------------------------


def check_disk(folder: Path) -> Iterator[Finding]:
    """Free space where runs would be written, when there is no config to reckon with."""
    place = nearest_existing(folder)
    free = shutil.disk_usage(place).free
    if free >= WANTED_FREE_GIB * 2**30:
        yield Finding("ok", "disk", f"{size_text(free)} free at {place}")
        return
    remedy = "free some, or work elsewhere; `sft-pipeline doctor CONFIG` reckons what a run takes"
    yield Finding(
        "warns", "disk", f"{size_text(free)} free at {place}", f"{WANTED_FREE_GIB} GiB or more", remedy
    )


def check_disk_for(
    config: "PipelineConfig", stages: Sequence[str], *, model: Path | None
) -> Iterator[Finding]:
    """Free space against what the stages will write; fails where even the smallest estimate does not fit."""
    from flows.disk_need import disk_need, total

    place = nearest_existing(config.run_root)
    free, kept_free = shutil.disk_usage(place).free, int(config.engine.min_free_gib * 2**30)
    needs = disk_need(config, stages, model=model)
    need = total(needs)
    expected = (
        f"at least {size_text(max(need.smallest, kept_free))}, up to {size_text(need.largest + kept_free)}: "
        + ", ".join(f"{item.name} {_range_text(item.smallest, item.largest)}" for item in needs)
        + f", kept free {size_text(kept_free)} (engine.min_free_gib)"
    )
    found = f"{size_text(free)} free at {place}"
    remedy = "free some, put run_root on a larger disk, or lower train.keep_checkpoints"
    if free < max(need.smallest, kept_free):
        yield Finding("fails", "disk", found, expected, remedy)
    elif free < need.largest + kept_free:
        yield Finding("warns", "disk", found, expected, remedy)
    else:
        yield Finding("ok", "disk", f"{found}, {size_text(need.largest + kept_free)} are enough")


def size_text(num_bytes: float) -> str:
    """In GiB with two digits, below a tenth of one in MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 / 10 else f"{num_bytes / 2**20:.1f} MiB"


def _range_text(smallest: int, largest: int) -> str:
    low, high = size_text(smallest), size_text(largest)
    return low if low == high else f"{low} to {high}"


# Locks and file systems -------------------------------------------------------------------------------------


def check_lock(folder: Path) -> Iterator[Finding]:
    """A second process can't take a lock that we hold: not so on some network file systems."""
    place = nearest_existing(folder)
    kind = file_system(place)
    if not os.access(place, os.W_OK | os.X_OK) or not place.is_dir():
        yield Finding(
            "fails", "run root", f"{place} can't be written", "a folder of yours", "choose another run_root"
        )
        return
    if not excludes_others(place):
        found = f"{place} ({kind}) does not keep a second process out"
        remedy = "two runs could write at once: put run_root on a local disk"
        yield Finding("fails", "lock", found, "a file system with flock", remedy)
    elif kind in NETWORK_FILE_SYSTEMS:
        remedy = "locks may not hold between machines: run on one machine only, or use a local disk"
        found = f"{place} is on a network file system ({kind})"
        yield Finding("warns", "lock", found, "a local disk", remedy)
    else:
        yield Finding("ok", "lock", f"holds at {place} ({kind})")


_TRY_LOCK = """
import fcntl, os, sys
try:
    fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(0)
sys.exit(1)
"""


def excludes_others(folder: Path) -> bool:
    """Hold a lock on a folder and on a file here, as a run does, and have another process try for each."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".sft-pipeline-lock-") as locked:
        file = Path(locked, "run.lock")
        file.touch()
        return all(_second_process_is_refused(path) for path in (file, Path(locked)))


def _second_process_is_refused(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return subprocess.run([sys.executable, "-c", _TRY_LOCK, str(path)], check=False).returncode == 0
    finally:
        os.close(descriptor)


def file_system(folder: Path, mounts: str | None = None) -> str:
    """Kind of the file system that a folder lies on, as the kernel names it; "unknown" where it says nothing.

    `mounts` is the text of /proc/self/mounts.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return "unknown"
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if len(point) >= len(best) and folder.resolve().is_relative_to(point):
            best, kind = point, found
    return kind


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def ask_child(program: str, *, timeout_seconds: int, environment: Mapping[str, str] | None = None) -> Any:
    """What a Python program prints as JSON behind "FOUND ", never a text; else, as a text, why it did not."""
    command = [sys.executable, "-c", program]
    try:
        asked = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_seconds} s"
    for line in asked.stdout.splitlines():
        if line.startswith("FOUND "):
            return json.loads(line.removeprefix("FOUND "))
    return (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
