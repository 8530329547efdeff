"""The journey from dumps to promotion as a user types it, one command after the other, with kills on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from schemas.run import STAGE_FOLDERS, STAGES
from tests.integration import toy
from tests.integration.killing.leftovers import leftovers, poison, watched
from tests.integration.killing.places import FILES

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
PATIENCE_SECONDS = 600.0
WHOLE_FLOW = "run"
COMMANDS = (*STAGES, "train", "evaluate", "promote")
OUTSIDE_BYTES = ("config.json", "metrics.jsonl", "tensorboard")
"""Name of the run root, times, and the events of TensorBoard: not the same in two runs."""


@dataclass(frozen=True, slots=True)
class Kill:
    """kill -9 in a phase: at an event of a call, see sitecustomize.py. `command` is what is running then.

    `since` is the first command of the journey that is not done yet; "" where it is `command` itself.
    """

    phase: str
    command: str
    since: str = ""
    file: str = ""
    call: int = 1
    event: int = 1
    whom: str = "group"
    workers: int = 1

    def __str__(self) -> str:
        of_file = f" of {self.file}" if self.file else ""
        pool = f", {self.workers} workers" if self.workers > 1 else ""
        return f"{self.command}: {self.phase}{of_file} {self.call}.{self.event}, {self.whom}{pool}"

    @property
    def order(self) -> str:
        """For the start-up file."""
        return json.dumps(asdict(self))


@dataclass(slots=True)
class Journey:
    """One run root, and what was typed there."""

    config: Path
    num_logs: int = 0
    num_marks: int = 0
    num_spoiled: int = 0

    @property
    def run_root(self) -> Path:
        """Named as the config."""
        return self.config.with_suffix("")

    @property
    def log(self) -> Path:
        """Phases of the newest command."""
        return self.config.with_name(f"{self.config.stem}-{self.num_logs:02d}.log")

    def begin(self, command: str, *, kill: Kill | None = None, workers: int = 1) -> "subprocess.Popen[str]":
        """Start a command in a process group of its own."""
        self.num_logs += 1
        words = ["step", command] if command in STAGES else [command]
        environment = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.config.parent),
            "PYTHONPATH": f"{HERE}:{ROOT}",
            "OMP_NUM_THREADS": "1",  # sums depend on the number of threads
            "SFT_KILL_LOG": str(self.log),
        }
        if kill is not None:
            environment["SFT_KILL"] = kill.order
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "flows.cli",
                *words,
                str(self.config),
                "--set",
                f"engine.workers={workers}",
            ],
            cwd=self.config.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run_well(self, *commands: str, workers: int = 1) -> str:
        """Commands to their good end, nothing left half-written after each; what they said."""
        said = ""
        for command in commands:
            with self._over_spoiled_leftovers():
                process = self.begin(command, workers=workers)
                _, errors = process.communicate(timeout=PATIENCE_SECONDS)
            assert process.returncode == 0, f"{command}: {errors}"
            left = leftovers(self.run_root)
            assert not left, f"{command} has left {left}"
            said += errors
        assert "can't be used" not in said
        return said

    def be_killed(self, kill: Kill) -> str:
        """Run the kill's command into its death; a line that says where it was hit."""
        with self._over_spoiled_leftovers():
            process = self.begin(kill.command, kill=kill, workers=kill.workers)
            _, errors = process.communicate(timeout=PATIENCE_SECONDS)
            self._wait_until_all_are_gone()
        hit = Path(f"{self.log}.hit")
        assert hit.exists(), f"{kill} hit nothing, exit code {process.returncode}: {errors}"
        found = json.loads(hit.read_text())
        assert found["phase"] == kill.phase
        assert found["event"] != "its end", f"{kill} came too late: {found}"
        dying = {"alone": "pid", "group": "group", "parent": "parent"}[kill.whom]
        # A killed worker of the pool is replaced, a killed trainer ends its flow with an error.
        expected = [-signal.SIGKILL] if found[dying] == process.pid else [0, 1]
        assert process.returncode in expected, f"{kill}: exit code {process.returncode}: {errors}"
        if kill.phase in FILES:
            assert found["is_open"], f"{kill}: {found}"
        return f"killed in {kill}: {json.dumps(found)}"

    def be_killed_at_random(self, draw: random.Random, commands: Sequence[str], num_marks: int) -> str:
        """Kill a command a moment after a mark that was drawn; a line that says where it was hit."""
        number, delay_seconds = draw.randrange(num_marks), draw.uniform(0, 0.1)
        whom, workers = draw.choice(["group", "alone"]), draw.choice([1, 2])
        for command in commands:
            process = self.begin(command, workers=workers)
            if not self._wait_for_mark(process, number):
                assert process.wait() == 0
                number -= len(self.marks())
                continue
            time.sleep(delay_seconds)
            os.kill(process.pid, signal.SIGKILL) if whom == "alone" else os.killpg(
                process.pid, signal.SIGKILL
            )
            process.communicate()
            self._wait_until_all_are_gone()
            return (
                f"killed {command} at random: mark {number} and {delay_seconds:.3f} s, {whom}, {workers} workers, "
                f"landed {json.dumps(self.marks()[-1])}"
            )
        return "all commands ended before the kill"

    def marks(self) -> list[dict[str, Any]]:
        """What the start-up file wrote about the newest command."""
        lines = self.log.read_bytes().splitlines(keepends=True) if self.log.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    @contextmanager
    def _over_spoiled_leftovers(self) -> Iterator[None]:
        spoiled = poison(self.run_root)
        self.num_spoiled += len(spoiled)
        with watched(spoiled) as watch:
            yield
            opened = watch.opened()
            assert not opened, f"left half-written by a killed run, and opened by the next: {opened}"

    def _wait_for_mark(self, process: "subprocess.Popen[str]", number: int) -> bool:
        while process.poll() is None:
            if self.log.exists() and self.log.read_bytes().count(b"\n") > number:
                return True
            time.sleep(0.002)
        return False

    def _wait_until_all_are_gone(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while alive := [process for process in psutil.process_iter() if self._is_ours(process)]:
            assert time.monotonic() < deadline, f"still alive: {alive}"
            time.sleep(0.05)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get("SFT_KILL_LOG") == str(self.log)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False


def commands_from(command: str) -> tuple[str, ...]:
    """That command and all after it."""
    return COMMANDS[COMMANDS.index(command) :]


def forget_from(run_root: Path, command: str) -> None:
    """Remove from a finished run what that command and the later ones made."""
    for stage in STAGES:
        if stage in commands_from(command):
            shutil.rmtree(run_root / STAGE_FOLDERS[stage])
    if "holdout" in commands_from(command):
        (run_root / "holdout.parquet").unlink()
    if "train" in commands_from(command):
        shutil.rmtree(run_root / "checkpoints")
    for path in run_root.glob("evaluation*") if "evaluate" in commands_from(command) else ():
        path.unlink()
    (run_root / "promoted.json").unlink()


# What must be the same --------------------------------------------------------------------------------------


def bytes_of(run_root: Path) -> dict[str, str]:
    """Digest of each file of a run root: shards, adapter, checkpoints, evaluation, promotion."""
    found = toy.folder_digests(run_root)
    return {path: digest for path, digest in found.items() if not set(Path(path).parts) & set(OUTSIDE_BYTES)}


def steps_of(run_root: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    (path,) = run_root.glob("checkpoints/*/metrics.jsonl")
    measured = (
        "seconds",
        "seconds_left",
        "unix_time",
        "checkpoint_seconds",
        "tokens_per_second",
        "teraflops_per_second",
        "memory_gib",
    )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def assert_as_undisturbed(run_root: Path, reference: Path) -> None:
    """The same bytes, each training step told once and in order, and nothing left over."""
    assert not leftovers(run_root), leftovers(run_root)
    found, expected = bytes_of(run_root), bytes_of(reference)
    differing = sorted(
        path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path)
    )
    assert not differing, f"other bytes, absent or too many: {differing}"
    steps = [line["step"] for line in steps_of(run_root) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), steps
    assert steps_of(run_root) == steps_of(reference), (steps_of(run_root), steps_of(reference))
