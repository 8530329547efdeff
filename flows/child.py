"""Start of every child process: `python flows/child.py MODULE ARGUMENT...` runs MODULE as `python -m` would.

Before that, three things that must be done inside the child. A thread waits for the end of the parent pipe, which
is the end of the parent, however it died. The parent-death signal is a belt over that: it also ends a child that
never gives its threads a turn; it is asked for only by a parent that starts us from its main thread, since it
fires when the *thread* that forked us ends. And our own folder goes first on the import path: `-m` would put the
working directory there, where a folder called `trainer` may lie.
"""

import ctypes
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

PARENT_FD_VARIABLE = (
    "SFT_PIPELINE_PARENT_FD"  # pipelines.run_lock has it too; that costs too much to import here
)
DEATH_SIGNAL_VARIABLE = "SFT_PIPELINE_DEATH_SIGNAL_FROM"
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Arm, then become the module that the first argument names."""
    parent = os.environ.pop(DEATH_SIGNAL_VARIABLE, None)
    if parent is not None and sys.platform == "linux":
        _die_with(int(parent))
    pipe = os.environ.get(PARENT_FD_VARIABLE)
    if pipe is not None:
        threading.Thread(target=_wait_for_end, args=(int(pipe),), daemon=True).start()
    sys.argv = sys.argv[1:]
    our_folder = str(Path(__file__).resolve().parent.parent)
    if our_folder in sys.path[1:]:  # installed: ahead of the standard library it could shadow that
        del sys.path[0]
    else:
        sys.path[0] = our_folder
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _wait_for_end(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os._exit(1)


def _die_with(parent: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # Not retroactive: a parent that died before the call above is noticed here.
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
