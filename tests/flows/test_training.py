"""The child process of training: heard, refused, killed, and never left behind. Real processes throughout."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from flows import training
from flows.training import Child, process_start, read_pid, run_child, stop_child, write_pid
from pipelines.run_lock import hold_run_root
from schemas.errors import BusyError, TrainingError, UsageError

ROOT = Path(__file__).parent.parent.parent
PATIENCE_SECONDS = 20.0

# Modules to be run as children. Each that sleeps writes its pid, and that of a grandchild, into its folder.
STAND_INS = {
    "speaks": "print('one'); import sys; print('two', file=sys.stderr); print('drei ü')",
    "refuses": "import sys; sys.exit(print('error: no such thing', file=sys.stderr) or 2)",
    "fails": "raise RuntimeError('loss is nan')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "sleeps": """
import os, pathlib, subprocess, sys, time
from pipelines.run_lock import exit_with_parent
exit_with_parent()
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {grandchild.pid}")
print("sleeping", flush=True)
time.sleep(300)
""",
    "deaf": """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(300)
""",
    "stopped": """
import os, pathlib, signal, sys
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
os.kill(os.getpid(), signal.SIGSTOP)
""",
    "leaves": """
import pathlib, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("gone")
""",
    "imports": "import trainer; print(trainer.__file__)",
    "locks": """
import os, pathlib, sys
from pipelines.run_lock import hold_run_root
with hold_run_root(pathlib.Path(sys.argv[1]), wait_seconds=0) as lock:
    print("held already" if str(lock[0]) in os.environ.get("SFT_PIPELINE_LOCK_FD", "") else "took the lock")
""",
}


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that children can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, program in STAND_INS.items():
        (folder / f"stand_in_{name}.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """The file that a sleeping child writes; whatever it names is gone after the test."""
    path = tmp_path / "pids"
    yield path
    for pid in read_pids(path):
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def read_pids(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    return process_start(pid) != ""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_SECONDS} s"
        time.sleep(0.05)


def run_stand_in(
    name: str, tmp_path: Path, *arguments: str, say: Callable[[str], None] = print, **more: object
) -> None:
    run_child([f"stand_in_{name}", *arguments], pid_path=tmp_path / "train.pid", lock=(), say=say, **more)  # type: ignore[arg-type]


def test_every_line_of_the_child_is_heard_whichever_stream_it_was_written_to(
    stand_ins: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    run_stand_in("speaks", tmp_path, say=lines.append)
    assert lines == ["one", "two", "drei ü"]
    assert not (tmp_path / "train.pid").exists()


def test_a_child_that_refuses_is_a_usage_error_with_its_own_words(stand_ins: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(UsageError, match=r"^no such thing$"):
        run_stand_in("refuses", tmp_path, say=lines.append)
    assert lines == [], "told once: by the error"


def test_a_child_that_fails_is_named_with_its_last_line(stand_ins: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"stand_in_fails.*exit code 1.*loss is nan"):
        run_stand_in("fails", tmp_path)


def test_a_child_that_was_killed_is_named_with_the_signal(stand_ins: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="SIGKILL"):
        run_stand_in("killed", tmp_path)


def test_what_a_child_leaves_in_its_group_is_killed_with_it(
    stand_ins: Path, tmp_path: Path, pids: Path
) -> None:
    started = time.monotonic()
    run_stand_in("leaves", tmp_path, str(pids))
    assert time.monotonic() - started < training.GRACE_SECONDS / 2, "it waited for the grandchild's output"
    wait_for(lambda: not any(map(alive, read_pids(pids))), "the end of the grandchild")


def test_a_child_works_under_the_lock_of_its_parent(stand_ins: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with hold_run_root(tmp_path, wait_seconds=0) as lock:
        run_child(["stand_in_locks", str(tmp_path)], pid_path=tmp_path / "p", lock=lock, say=lines.append)
    assert lines == ["held already"]


def test_a_folder_called_trainer_where_the_run_was_started_is_not_imported(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("raise SystemExit('the wrong trainer')")
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    run_stand_in("imports", tmp_path, say=lines.append)
    assert lines == [str(ROOT / "trainer" / "__init__.py")]


def test_an_interrupt_ends_the_whole_group_and_travels_on(
    stand_ins: Path, tmp_path: Path, pids: Path
) -> None:
    timer = threading.Timer(0, interrupt_when_written, args=[pids])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_stand_in("sleeps", tmp_path, str(pids))
    timer.join()
    assert len(read_pids(pids)) == 2
    wait_for(lambda: not any(map(alive, read_pids(pids))), "the end of the group")


def interrupt_when_written(pids: Path) -> None:
    wait_for(lambda: len(read_pids(pids)) > 0, "the start of the child")
    os.kill(os.getpid(), signal.SIGINT)


def test_a_child_that_is_deaf_to_sigterm_is_killed_after_the_time_of_grace(
    stand_ins: Path, tmp_path: Path, pids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "GRACE_SECONDS", 0.5)
    timer = threading.Timer(0, interrupt_when_written, args=[pids])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_stand_in("deaf", tmp_path, str(pids))
    timer.join()
    assert not any(map(alive, read_pids(pids)))


PARENT = """
import sys, threading
from pathlib import Path
from flows.training import run_child
from pipelines.run_lock import hold_run_root
folder, stand_in, thread = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def work(lock):
    run_child([f"stand_in_{stand_in}", str(folder / "pids")], pid_path=folder / "train.pid", lock=lock, say=print,
              owner="me")
