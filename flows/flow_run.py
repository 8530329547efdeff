"""A run of the pipeline inside a flow of Prefect's: what `open_run` does, and what Prefect adds to it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.logging import get_run_logger

from flows.prefect_home import open_home_problem
from flows.preflight import Overrides, Run, open_run
from flows.secret_values import read_secret_block


@contextmanager
def open_flow_run(
    config_path: str,
    overrides: Overrides | None,
    *,
    first: str | None = None,
    last: str | None = None,
) -> Iterator[Run]:
    """`open_run` with secrets out of Prefect's blocks, and a warning where others can read Prefect's folder."""
    problem = open_home_problem(os.environ)
    if problem is not None:
        get_run_logger().warning(problem)
    with open_run(config_path, overrides, first=first, last=last, read_block=read_secret_block) as run:
        yield run
