"""Where parts are worked on: in this process, or in worker processes that are kept over stages.

Workers are spawned, never forked: a fork of a process with threads (Polars, tokenizers, Prefect) can hang.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from schemas.errors import SftPipelineError, WorkerError

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_POOL_REBUILDS = 3
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    num_workers: int,
    label: Callable[[Task], str],
) -> Iterator[tuple[int, Result]]:
    """Yield (index, result) as tasks end, in any order. `function` must be importable by name.

    A worker that dies takes the pool with it: the pool is rebuilt and only unfinished tasks run again.
    Raises WorkerError naming the task, or the error of our own tree that the task raised.
    """
    workers = num_workers or os.cpu_count() or 1
    if workers == 1 or len(tasks) <= 1:
        for index, task in enumerate(tasks):
            yield index, _call(function, task, label)
        return
    waiting = dict(enumerate(tasks))
    for attempt in range(MAX_POOL_REBUILDS + 1):
        try:
            yield from _drain(function, waiting, workers, label)
            return
        except BrokenProcessPool:
            close_workers()
            if attempt == MAX_POOL_REBUILDS:
                raise WorkerError(_died(waiting, label)) from None


def close_workers() -> None:
    """Stop the kept workers; the next use starts new ones."""
    for pool in _pools.values():
        pool.shutdown(wait=False, cancel_futures=True)
    _pools.clear()


def _drain(
    function: Callable[[Task], Result], waiting: dict[int, Task], workers: int, label: Callable[[Task], str]
) -> Iterator[tuple[int, Result]]:
    pool = _pool(workers)
    running: dict[Future[Result], int] = {pool.submit(function, task): i for i, task in waiting.items()}
    try:
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                result = _result(future, label(waiting[index]))
                del waiting[index]
                yield index, result
    finally:
        for future in running:
            future.cancel()


def _result(future: "Future[Result]", label: str) -> Result:
    try:
        return future.result()
    except (SftPipelineError, BrokenProcessPool):
        raise
    except Exception as error:
        raise WorkerError(f"{label}: {type(error).__name__}: {error}") from error


def _call(function: Callable[[Task], Result], task: Task, label: Callable[[Task], str]) -> Result:
    try:
        return function(task)
    except SftPipelineError:
        raise
    except Exception as error:
        raise WorkerError(f"{label(task)}: {type(error).__name__}: {error}") from error


def _died(waiting: dict[int, Task], label: Callable[[Task], str]) -> str:
    names = ", ".join(label(task) for task in list(waiting.values())[:3])
    return (
        f"worker processes died {MAX_POOL_REBUILDS + 1} times at {names}: killed for memory? "
        "Try engine.workers: 1 and look at the kernel's log"
    )


_pools: dict[int, ProcessPoolExecutor] = {}


def _pool(workers: int) -> ProcessPoolExecutor:
    if workers not in _pools:
        close_workers()
        _pools[workers] = ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
        )
        atexit.register(close_workers)
    return _pools[workers]


def _start_worker() -> None:
    os.environ.update(ONE_THREAD)
    # Ctrl-C reaches the whole group: the parent tells of it, a worker ends without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # Each worker of a ProcessPoolExecutor holds the write end of its own queue, so a killed parent is never
    # noticed there (cpython 111873): workers would wait for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"
    parent.join()
    os._exit(1)
