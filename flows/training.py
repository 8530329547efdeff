"""The trainer as a child process: its own session, its output line by line, and never an orphan.

Three ways to end it, each for a parent that dies differently: the group is killed when anything is raised here
(Ctrl-C, cancel, a bug); the child ends itself at the end of the parent pipe (kill -9 of the parent); and the
flow's cancellation hook, which runs in another process, finds the group through `<run root>/train.pid`.
Called directly, never by `.submit()`: Prefect can't stop a thread, and the child would outlive its flow.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from flows.child import DEATH_SIGNAL_VARIABLE
from flows.packages import OUR_FOLDER
from flows.secret_values import hider
from pipelines.run_lock import PARENT_FD_VARIABLE, Lock, lock_variables
from pipelines.storage import write_json
from schemas.errors import SftPipelineError, TrainingError, UsageError
from schemas.run import RESOLVED_CONFIG_NAME

PID_NAME = "train.pid"
GRACE_SECONDS = 20.0
"""From SIGTERM to SIGKILL: the trainer writes a checkpoint. Prefect's worker kills a cancelled flow after 30."""
ERROR_MARK = "error: "
"""How the trainer begins its last line: held back here, since it comes again as the error that is raised."""
NUM_LAST_LINES = 20

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Child:
    """A process group that we started.

    `started` is the kernel's start time, so that a reused pid is not killed; `owner` is the id of the flow run,
    so that the end of one that only waited for the run root does not kill the training of the one that holds it.
    """

    pid: int
    started: str
    owner: str


def run_trainer(
    command: str,
    run_root: Path,
    *,
    lock: Lock,
    say: Say,
    owner: str = "",
    secrets: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """`python -m trainer.launch COMMAND --config <run root>/config.json` to its end; its last lines.

    `secrets` are in its environment and in no line that it prints. Raises TrainingError, or UsageError when the trainer refused, with the trainer's own last line.
    """
    config_path = run_root / RESOLVED_CONFIG_NAME
    return run_child(
        ["trainer.launch", command, "--config", str(config_path)],
        pid_path=run_root / PID_NAME,
        lock=lock,
        say=say,
        owner=owner,
        secrets=secrets,
    )


def run_child(
    module_and_arguments: Sequence[str],
    *,
    pid_path: Path,
    lock: Lock,
    say: Say,
    owner: str = "",
    secrets: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Run a module of ours as a child process group; every line that it prints goes to `say`. Its last lines.

    `lock` is that of the held run root: the child keeps it should we die before the child.
    """
    last_lines: list[str] = []
    hide = hider(secrets or {})

    def hear(line: str) -> None:
        line = hide(line)
        last_lines.append(line)
        del last_lines[:-NUM_LAST_LINES]
        if not line.startswith(ERROR_MARK):
            say(line)

    with (
        parent_pipe() as pipe,
        child_process(
            module_and_arguments,
            pipe=pipe,
            descriptors=lock,
            environment={**lock_variables(lock), **(secrets or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        write_pid(pid_path, Child(process.pid, process_start(process.pid), owner))
        try:
            assert process.stdout is not None, "stdout is a pipe"
            reader = threading.Thread(target=_forward, args=(process.stdout, hear), daemon=True)
            reader.start()
            code = process.wait()
            kill_group(process.pid, signal.SIGKILL)  # ranks and loaders that it left behind
            reader.join(GRACE_SECONDS)
        except BaseException:
            stop_group(process.pid, is_gone=lambda: process.poll() is not None, grace_seconds=GRACE_SECONDS)
            raise
        finally:
            pid_path.unlink(missing_ok=True)
    if code != 0:
        raise _failure(module_and_arguments, code, last_lines)
    return tuple(last_lines)


def stop_child(run_root: Path, *, owner: str) -> bool:
    """For another process than the parent: end the child of `owner` that `train.pid` names. True if one lived."""
    child = read_pid(run_root / PID_NAME)
    if child is None or child.owner != owner or process_start(child.pid) != child.started:
        return False
    stop_group(
        child.pid, is_gone=lambda: process_start(child.pid) != child.started, grace_seconds=GRACE_SECONDS
    )
    return True


def write_pid(path: Path, child: Child) -> None:
    """Leave word of a running child for `stop_child`."""
    write_json(path, asdict(child))


def read_pid(path: Path) -> Child | None:
    """What `train.pid` says; None when it is absent or not ours."""
    try:
        record = json.loads(path.read_bytes())
        return Child(int(record["pid"]), str(record["started"]), str(record["owner"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def process_start(pid: int) -> str:
    """The kernel's start time of a living process, "" for none: the pid alone may have been given anew."""
    try:
        # The name in field 2 may hold spaces and brackets: count from the last one. Field 22 is starttime.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def stop_group(group: int, *, is_gone: Callable[[], bool], grace_seconds: float) -> None:
    """SIGTERM, a time of grace, SIGKILL; a second interrupt while waiting goes straight to SIGKILL."""
    try:
        kill_group(group, signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while not is_gone() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        kill_group(group, signal.SIGKILL)


def kill_group(group: int, number: int) -> None:
    """Signal a process group of ours; one that has already ended is no error."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


@contextmanager
def parent_pipe() -> Iterator[int]:
    """The read end, for the child. Nobody ever writes; our death closes the write end, however we die."""
    read_end, write_end = os.pipe()
    try:
        yield read_end
    finally:
        os.close(read_end)
        os.close(write_end)


@contextmanager
def child_process(
    module_and_arguments: Sequence[str],
    *,
    pipe: int,
    descriptors: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    stdout: int | None,
    stderr: int | None,
) -> Iterator["subprocess.Popen[str]"]:
    """`python -m MODULE ARGUMENT...` in a session of its own, that ends when we do; killed with its group after."""
    variables = {PARENT_FD_VARIABLE: str(pipe), "PYTHONUNBUFFERED": "1", **(environment or {})}
    if threading.current_thread() is threading.main_thread():
        variables[DEATH_SIGNAL_VARIABLE] = str(os.getpid())
    process = subprocess.Popen(
        [sys.executable, str(OUR_FOLDER / "flows" / "child.py"), *module_and_arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        encoding="utf-8",
        errors="replace",
        env=os.environ | variables,
        pass_fds=[pipe, *descriptors],
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_group(process.pid, signal.SIGKILL)
        process.wait()


def _forward(lines: IO[str], hear: Say) -> None:
    # Closed here and not by the main thread: close() would wait for a read that a stray grandchild holds up.
    with lines:
        for line in lines:
            hear(line.rstrip("\n"))


def _failure(module_and_arguments: Sequence[str], code: int, last_lines: Sequence[str]) -> SftPipelineError:
    name = " ".join(module_and_arguments[:2])
    told = next((line for line in reversed(last_lines) if line.strip()), "it printed nothing")
    message = told.removeprefix(ERROR_MARK)
    if code == UsageError.exit_code:
        return UsageError(message)
    if code == SftPipelineError.exit_code and told.startswith(ERROR_MARK):
        return TrainingError(message)
    ended = f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return TrainingError(f"{name}: {ended}: {message}")
