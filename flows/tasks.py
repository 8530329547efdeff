"""One Prefect task a stage. They start and report; the work is done by `pipelines` and by the trainer's child.

Prefect may not retry, cache or persist anything: manifests alone decide what is done. Artifacts and logs carry
counts, never chat text.
"""

import logging
import sys
from collections.abc import Callable

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.preflight import Run
from flows.progress import run_with_progress, stage_line
from flows.show_examples import print_examples
from flows.tables import Table, stage_table, trainer_table
from flows.terminal import wants_color
from flows.training import Say, run_trainer
from pipelines.executors import close_workers
from pipelines.run_lock import check_still_held

Step = Callable[[Run], None]


def step(name: str, work: Callable[[Run, str], None]) -> Step:
    """`work` as a Prefect task called `name`, run in place when the run includes it.

    Called directly, never submitted: a thread's work can't be stopped, and a training child would survive.
    """

    def do(run: Run) -> None:
        check_still_held(run.lock, run.config.run_root)
        work(run, name)

    do.__name__ = do.__qualname__ = name  # Prefect tells tasks apart by their function's name
    as_task = task(name=name, retries=0, cache_policy=NO_CACHE, persist_result=False)(do)

    def step_or_nothing(run: Run) -> None:
        if name in run.stages:
            as_task(run)

    return step_or_nothing


def run_data_stage(run: Run, name: str) -> None:
    """A stage of the ETL in this process and its workers."""
    result = run_with_progress(name, run.config)
    speaker()(stage_line(result))
    publish(name, stage_table(result.manifest))


def run_trainer_stage(run: Run, name: str) -> None:
    """train, evaluate or promote: a child process that dies with this flow.

    Before training a person sees one example, what is trained set apart; a log of Prefect never does.
    """
    close_workers()  # the trainer wants their memory
    say = speaker()
    if name == "train" and say is _print:
        print_examples(
            run.config, num_examples=1, color=wants_color(None, stream=sys.stderr), file=sys.stderr
        )
    owner = flow_run.get_id() or ""
    lines = run_trainer(name, run.config.run_root, lock=run.lock, say=say, owner=owner, secrets=run.secrets)
    publish(name, trainer_table(name, run.config.run_root, lines=lines))


merge = step("merge", run_data_stage)
clean = step("clean", run_data_stage)
filter_rows = step("filter", run_data_stage)
dedup = step("dedup", run_data_stage)
holdout = step("holdout", run_data_stage)
split = step("split", run_data_stage)
pack = step("pack", run_data_stage)
train = step("train", run_trainer_stage)
evaluate = step("evaluate", run_trainer_stage)
promote = step("promote", run_trainer_stage)


def speaker() -> Say:
    """Where a run's lines go: through Prefect where its logger shows them, else to stderr.

    Bound here, in the flow's own thread: Prefect's context does not reach the thread that reads a child.
    """
    try:
        logger = get_run_logger()
    except MissingContextError:
        return _print
    return logger.info if logger.isEnabledFor(logging.INFO) else _print


def _print(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def publish(name: str, table: Table) -> None:
    """A table artifact keyed by stage, so that the interface shows its history over runs."""
    create_table_artifact(key=name, table=table, description=f"Stage {name}")
