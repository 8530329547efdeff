"""Checks of `sft-pipeline doctor` on the machine: disk, locks, torch and what it can train on, DeepSpeed's tools."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TRAIN_PACKAGES = {"torch": "torch", "peft": "peft", "safetensors": "safetensors"}
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
    "afs",
}
CHILD_TIMEOUT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Finding:
    """`level` fails stops the pipeline, warns does not. `remedy` is empty where nothing is to be done."""

    level: Literal["ok", "warns", "fails"]
    subject: str
    found: str
    remedy: str = ""


def check_disk(folder: Path) -> Iterator[Finding]:
    """Free space where runs are written."""
    place = _nearest_existing(folder)
    free_gib = shutil.disk_usage(place).free / 2**30
    level: Literal["ok", "warns"] = "ok" if free_gib >= WANTED_FREE_GIB else "warns"
    remedy = "" if level == "ok" else "checkpoints and shards are large: free some, or put run_root elsewhere"
    yield Finding(level, "disk", f"{free_gib:.1f} GiB free at {place}", remedy)


def check_lock(folder: Path) -> Iterator[Finding]:
    """A second process can't take a lock that we hold: not so on some network file systems."""
    place = _nearest_existing(folder)
    kind = file_system(place)
    if not os.access(place, os.W_OK):
        yield Finding("fails", "run root", f"{place} can't be written", "choose another run_root")
        return
    if not excludes_others(place):
        remedy = "two runs could write at once: put run_root on a local disk"
        yield Finding("fails", "lock", f"{place} ({kind}) does not keep a second process out", remedy)
    elif kind in NETWORK_FILE_SYSTEMS:
        remedy = (
            "locks may not hold between machines, and Prefect's database must not lie there: use a local disk"
        )
        yield Finding("warns", "lock", f"{place} is a network file system ({kind})", remedy)
    else:
        yield Finding("ok", "lock", f"holds at {place} ({kind})")


_TRY_LOCK = """
import fcntl, sys
try:
    fcntl.flock(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(0)
sys.exit(1)
"""


def excludes_others(folder: Path) -> bool:
    """Hold a lock here and have another process try for it."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".sft-pipeline-lock-") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return subprocess.run([sys.executable, "-c", _TRY_LOCK, file.name], check=False).returncode == 0


def file_system(folder: Path) -> str:
    """Kind of the file system that a folder lies on, as the kernel names it; "unknown" where it says nothing."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    best, kind = "", "unknown"
    for line in mounts:
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if len(point) >= len(best) and folder.resolve().is_relative_to(point):
            best, kind = point, found
    return kind


_ASK_TORCH = """
import torch
print("torch", torch.__version__)
for number in range(torch.cuda.device_count()):
    properties = torch.cuda.get_device_properties(number)
    print(f"gpu {properties.major}.{properties.minor} {properties.total_memory / 2**30:.0f} {properties.name}")
"""


def check_torch() -> Iterator[Finding]:
    """Training's libraries, and what there is to train on. torch is asked in a child: it may break on import."""
    missing = [name for module, name in TRAIN_PACKAGES.items() if not is_there(module)]
    if missing:
        remedy = "pip install 'sft-pipeline[train]'; the data stages run without it: --until pack"
        yield Finding("warns", "training", f"missing: {', '.join(missing)}", remedy)
        return
    asked = subprocess.run(
        [sys.executable, "-c", _ASK_TORCH],
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT_SECONDS,
        check=False,
    )
    if asked.returncode != 0:
        last = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(
            "fails", "training", f"torch does not start: {last}", "install torch again for this machine"
        )
        return
    yield from torch_findings(asked.stdout.splitlines())


def torch_findings(lines: list[str]) -> Iterator[Finding]:
    """Read the child's answer: a line for torch, one for each GPU."""
    yield Finding("ok", "training", lines[0])
    for line in lines[1:]:
        _, capability, gib, name = line.split(" ", 3)
        about = f"{name}, {gib} GiB, compute capability {capability}"
        if float(capability) >= 8.0:
            yield Finding("ok", "gpu", about)
        else:
            remedy = (
                "below 8.0 there is no bfloat16: training is in float32, slower and with twice the memory"
            )
            yield Finding("warns", "gpu", about, remedy)
    if len(lines) == 1:
        remedy = (
            "training works, but only small models are done in bearable time"
            if not _has_nvidia()
            else ("torch sees no GPU although there is a driver: install a build of torch with CUDA")
        )
        yield Finding("warns", "gpu", "none that torch can use", remedy)


def check_deepspeed() -> Iterator[Finding]:
    """DeepSpeed compiles its optimisers at first use: that needs tools."""
    if not is_there("deepspeed"):
        return
    missing = [tool for tool in ("ninja", "nvcc", "g++") if shutil.which(tool) is None]
    if missing:
        remedy = "install them, or use a strategy without DeepSpeed"
        yield Finding("warns", "deepspeed", f"can't compile its kernels: no {', '.join(missing)}", remedy)
    else:
        yield Finding("ok", "deepspeed", "with the tools to compile its kernels")


def is_there(module: str) -> bool:
    """Whether a module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a sub-module of a package that is missing
        return False


def _has_nvidia() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def _nearest_existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
