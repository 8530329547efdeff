"""Commands of `sft-pipeline` in a warm process, with a fault at the nth call that changes a file.

The shim failnth.c is compiled here; see its head for what it counts.
"""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
PAGE = struct.Struct("<qqiiiI2048s1024s512s")
ACTIONS = ("fail", "kill", "short", "cut")
LOSE_UNSYNCED = 2
"""How FS_IOC_SHUTDOWN ends a file system: what no fsync has asked for is lost, the journal's too."""
OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private")


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at the nth call. `error` is an errno; `mount_point` is what a cut takes the power from."""

    nth: int
    action: Literal["fail", "kill", "short", "cut"]
    error: int = 0
    for_ever: bool = False
    mount_point: str = ""

    def __str__(self) -> str:
        name = errno.errorcode[self.error] if self.error else self.action
        return f"{name}{' for ever' if self.for_ever else ''} at call {self.nth}"


class Call(NamedTuple):
    """A call that changed a file, as the shim logged it."""

    number: int
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended. `code` is negative for a signal."""

    code: int
    output: str
    num_calls: int
    calls: tuple[Call, ...] = ()


def compile_shim(folder: Path, name: str = "failnth") -> Path:
    """A library to preload; skips the test where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler on Linux: a shim can't be built")
    shim = folder / f"{name}.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(shim), str(HERE / f"{name}.c")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return shim


@dataclass(slots=True)
class Warm:
    """The warm process. `run` is one command in a fresh fork of it."""

    folder: Path
    prefix: Sequence[str] = ()
    """Command that starts Python, such as unshare or setpriv with their options."""
    environment: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[str]" = field(init=False)

    @classmethod
    def with_own_mounts(cls, folder: Path) -> "Warm":
        """One that may mount; skips the test where mounts are not allowed."""
        probe = subprocess.run(
            [*OWN_MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True
        )
        if probe.returncode != 0:
            pytest.skip(f"mounts are not allowed here: {probe.stderr.strip()}")
        return cls(folder, prefix=OWN_MOUNTS)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shim = compile_shim(self.folder)
        (self.folder / "page").write_bytes(bytes(PAGE.size))
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        shimmed = {"LD_PRELOAD": str(shim), "FAILNTH_PAGE": str(self.folder / "page")}
        self.process = subprocess.Popen(
            [*self.prefix, sys.executable, str(HERE / "driver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=os.environ | quiet | shimmed | {"PYTHONPATH": str(ROOT)} | dict(self.environment),
        )
        self._answer()

    def run(
        self,
        *arguments: str | Path,
        under: Path | None = None,
        fault: Fault | None = None,
        limits: Mapping[str, int] | None = None,
        learn: bool = False,
    ) -> Ended:
        """`sft-pipeline ARGUMENTS`. Calls below `under` count; they are listed where there is no fault."""
        log = self.folder / "calls" if fault is None and under is not None else None
        if log is not None:
            log.unlink(missing_ok=True)
        request = {
            "arguments": [str(argument) for argument in arguments],
            "page": _page(fault, under, log).hex(),
            "output": str(self.folder / "output"),
            "limits": limits or {},
            "learn": str(self.folder / "modules") if learn else "",
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = self._answer()["code"]
        num_calls = PAGE.unpack((self.folder / "page").read_bytes())[0]
        output = (self.folder / "output").read_text(encoding="utf-8", errors="replace")
        return Ended(code, output, num_calls, _calls(log))

    def seen(self, path: Path) -> Path:
        """A path of the warm process as this one can open it: its mounts are its own where `prefix` says so."""
        return Path(f"/proc/{self.process.pid}/root", *path.parts[1:]) if self.prefix else path

    def mount(self, *arguments: str | Path) -> None:
        """mount or umount where the warm process lives; all mounts are gone with it."""
        into = ["nsenter", "--target", str(self.process.pid), "--mount"]
        subprocess.run([*into, *map(str, arguments)], check=True, capture_output=True, text=True)

    def close(self) -> None:
        self.process.communicate()

    def _answer(self) -> dict[str, int]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the warm process has ended with {self.process.wait()}"
        answer: dict[str, int] = json.loads(line)
        return answer


def _page(fault: Fault | None, under: Path | None, log: Path | None) -> bytes:
    fault = fault or Fault(0, "fail")
    texts = (str(text).encode() if text else b"" for text in (under, log, fault.mount_point))
    return PAGE.pack(
        0, fault.nth, ACTIONS.index(fault.action), fault.error, fault.for_ever, LOSE_UNSYNCED, *texts
    )


def _calls(log: Path | None) -> tuple[Call, ...]:
    if log is None or not log.exists():
        return ()
    lines = log.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return tuple(Call(int(number), name, path) for number, name, path in (x.split("\t", 2) for x in lines))
