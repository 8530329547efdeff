"""A flow ends with the Prefect worker that started it: nobody would hear it, stop it or tell of its end.

Prefect starts a flow as a plain child of the worker, which outlives a worker that was killed: a training would go
on for hours, holding its run root, and fail at its first line of output. Two things tell of the worker's end: a
descriptor of the parent process, and the pipe that the flow's output goes into, which has no reader any more (this
one also tells of an end before we began to watch).
"""

import functools
import os
import select
import signal
import stat
import sys
import threading
import time

FLOW_RUN_VARIABLE = "PREFECT__FLOW_RUN_ID"
"""Set by Prefect's workers in the process of a flow run."""
GRACE_SECONDS = 25.0
"""From SIGTERM to the end: longer than the training child gets, shorter than a run that waits for the lock."""


@functools.cache  # once in a process is enough, however many flows it runs
def end_with_worker() -> None:
    """In the process of a flow that a worker started: have Prefect's own SIGTERM handling end it with the worker."""
    if FLOW_RUN_VARIABLE not in os.environ:
        return
    watched = select.poll()
    if sys.platform == "linux":
        watched.register(os.pidfd_open(os.getppid()), select.POLLIN)
    if stat.S_ISFIFO(os.fstat(1).st_mode):
        watched.register(1, 0)  # errors alone: nobody reads
    threading.Thread(target=_end_after, args=(watched,), daemon=True).start()


def _end_after(watched: "select.poll") -> None:
    watched.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)  # the main thread is in a call that hears no signal, or waits for a server that is gone too
