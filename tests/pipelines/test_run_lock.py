"""Never two holders of a run root, whatever is killed or deleted; a child ends with its parent. Real processes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines import run_lock
from pipelines.run_lock import LOCK_FD_VARIABLE, hold_run_root
from schemas.errors import BusyError

HOLDER = """
import sys, time
from pathlib import Path
from pipelines.run_lock import hold_run_root
with hold_run_root(Path(sys.argv[1]), wait_seconds=0, flow_run=sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(run_root: Path, *, flow_run: str = "") -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_root), flow_run], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def take(run_root: Path, *, wait_seconds: float = 0) -> None:
    with hold_run_root(run_root, wait_seconds=wait_seconds):
        pass


def test_a_second_run_is_refused_by_the_name_of_the_first_and_goes_on_after_its_death(tmp_path: Path) -> None:
    host = os.uname().nodename
    with holder(tmp_path) as first, pytest.raises(BusyError, match=rf"\(process {first.pid} on {host}\)"):
        take(tmp_path, wait_seconds=0.2)
    take(tmp_path, wait_seconds=5)
    assert (tmp_path / "run.lock").exists()


def test_the_flow_run_is_named_where_there_is_one(tmp_path: Path) -> None:
    with holder(tmp_path, flow_run="0a-1b"), pytest.raises(BusyError, match="flow run 0a-1b"):
        take(tmp_path)


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {first.pid}"])
        started = time.monotonic()
        take(tmp_path, wait_seconds=30)
        assert 0.5 < time.monotonic() - started < 15
        killer.wait()


def test_a_deleted_lock_file_lets_nobody_in(tmp_path: Path) -> None:
    with holder(tmp_path):
        (tmp_path / "run.lock").unlink()
        with pytest.raises(BusyError, match=r"unknown: its run\.lock was deleted"):
            take(tmp_path)
        assert not (tmp_path / "run.lock").exists(), "a refused run left something"
    take(tmp_path)


def test_a_lock_file_that_another_machine_holds_lets_nobody_in(tmp_path: Path) -> None:
    """The folder's lock may be unknown to other machines: the file's alone keeps them out."""
    with hold_run_root(tmp_path, wait_seconds=0) as (folder, _):
        os.close(folder)
        with pytest.raises(BusyError):
            take(tmp_path)
        os.open(tmp_path, os.O_RDONLY)  # the same number again, for the end of the block


def test_a_run_whose_folder_was_deleted_under_it_is_told_so(tmp_path: Path) -> None:
    run_root = tmp_path / "run"
    with hold_run_root(run_root, wait_seconds=0) as lock:
        run_lock.check_still_held(lock, run_root)
        run_root.rename(tmp_path / "moved")
        for _ in range(2):  # gone, then in the hands of another run
            with pytest.raises(BusyError, match="deleted or moved"):
                run_lock.check_still_held(lock, run_root)
            run_root.mkdir(exist_ok=True)


def test_two_threads_of_a_process_are_two_runs(tmp_path: Path) -> None:
    with hold_run_root(tmp_path, wait_seconds=0), pytest.raises(BusyError):
        take(tmp_path)


def test_different_run_roots_are_held_side_by_side(tmp_path: Path) -> None:
    with holder(tmp_path / "a"), holder(tmp_path / "b"):
        take(tmp_path / "c")


def test_a_child_holds_what_its_parent_gave_it_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hold_run_root(tmp_path / "a", wait_seconds=0) as lock:
        monkeypatch.setenv(LOCK_FD_VARIABLE, run_lock.lock_variables(lock)[LOCK_FD_VARIABLE])
        with hold_run_root(tmp_path / "a", wait_seconds=0) as inherited:
            assert inherited == lock
        with hold_run_root(tmp_path / "b", wait_seconds=0) as other:
            assert other != lock
        take(tmp_path / "b")
    with holder(tmp_path / "a"), pytest.raises(BusyError):
        take(tmp_path / "a")  # the variable names closed descriptors now


def test_a_variable_that_names_an_open_folder_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with holder(tmp_path):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        monkeypatch.setenv(LOCK_FD_VARIABLE, str(descriptor))
        with pytest.raises(BusyError):
            take(tmp_path)
        os.close(descriptor)


CHILD = """
import time
from pipelines.run_lock import exit_with_parent
exit_with_parent()
print("up", flush=True)
time.sleep(60)
"""


def test_a_child_ends_when_the_parents_end_of_the_pipe_closes() -> None:
    read_end, write_end = os.pipe()
    environment = os.environ | {run_lock.PARENT_FD_VARIABLE: str(read_end)}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], pass_fds=[read_end], env=environment, stdout=subprocess.PIPE, text=True
    )
    os.close(read_end)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        started = time.monotonic()
        os.close(write_end)
        assert child.wait(timeout=10) == 1
        assert time.monotonic() - started < 5


RACE = """
import os, random, signal, sys, time
from pathlib import Path
from pipelines.run_lock import hold_run_root
from schemas.errors import BusyError

mode, rounds, seed, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
draw = random.Random(seed)

def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

def race(run_root, delay, wait_seconds, stay):
    time.sleep(delay)
    try:
        with hold_run_root(run_root, wait_seconds=wait_seconds):
            # The judge does not know locks: a link that only one can make, and that a dead holder leaves.
            evidence = run_root / "held-by"
            if evidence.is_symlink():
                if lives(os.readlink(evidence)):
                    os._exit(3)
                evidence.unlink()
            evidence.symlink_to(str(os.getpid()))
            time.sleep(stay)
            evidence.unlink()
    except BusyError:
        os._exit(1)
    except OSError:  # another made or removed the link meanwhile
        os._exit(3)
    os._exit(0)

counts = {0: 0, 1: 0, 3: 0, -9: 0}
for number in range(rounds):
    run_root = folder / str(number)
    racers = []
    for _ in range(4):
        delay, stay = draw.uniform(0, 0.05), draw.uniform(0, 0.03)
        wait_seconds = draw.choice([0.0, 0.0, 1.0])
        pid = os.fork()
        if pid == 0:
            race(run_root, delay, wait_seconds, stay)
        racers.append(pid)
    time.sleep(draw.uniform(0, 0.06))
    if mode == "lock file deleted":
        (run_root / "run.lock").unlink(missing_ok=True)
    if mode == "holder killed":
        os.kill(draw.choice(racers), signal.SIGKILL)
    for pid in racers:
        counts[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])] += 1
print(counts[0], counts[1], counts[3], counts[-9])
"""


@pytest.mark.stress
@pytest.mark.parametrize("rounds", [35, pytest.param(1000, marks=pytest.mark.hard)])
@pytest.mark.parametrize("mode", ["calm", "lock file deleted", "holder killed"])
def test_of_many_that_start_within_50_ms_never_two_hold(tmp_path: Path, mode: str, rounds: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RACE, mode, str(rounds), "7", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    held, refused, twice, killed = map(int, done.stdout.split())
    assert twice == 0
    assert held + refused + killed == 4 * rounds
    assert held >= 3 * rounds // 4, "hardly anybody got in"
    assert refused > 0
