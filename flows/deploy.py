"""`sft-pipeline deploy` and `undeploy`: the work pool, every deployment of prefect.yaml, the rule for dead runs."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.local_prefect import QUIET
from flows.prefect_home import open_home_problem
from schemas.errors import ConfigError, SftPipelineError

POOL = "sft-pipeline"
TIMEOUT_SECONDS = 300


def deploy_all(prefect_file: Path) -> None:
    """Create the pool (a process at a time), all deployments and the rule; twice is as good as once.

    Raises ConfigError without a prefect.yaml, SftPipelineError when a command of Prefect's fails.
    """
    if not prefect_file.is_file():
        raise ConfigError(
            f"no {prefect_file}: run this in the project's folder, or name the file with --prefect-file"
        )
    _set_up_prefect()
    problem = open_home_problem(os.environ)
    if problem is not None:
        sys.stderr.write(f"warning: {problem}\n")
    create_pool()
    _prefect(
        ["--no-prompt", "deploy", "--all", "--prefect-file", prefect_file.name], folder=prefect_file.parent
    )
    _create_rules()
    sys.stderr.write(f"start a worker here: prefect worker start --pool {POOL}\n")
    print("prefect deployment run sft-pipeline/sft-pipeline")


def undeploy_all() -> None:
    """Remove what `deploy_all` made; twice is as good as once."""
    _set_up_prefect()
    from prefect.client.orchestration import get_client

    from flows.undeploy import remove_all

    with get_client(sync_client=True) as client:
        removed = remove_all(client, POOL)
    sys.stderr.write(f"removed: {', '.join(removed) or 'nothing, there was nothing of ours'}\n")


def create_pool() -> None:
    """Unless it is there: a pool that the user has changed stays as it is."""
    try:
        _prefect(["work-pool", "create", POOL, "--type", "process"])
    except SftPipelineError as error:
        if "already exists" not in str(error):
            raise
        return
    _prefect(["work-pool", "set-concurrency-limit", POOL, "1"])


def _create_rules() -> None:
    from prefect.client.orchestration import get_client

    from flows.automations import create_rules

    with get_client(sync_client=True) as client:
        create_rules(client)


def _set_up_prefect() -> None:
    """Quiet, before it is imported here or in a child; a word about which server this will be."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if "PREFECT_API_URL" not in os.environ:
        sys.stderr.write(
            "PREFECT_API_URL is not set: this is about the server of your Prefect profile. For one of your own: "
            "`prefect server start`, then PREFECT_API_URL=http://127.0.0.1:4200/api\n"
        )


def _prefect(arguments: Sequence[str], folder: Path | None = None) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if result.returncode != 0:
        last = [line for line in result.stdout.splitlines() if line.strip()][-3:]
        raise SftPipelineError(f"`prefect {' '.join(arguments)}` failed: {' '.join(last)}")