with hold_run_root(folder, wait_seconds=0) as lock:
    if thread == "main":
        work(lock)
    else:
        thread = threading.Thread(target=work, args=[lock])
        thread.start()
        thread.join()
"""


@contextmanager
def parent_of(
    stand_in: str, *, thread: str, stand_ins: Path, folder: Path
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that holds `folder` as its run root and has a child, started from its main or another thread."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{stand_ins}"}
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(folder), stand_in, thread], env=environment)
    try:
        wait_for(lambda: len(read_pids(folder / "pids")) > 0, "the start of the child")
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("thread", ["main", "other"])
def test_no_child_outlives_a_parent_that_was_killed(
    stand_ins: Path, tmp_path: Path, pids: Path, thread: str
) -> None:
    with parent_of("sleeps", thread=thread, stand_ins=stand_ins, folder=tmp_path) as parent:
        child = read_pids(pids)[0]
        assert psutil.Process(child).ppid() == parent.pid
        parent.kill()
        parent.wait()
        wait_for(lambda: not alive(child), "the end of the child")


def test_a_child_whose_threads_get_no_turn_dies_with_a_parent_that_started_it_from_its_main_thread(
    stand_ins: Path, tmp_path: Path, pids: Path
) -> None:
    with parent_of("stopped", thread="main", stand_ins=stand_ins, folder=tmp_path) as parent:
        parent.kill()
        parent.wait()
        wait_for(lambda: not any(map(alive, read_pids(pids))), "the end of the child")


def test_a_child_that_lives_on_keeps_the_run_root(stand_ins: Path, tmp_path: Path, pids: Path) -> None:
    with parent_of("stopped", thread="other", stand_ins=stand_ins, folder=tmp_path) as parent:
        parent.kill()
        parent.wait()
        with pytest.raises(BusyError), hold_run_root(tmp_path, wait_seconds=0.5):
            pass
        os.kill(read_pids(pids)[0], signal.SIGKILL)
        with hold_run_root(tmp_path, wait_seconds=PATIENCE_SECONDS):
            pass


def test_another_process_ends_the_child_of_its_own_flow_run_only(
    stand_ins: Path, tmp_path: Path, pids: Path
) -> None:
    with parent_of("sleeps", thread="main", stand_ins=stand_ins, folder=tmp_path) as parent:
        wait_for(lambda: read_pid(tmp_path / "train.pid") is not None, "the writing of train.pid")
        assert stop_child(tmp_path, owner="somebody else") is False
        assert all(map(alive, read_pids(pids)))
        assert stop_child(tmp_path, owner="me") is True
        wait_for(lambda: not any(map(alive, read_pids(pids))), "the end of the group")
        parent.wait(PATIENCE_SECONDS)
        assert stop_child(tmp_path, owner="me") is False


def test_a_pid_that_was_given_anew_is_not_killed(tmp_path: Path) -> None:
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True
    )
    try:
        write_pid(tmp_path / "train.pid", Child(bystander.pid, "12345", "me"))
        assert stop_child(tmp_path, owner="me") is False
        assert bystander.poll() is None
        write_pid(tmp_path / "train.pid", Child(bystander.pid, process_start(bystander.pid), "me"))
        assert stop_child(tmp_path, owner="me") is True
        assert bystander.wait() == -signal.SIGTERM
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"12\n", b'{"pid": "x", "started": "1", "owner": ""}', b"[1]"]
)
def test_a_pid_file_that_is_not_ours_names_nobody(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.pid").write_bytes(content)
    assert read_pid(tmp_path / "train.pid") is None
    assert read_pid(tmp_path / "absent.pid") is None
