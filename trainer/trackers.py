"""Where the numbers of a training go beside metrics.jsonl, by the names of train.trackers.

A tracker is a function here that opens it and gives back two more: `add` takes numbers of one step, `close` ends
it. Adding one is a function and a line in TRACKERS. They get numbers and names of settings, never a text of a chat.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from schemas.errors import RefusedError
from trainer.events import Events

TENSORBOARD_FOLDER = "tensorboard"


class Tracker(Protocol):
    """Open from the moment it is made. A step may be added in parts; steps never go back."""

    def add(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker may know of the training. Steps up to `num_steps_done` were added by an earlier process."""

    folder: Path
    key: str
    num_steps_done: int
    settings: Mapping[str, Any]


def open_trackers(names: Sequence[str], run: TrackedRun) -> list[Tracker]:
    """In the order of train.trackers. Raises RefusedError for one whose package is not installed."""
    return [TRACKERS[name](run) for name in names]


# Trackers ---------------------------------------------------------------------------------------------------


def open_tensorboard(run: TrackedRun) -> Tracker:
    """A file of events in the training's folder; steps that are done again replace those of a killed process."""
    _check_installed("tensorboard", remedy="pip install 'sft-pipeline[train]'")
    return Events(run.folder / TENSORBOARD_FOLDER, num_steps_done=run.num_steps_done)


def open_wandb(run: TrackedRun) -> Tracker:
    """Weights & Biases without a network: a folder that `wandb sync` uploads when its owner says so.

    A resumed training is a further run of the same group, since a run's steps can't be taken back offline.
    """
    _check_installed("wandb", remedy="pip install 'sft-pipeline[wandb]'")
    # Read when wandb is imported; offline, too, it would otherwise report its own use to its maker.
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    import wandb

    return _WandbTracker(
        wandb.init(
            mode="offline",  # wins over WANDB_MODE
            dir=run.folder,
            project=os.environ.get("WANDB_PROJECT", "sft-pipeline"),
            group=run.key,
            name=f"{run.key} after step {run.num_steps_done}",
            config=dict(run.settings),
            settings=_quiet_settings(wandb),
        )
    )


def _quiet_settings(wandb: Any) -> Any:
    """Nothing printed, nothing watched: no code, no git, no machine, no console."""
    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
    )


class _WandbTracker:
    """wandb's own process writes, so an error of the disk is in its log and not here."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
}


def _check_installed(package: str, *, remedy: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise RefusedError(
            f"train.trackers names {package}, which is not installed; {remedy}, or take it out of train.trackers"
        )
