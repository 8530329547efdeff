"""Workers may die; parts are not lost and nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipelines import executors
from pipelines.run_lock import hold_run_root
from schemas.errors import BusyError, InputError, WorkerError
from tests.integration.processes import command_line

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


def touch(path: str) -> bool:
    Path(path).touch()
    return True


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
    for tasks in (range(50), iter(range(50))):  # more than are handed over ahead
        results = dict(executors.run_tasks(square, tasks, num_workers=workers, label=label))
        assert results == {n: n * n for n in range(50)}


def test_tasks_are_worked_on_while_further_ones_are_being_made(tmp_path: Path) -> None:
    def made() -> Iterator[str]:
        yield str(tmp_path / "first")
        deadline = time.monotonic() + 60
        while not (tmp_path / "first").exists():
            assert time.monotonic() < deadline, "nobody works on the first task"
            time.sleep(0.05)
        yield str(tmp_path / "second")

    results = dict(executors.run_tasks(touch, made(), num_workers=2, label=label))
    assert results == {0: True, 1: True}


def test_an_error_of_who_makes_the_tasks_reaches_the_caller_and_ends_the_work() -> None:
    def made() -> Iterator[int]:
        yield 1
        raise InputError("the file ends here")

    with pytest.raises(InputError, match="ends here"):
        list(executors.run_tasks(square, made(), num_workers=2, label=label))


@pytest.mark.parametrize("kind", [list, iter])
def test_a_killed_worker_costs_time_and_no_task(
    tmp_path: Path, kind: Callable[[list[str]], list[str]]
) -> None:
    tasks = [str(tmp_path)] * 40
    results = dict(executors.run_tasks(die_once, kind(tasks), num_workers=2, label=label))
    assert results == dict.fromkeys(range(40), 7)


def test_workers_that_always_die_end_the_run_with_the_parts_named() -> None:
    with pytest.raises(WorkerError, match="part 0"):
        list(executors.run_tasks(always_die, [0, 1], num_workers=2, label=label))


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_a_task_reach_the_caller(workers: int) -> None:
    with pytest.raises(InputError, match="unreadable"):
        list(executors.run_tasks(refuse, [1, 2], num_workers=workers, label=label))
    with pytest.raises(WorkerError, match="part 1: ZeroDivisionError"):
        list(executors.run_tasks(fail, [1, 1], num_workers=workers, label=label))


def write_late(path: str) -> None:
    if not path:
        raise InputError("this part is unreadable")
    time.sleep(2)
    Path(path).write_text("too late")


def test_no_worker_writes_after_the_stage_has_ended_early(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    tasks = [str(tmp_path / "late"), ""]
    with pytest.raises(InputError):
        list(executors.run_tasks(write_late, tasks, num_workers=2, label=label))
    left = {child for child in psutil.Process().children(recursive=True) if child not in before}
    assert not [child for child in left if "spawn_main" in command_line(child)]
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


HOLDING_PARENT = """
import sys
from pathlib import Path
from pipelines import executors
from pipelines.run_lock import hold_run_root
from tests_sleep import stop

if __name__ == "__main__":
    with hold_run_root(Path(sys.argv[1]), wait_seconds=0) as lock, executors.workers_hold(lock):
        for _ in executors.run_tasks(stop, [0, 1], num_workers=2, label=str):
            pass
"""


def test_a_worker_that_cannot_notice_the_end_of_its_parent_keeps_the_run_root(tmp_path: Path) -> None:
    """Stopped workers stand for those in the middle of a long call: they would write once they go on."""
    (tmp_path / "tests_sleep.py").write_text(
        "import os, signal\ndef stop(task):\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    (tmp_path / "parent.py").write_text(HOLDING_PARENT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "run")]
    parent = subprocess.Popen(command, env=environment)
    workers = wait_for_workers(psutil.Process(parent.pid), 2)
    wait_for_state(workers, psutil.STATUS_STOPPED)
    parent.kill()
    parent.wait()
    for worker in workers:
        with pytest.raises(BusyError), hold_run_root(tmp_path / "run", wait_seconds=0.3):
            pass
        worker.kill()
    with hold_run_root(tmp_path / "run", wait_seconds=10):
        pass


def test_workers_of_a_run_that_has_ended_are_gone_and_its_root_is_free(tmp_path: Path) -> None:
    for _ in range(2):
        with hold_run_root(tmp_path, wait_seconds=0) as lock, executors.workers_hold(lock):
            results = dict(executors.run_tasks(square, [1, 2], num_workers=2, label=label))
        assert results == {0: 1, 1: 4}
    # A killed one may still be waiting for the pool's thread to ask how it ended.
    living = [c for c in psutil.Process().children() if c.status() != psutil.STATUS_ZOMBIE]
    assert not [c for c in living if "spawn_main" in " ".join(c.cmdline())]


def wait_for_state(processes: list[psutil.Process], state: str) -> None:
    deadline = time.monotonic() + 30
    while any(process.status() != state for process in processes):
        assert time.monotonic() < deadline, f"not all workers are {state}"
        time.sleep(0.1)


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
