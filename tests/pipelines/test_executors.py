"""Workers may die; parts are not lost and nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipelines import executors
from schemas.errors import InputError, WorkerError

ROOT = Path(__file__).parent.parent.parent


def label(task: object) -> str:
    return f"part {task}"


def square(task: int) -> int:
    return task * task


def die_once(folder: str) -> int:
    marker = Path(folder) / "died"
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 7


def always_die(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def refuse(task: int) -> int:
    raise InputError(f"task {task} is unreadable")


def fail(task: int) -> int:
    return task // 0


@pytest.fixture(autouse=True)
def _no_workers_left() -> object:
    yield
    executors.close_workers()


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_comes_back_once(workers: int) -> None:
    results = dict(executors.run_tasks(square, list(range(20)), num_workers=workers, label=label))
    assert results == {n: n * n for n in range(20)}


def test_a_killed_worker_costs_time_and_no_task(tmp_path: Path) -> None:
    tasks = [str(tmp_path)] * 4
    results = dict(executors.run_tasks(die_once, tasks, num_workers=2, label=label))
    assert results == {0: 7, 1: 7, 2: 7, 3: 7}


def test_workers_that_always_die_end_the_run_with_the_parts_named() -> None:
    with pytest.raises(WorkerError, match="part 0"):
        list(executors.run_tasks(always_die, [0, 1], num_workers=2, label=label))


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_a_task_reach_the_caller(workers: int) -> None:
    with pytest.raises(InputError, match="unreadable"):
        list(executors.run_tasks(refuse, [1, 2], num_workers=workers, label=label))
    with pytest.raises(WorkerError, match="part 1: ZeroDivisionError"):
        list(executors.run_tasks(fail, [1, 1], num_workers=workers, label=label))


PARENT = """
import time
from pipelines import executors
from tests_sleep import nap

if __name__ == "__main__":
    for _ in executors.run_tasks(nap, [0, 1], num_workers=2, label=str):
        pass
"""


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "tests_sleep.py").write_text("import time\ndef nap(task):\n    time.sleep(60)\n")
    (tmp_path / "parent.py").write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=environment)
    workers = wait_for_workers(psutil.Process(parent.pid), 2)
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def wait_for_workers(parent: psutil.Process, number: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = [c for c in parent.children(recursive=True) if "spawn_main" in " ".join(c.cmdline())]
        if len(children) >= number:
            time.sleep(0.5)  # let them reach their initializer
            return children
        time.sleep(0.1)
    raise AssertionError("workers did not start")
