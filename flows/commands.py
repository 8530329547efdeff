"""What the commands `run`, `step`, `train`, ... do. Prefect is imported by `run` alone, torch by none of them."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flows.exit_codes import debugging
from flows.preflight import check_before_start, chosen_stages, open_run
from flows.progress import run_with_progress, stage_line
from schemas.config_file import load_config
from schemas.run import RESOLVED_CONFIG_NAME, STAGE_FOLDERS, STAGES


def run_pipeline(config_path: Path, overrides: Sequence[str], *, first: str | None, last: str | None) -> None:
    """The flow `sft-pipeline` in this process; prints the run root.

    Prefect's server, which takes seconds to come up, does so while what can't work is being refused.
    """
    from flows.local_prefect import start_local_prefect

    config = load_config(config_path, overrides)
    stages = chosen_stages(first, last)
    wait_for_prefect = start_local_prefect(config.run_root, debug=debugging())
    check_before_start(config, stages)
    wait_for_prefect()
    from prefect.exceptions import TerminationSignal

    from flows.sft_pipeline import sft_pipeline

    try:
        sft_pipeline(str(config_path), list(overrides), from_stage=first, until=last)
    except TerminationSignal as signal:
        sys.exit(128 + signal.signal)
    print(config.run_root)


def dry_run_pipeline(
    config_path: Path, overrides: Sequence[str], *, first: str | None, last: str | None
) -> None:
    """Prints a line a stage: what would run, and why. Writes nothing."""
    from pipelines.stage import plan_stages

    config = load_config(config_path, overrides)
    stages = chosen_stages(first, last)
    for name, what in plan_stages([stage for stage in stages if stage in STAGES], config):
        print(f"{name:<10} {what}")
    for name in stages:
        if name not in STAGES:
            print(f"{name:<10} runs unless shards, plan, model and settings are those of its last result")


def run_step(first: str, config_path: Path, overrides: Sequence[str], *, last: str) -> None:
    """Data stages `first` to `last` in this process; prints the folder of the last."""
    with open_run(config_path, overrides, first=first, last=last) as run:
        for stage in chosen_stages(first, last):
            result = run_with_progress(stage, run.config)
            sys.stderr.write(stage_line(result) + "\n")
        print(run.config.run_root / STAGE_FOLDERS[last])


def run_trainer_here(command: str, config_path: Path, overrides: Sequence[str], *more: str) -> None:
    """`python -m trainer.launch COMMAND` in this very process, under the lock of the run root."""
    with open_run(config_path, overrides, first=command, last=command) as run:
        from pipelines.run_lock import lock_variables
        from trainer.launch import main

        os.environ.update(lock_variables(run.lock))  # the trainer finds the lock held, as a child would
        main([command, "--config", str(run.config.run_root / RESOLVED_CONFIG_NAME), *more])
