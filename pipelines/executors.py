"""Where parts are worked on: in this process, or in worker processes that are kept over stages.

Workers are spawned, never forked: a fork of a process with threads (Polars, tokenizers, Prefect) can hang.
None may write after its run has ended. So they are killed when a stage ends early (an error, Ctrl-C, a cancel);
each ends itself when its parent is gone; and until it has, it holds the run root that the parent held.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection, reduction
from typing import Any, TypeVar

from pipelines.disk_errors import is_disk_error, storage_error
from pipelines.left_out import prepare_data_alone
from schemas.errors import SftPipelineError, WorkerError

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_POOL_REBUILDS = 3
# So many tasks a worker are handed over before the first has ended: none waits for the next, and waiting for one of
# them costs the same however many there are.
_TASKS_AHEAD = 8
END_SECONDS = 10.0
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "POLARS_MAX_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    *,
    num_workers: int,
    label: Callable[[Task], str],
) -> Generator[tuple[int, Result], None, None]:
    """Yield (index, result) as tasks end, in any order. `function` must be importable by name.

    Tasks that are made one after another (an iterator) are made while workers work on the first of them.
    A worker that dies takes the pool with it: the pool is rebuilt and only unfinished tasks run again.
    Raises WorkerError naming the task, or the error of our own tree that the task raised.
    """
    workers = num_workers or os.cpu_count() or 1
    if workers == 1 or (isinstance(tasks, Sequence) and len(tasks) <= 1):
        for index, task in enumerate(tasks):
            yield index, _call(function, task, label)
        return
    coming, waiting = enumerate(tasks), dict[int, Task]()
    for attempt in range(MAX_POOL_REBUILDS + 1):
        try:
            yield from _drain(function, waiting, coming, workers, label)
            return
        except BrokenProcessPool:
            close_workers()
            if attempt == MAX_POOL_REBUILDS:
                raise WorkerError(_died(waiting, label)) from None


@contextmanager
def workers_hold(descriptors: Sequence[int]) -> Iterator[None]:
    """Workers that start in this block have these descriptors of ours too; at its end no worker is left."""
    close_workers()
    _inherited.extend(descriptors)
    try:
        yield
    finally:
        _inherited.clear()
        close_workers()


def close_workers() -> None:
    """Kill the kept workers and wait for their end; the next use starts new ones."""
    while _pools:
        _, pool = _pools.popitem()
        # A graceful shutdown would wait for parts that nobody wants any more. The attribute is private, but
        # it is the only way to the processes before Python 3.14.
        processes = list((pool._processes or {}).values())
        for process in processes:
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        # Not join(): the pool's own thread is joining them too, and only one of the two is told.
        for process in processes:
            connection.wait([process.sentinel], END_SECONDS)


def _drain(
    function: Callable[[Task], Result],
    waiting: dict[int, Task],
    coming: Iterator[tuple[int, Task]],
    workers: int,
    label: Callable[[Task], str],
) -> Iterator[tuple[int, Result]]:
    """`waiting`: what was taken from `coming` and has not ended, here or in a pool that broke."""
    pool = _pool(workers)
    running: dict[Future[Result], int] = {pool.submit(function, task): i for i, task in waiting.items()}
    try:
        while True:
            for index, task in islice(coming, max(0, _TASKS_AHEAD * workers - len(running))):
                waiting[index] = task
                running[pool.submit(function, task)] = index
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                result = _result(future, label(waiting[index]))
                del waiting[index]
                yield index, result
    finally:
        if running:  # left early: what still works would write after the end of its run
            close_workers()


def _result(future: "Future[Result]", label: str) -> Result:
    try:
        return future.result()
    except (SftPipelineError, BrokenProcessPool):
        raise
    except Exception as error:
        raise _failure(error, label) from error


def _call(function: Callable[[Task], Result], task: Task, label: Callable[[Task], str]) -> Result:
    try:
        return function(task)
    except SftPipelineError:
        raise
    except Exception as error:
        raise _failure(error, label(task)) from error


def _failure(error: Exception, label: str) -> SftPipelineError:
    if is_disk_error(error):
        return storage_error(error, label)
    if isinstance(error, MemoryError):
        return WorkerError(
            f"{label}: out of memory ({error or 'no more could be had'}); lower engine.workers or merge.part_bytes, "
            "or raise the limit of this process (ulimit -v), then run again"
        )
    return WorkerError(f"{label}: {type(error).__name__}: {error}")


def _died(waiting: dict[int, Task], label: Callable[[Task], str]) -> str:
    names = ", ".join(label(task) for task in list(waiting.values())[:3])
    return (
        f"worker processes died {MAX_POOL_REBUILDS + 1} times at {names}: killed for memory? "
        "Try engine.workers: 1 and look at the kernel's log"
    )


_pools: dict[int, ProcessPoolExecutor] = {}
_inherited: list[int] = []


def _pool(workers: int) -> ProcessPoolExecutor:
    if workers not in _pools:
        close_workers()
        _pools[workers] = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(_Inherited(tuple(_inherited)),),
        )
    return _pools[workers]


atexit.register(close_workers)


class _Inherited:
    """Descriptors that a spawned process gets as they are, open as long as it lives: pickled at its start."""

    def __init__(self, descriptors: tuple[int, ...]) -> None:
        self.descriptors = descriptors

    def __reduce__(self) -> tuple[Any, ...]:
        # DupFd hands a descriptor over only while a process is being spawned, which is when this is called.
        return _Inherited, (tuple(reduction.DupFd(number).detach() for number in self.descriptors),)


def _start_worker(inherited: _Inherited) -> None:
    os.environ.update(ONE_THREAD)
    prepare_data_alone()
    # Ctrl-C reaches the whole group: the parent tells of it, a worker ends without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    exit_with_starter()


def exit_with_starter() -> None:
    """In a process that multiprocessing started: end at once when the one that started it is gone."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # Each worker of a ProcessPoolExecutor holds the write end of its own queue, so a killed parent is never
    # noticed there (cpython 111873): workers would wait for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"
    parent.join()
    os._exit(1)
