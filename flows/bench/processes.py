"""One contestant's process: started fresh, watched, killed with all that it started, its words kept in a file."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.bench.gpu_memory import GpuMemory
from flows.training import kill_group
from trainer.launch import ENVIRONMENT

LOG_NAME, RESULT_NAME, REQUEST_NAME = "log.txt", "result.json", "request.json"
OUT_OF_MEMORY_SIGN = "out of memory"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`raw` is what the process left, None where it did not; then `problem` says why, on one line."""

    raw: dict[str, Any] | None
    problem: str
    started_at: float
    ended_at: float
    nvml_gib: float | None
    is_cut_off: bool = False
    """Time ran out: with more of it another end is possible."""


def run_process(
    command: Sequence[str],
    request: Mapping[str, Any],
    folder: Path,
    *,
    timeout_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run to the end, in a folder of its own: the request goes in, the result and the log are left there."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / RESULT_NAME
    result.unlink(missing_ok=True)
    whole = {**request, "result": str(result), "folder": str(folder), "parent": os.getpid()}
    (folder / REQUEST_NAME).write_text(json.dumps(whole, indent=1))
    started_at = time.time()
    with GpuMemory() as memory:
        code = _run([*command, str(folder / REQUEST_NAME)], folder, timeout_seconds, environment or {})
    ended_at = time.time()
    raw = json.loads(result.read_bytes()) if code == 0 and result.is_file() else None
    problem = (
        "" if raw is not None and "left_out" not in raw else _problem(raw, code, folder, timeout_seconds)
    )
    result_or_none = raw if not problem else None
    return Outcome(result_or_none, problem, started_at, ended_at, memory.peak_gib, is_cut_off=code is None)


def _run(
    command: Sequence[str], folder: Path, timeout_seconds: float, environment: Mapping[str, str]
) -> int | None:
    """The exit code; None where time ran out."""
    variables = ENVIRONMENT | dict(os.environ) | {"PYTHONUNBUFFERED": "1"} | dict(environment)
    with (folder / LOG_NAME).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
        try:
            return process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill_group(process.pid, signal.SIGKILL)
            process.wait()


def _problem(raw: Mapping[str, Any] | None, code: int | None, folder: Path, timeout_seconds: float) -> str:
    if raw is not None:
        return str(raw["left_out"])
    if code is None:
        return f"not ready after {timeout_seconds:.0f} s"
    lines = [line.strip() for line in log_lines(folder) if line.strip()]
    # The last line of a traceback may be advice: the line that names the error says more.
    telling = [
        line for line in lines if OUT_OF_MEMORY_SIGN in line.lower() or line.split(":")[0].endswith("Error")
    ]
    said = (telling or lines or ["it printed nothing"])[-1]
    return f"ended with {code}: {said[:300]}"


def log_lines(folder: Path) -> list[str]:
    path = folder / LOG_NAME
    return path.read_text(errors="replace").splitlines() if path.is_file() else []
