"""`sft-pipeline deploy`: the work pool and every deployment of prefect.yaml, by Prefect's own commands."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from schemas.errors import ConfigError, SftPipelineError

POOL = "sft-pipeline"
TIMEOUT_SECONDS = 300


def deploy_all(prefect_file: Path) -> None:
    """Create the pool (a process at a time) and all deployments; twice is as good as once.

    Raises ConfigError without a prefect.yaml, SftPipelineError when a command of Prefect's fails.
    """
    if not prefect_file.is_file():
        raise ConfigError(
            f"no {prefect_file}: run this in the project's folder, or name the file with --prefect-file"
        )
    if "PREFECT_API_URL" not in os.environ:
        sys.stderr.write(
            "PREFECT_API_URL is not set: deploying to the server of your Prefect profile. For one of your own: "
            "`prefect server start`, then PREFECT_API_URL=http://127.0.0.1:4200/api\n"
        )
    create_pool()
    _prefect(
        ["--no-prompt", "deploy", "--all", "--prefect-file", prefect_file.name], folder=prefect_file.parent
    )
    sys.stderr.write(f"start a worker here: prefect worker start --pool {POOL}\n")
    print("prefect deployment run sft-pipeline/sft-pipeline")


def create_pool() -> None:
    """Unless it is there: a pool that the user has changed stays as it is."""
    try:
        _prefect(["work-pool", "create", POOL, "--type", "process"])
    except SftPipelineError as error:
        if "already exists" not in str(error):
            raise
        return
    _prefect(["work-pool", "set-concurrency-limit", POOL, "1"])


def _prefect(arguments: Sequence[str], folder: Path | None = None) -> None:
    environment = os.environ | {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    if result.returncode != 0:
        last = [line for line in result.stdout.splitlines() if line.strip()][-3:]
        raise SftPipelineError(f"`prefect {' '.join(arguments)}` failed: {' '.join(last)}")
