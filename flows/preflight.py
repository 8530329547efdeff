"""Everything that is asked before the first stage: what can't work is refused while nothing has been done yet."""

import difflib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.packages import check_packages
from flows.parent_watch import FLOW_RUN_VARIABLE, end_with_worker
from flows.secret_values import ReadBlock, secret_variables
from pipelines.run_lock import Lock, hold_run_root
from schemas.config_file import load_config
from schemas.errors import ConfigError, RefusedError
from schemas.pipeline_config import PipelineConfig
from schemas.run import RESOLVED_CONFIG_NAME, STAGES

TRAINER_STAGES = ("train", "evaluate", "promote")
ALL_STAGES = (*STAGES, *TRAINER_STAGES)
TORCH_STAGES = ("train", "evaluate")

Overrides = Mapping[str, Any] | Sequence[str]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the pipeline: what it is to do, and the lock that it holds."""

    config: PipelineConfig
    stages: tuple[str, ...]
    lock: Lock
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables for the trainer alone: engine.secret_env with its values. Never in a log, a file or a repr."""


@contextmanager
def open_run(
    config_path: str | Path,
    overrides: Overrides | None = None,
    *,
    first: str | None = None,
    last: str | None = None,
    read_block: ReadBlock | None = None,
) -> Iterator[Run]:
    """Check everything, take the run root, write its resolved config; the lock is held until the block ends.

    `read_block` asks Prefect for a secret; None in commands without Prefect. Raises the errors of
    schemas/errors.py.
    """
    check_packages()
    end_with_worker()
    config = load_config(Path(config_path), overrides or ())
    stages = chosen_stages(first, last)
    check_before_start(config, stages)
    needs_secrets = any(stage in stages for stage in TRAINER_STAGES)
    secrets = secret_variables(config.engine.secret_env, read_block) if needs_secrets else {}
    with hold(config) as lock:
        yield Run(config, stages, lock, secrets)


@contextmanager
def hold(config: PipelineConfig) -> Iterator[Lock]:
    """Hold the run root of a config and leave the resolved config in it, for children and for people.

    Worker processes hold it too, and none is left at the end of the block.
    """
    from pipelines.executors import workers_hold
    from pipelines.storage import write_json

    with (
        hold_run_root(
            config.run_root,
            wait_seconds=config.engine.lock_wait_seconds,
            flow_run=os.environ.get(FLOW_RUN_VARIABLE, ""),
        ) as lock,
        workers_hold(lock),
    ):
        write_json(config.run_root / RESOLVED_CONFIG_NAME, config.model_dump(mode="json"))
        yield lock


def chosen_stages(first: str | None, last: str | None) -> tuple[str, ...]:
    """The stages from `first` to `last`, both included; None is the story's beginning and end."""
    begin = stage_number(first) if first else 0
    end = stage_number(last) if last else len(ALL_STAGES) - 1
    if begin > end:
        raise ConfigError(f"stage {first!r} comes after {last!r}: the order is {', '.join(ALL_STAGES)}")
    return ALL_STAGES[begin : end + 1]


def stage_number(name: str) -> int:
    """Place of a stage in the story. Raises ConfigError with the nearest name."""
    if name not in ALL_STAGES:
        near = difflib.get_close_matches(name, ALL_STAGES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(ALL_STAGES)}"
        raise ConfigError(f"unknown stage {name!r}; {hint}")
    return ALL_STAGES.index(name)


def check_before_start(config: PipelineConfig, stages: Sequence[str]) -> None:
    """Refuse now what would fail hours later: no tokenizer, no torch, settings that can't go together, no earlier
    run, no disk."""
    from pipelines.limits import check_free_disk
    from pipelines.stage import check_earlier_run

    check_settings(config, stages)
    for root in config.earlier_runs if "dedup" in stages else ():
        check_earlier_run(config, root)
    check_free_disk(config)


def check_settings(config: PipelineConfig, stages: Sequence[str]) -> None:
    """What can be refused without touching the run root."""
    if "split" in stages:
        _check_tokenizer(config)
    if any(stage in stages for stage in TORCH_STAGES):
        _check_trainer(config)


def _check_tokenizer(config: PipelineConfig) -> None:
    if config.model is None:
        raise ConfigError(
            "'model.path' is missing: the stage split needs its tokenizer; set it, or stop earlier with "
            "--until holdout"
        )
    from pipelines.split import preflight

    preflight(config)


def _check_trainer(config: PipelineConfig) -> None:
    if config.model is None:
        raise ConfigError("'model.path' is missing: name the folder of the model to train")
    if importlib.util.find_spec("torch") is None:
        raise RefusedError(
            "torch is not installed, training needs it: pip install 'sft-pipeline[train]', or stop at the "
            "shards with --until pack"
        )
    from trainer.support import check_supported, model_folder

    model_folder(config.model.path, config.model.revision)
    check_supported(config)
