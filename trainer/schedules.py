"""Learning rates: a function of the step alone, so a resumed training needs no state of theirs."""

import math
from collections.abc import Callable

from schemas.training_config import TrainConfig


def learning_rate(train: TrainConfig, step: int, num_steps: int) -> float:
    """Rate of step `step` (from 0) of `num_steps`.

    Warm-up rises in equal parts and never starts at 0; the decay starts at the full rate and would reach its
    end at step `num_steps`. With w warm-up steps this is transformers' schedule of w + 1 warm-up and
    `num_steps` + 1 steps, one step later: no step is spent at rate 0.
    """
    warmup_steps = num_warmup_steps(train, num_steps)
    if step < warmup_steps:
        return train.learning_rate * (step + 1) / (warmup_steps + 1)
    share = SCHEDULES[train.schedule](train, step - warmup_steps, max(num_steps - warmup_steps, 1), num_steps)
    if train.schedule != "constant":
        floor = train.min_learning_rate_share
        share = floor + (1.0 - floor) * share
    return train.learning_rate * share


def num_warmup_steps(train: TrainConfig, num_steps: int) -> int:
    if train.warmup_steps is not None:
        return min(train.warmup_steps, num_steps)
    return math.ceil(train.warmup_share * num_steps)


# Each: step after the warm-up, number of those steps, number of all steps -> share of the full rate ---------------


def _constant(train: TrainConfig, step: int, num_after_warmup: int, num_steps: int) -> float:
    return 1.0


def _linear(train: TrainConfig, step: int, num_after_warmup: int, num_steps: int) -> float:
    return 1.0 - min(step / num_after_warmup, 1.0)


def _cosine(train: TrainConfig, step: int, num_after_warmup: int, num_steps: int) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(step / num_after_warmup, 1.0)))


def _warmup_stable_decay(train: TrainConfig, step: int, num_after_warmup: int, num_steps: int) -> float:
    """Source: Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations (2024)."""
    num_decaying = max(round(train.decay_share * num_after_warmup), 1)
    done = step - (num_after_warmup - num_decaying)
    return 1.0 - math.sqrt(done / num_decaying) if done > 0 else 1.0


def _step(train: TrainConfig, step: int, num_after_warmup: int, num_steps: int) -> float:
    length = train.step_decay_steps or math.ceil(num_steps / train.epochs)
    return float(train.step_decay_factor ** (step // length))


SCHEDULES: dict[str, Callable[[TrainConfig, int, int, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _warmup_stable_decay,
    "step": _step,
}
