"""What a step's numbers and a validation's mean for the training: skipped or not, given up, best so far, enough.

Pure functions of Progress, which a checkpoint holds: a training that goes on after a kill decides as the unbroken one,
and all ranks, which have the same numbers, decide the same.
"""

import dataclasses
import math
import statistics

from schemas.errors import TrainingError
from schemas.training_config import TrainConfig
from trainer.checkpoint import Progress
from trainer.optimizers import Limits
from trainer.stepping import StepOutcome
from trainer.steps import Step

WINDOW_STEPS = 64
"""So many of the last steps that were not skipped say what is usual."""
FEWEST_STEPS = 16
"""Before that nothing is a spike: the first losses fall fast."""


def limits(progress: Progress, train: TrainConfig) -> Limits:
    """What the next step's loss and gradient norm may be."""
    return Limits(
        loss=_limit(progress.recent_losses, train.max_loss_spike),
        grad_norm=_limit(progress.recent_grad_norms, train.max_grad_spike),
    )


def _limit(recent: tuple[float, ...], ratio: float) -> float:
    if ratio == 0 or len(recent) < FEWEST_STEPS:
        return math.inf
    return ratio * statistics.median(recent)


def advance(progress: Progress, step: Step, outcome: StepOutcome) -> Progress:
    """After a step."""
    loss = outcome.loss if outcome.is_finite else None
    was_updated = outcome.is_finite and not outcome.is_spike and step.weight_sum > 0
    return dataclasses.replace(
        progress,
        num_steps=progress.num_steps + 1,
        num_updates=progress.num_updates + was_updated,
        num_nonfinite_steps=progress.num_nonfinite_steps
        + (not outcome.is_finite and not outcome.is_overflow),
        num_spike_steps=progress.num_spike_steps + outcome.is_spike,
        num_tokens=progress.num_tokens + step.num_tokens,
        num_trained_tokens=progress.num_trained_tokens + step.num_trained_tokens,
        first_loss=loss if progress.num_steps == 0 else progress.first_loss,
        last_loss=loss,
        recent_losses=_with(progress.recent_losses, outcome.loss, was_updated),
        recent_grad_norms=_with(progress.recent_grad_norms, outcome.grad_norm, was_updated),
    )


def _with(recent: tuple[float, ...], value: float, was_updated: bool) -> tuple[float, ...]:
    return (*recent, value)[-WINDOW_STEPS:] if was_updated else recent


def check_progress(progress: Progress, train: TrainConfig) -> None:
    """Raises TrainingError after too many skipped steps."""
    if progress.num_nonfinite_steps > train.max_nonfinite_steps:
        raise TrainingError(
            f"loss or gradient was not finite in {progress.num_nonfinite_steps} of {progress.num_steps} steps, "
            f"allowed are {train.max_nonfinite_steps}; lower train.learning_rate, or use model.dtype: float32"
        )
    if progress.num_spike_steps > train.max_spike_steps:
        raise TrainingError(
            f"loss or gradient was far above the last steps' in {progress.num_spike_steps} of {progress.num_steps} "
            f"steps, allowed are {train.max_spike_steps} (train.max_spike_steps); lower train.learning_rate, or raise "
            "train.max_loss_spike and train.max_grad_spike"
        )


# Validations ------------------------------------------------------------------------------------------------


def judged(progress: Progress, train: TrainConfig) -> Progress:
    """After a validation: whether it is the best one so far, and since when none was better."""
    value: float | None = getattr(progress, train.best_metric)
    if value is not None and (progress.best_value is None or _is_better(value, progress.best_value, train)):
        return dataclasses.replace(
            progress, best_value=value, best_step=progress.num_steps, num_validations_since_best=0
        )
    return dataclasses.replace(progress, num_validations_since_best=progress.num_validations_since_best + 1)


def _is_better(value: float, best: float, train: TrainConfig) -> bool:
    return value > best if train.best_metric == "validation_token_accuracy" else value < best


def is_new_best(progress: Progress, train: TrainConfig) -> bool:
    """Whether the weights of this step are to be kept as the best ones."""
    return train.keep_best and progress.best_step == progress.num_steps


def has_stopped_early(progress: Progress, train: TrainConfig) -> bool:
    """Whether enough validations have gone by without a better one."""
    return 0 < train.early_stopping_evaluations <= progress.num_validations_since_best
