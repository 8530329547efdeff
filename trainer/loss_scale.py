"""Loss scaling for fp16: gradients below 6e-8 would be 0 there, so the loss is multiplied before the backward pass.

The factor is a power of two, halved when a gradient overflows, doubled after many steps in which none did. A step
that overflows is skipped, which is how the largest factor that fits is found, and no sign of trouble: it is counted
apart. The state stands in the training's progress, so a resumed training goes on with the same factor.
Source: Micikevicius et al., Mixed Precision Training (2018).
"""

import dataclasses
import math

import torch

from trainer.checkpoint import Progress

INITIAL_SCALE = 2.0**16
MIN_SCALE = 1.0
MAX_SCALE = 2.0**24
GROWTH_STEPS = 2000
"""Steps without an overflow until a larger factor is tried."""


def loss_scale(progress: Progress, dtype: torch.dtype) -> float:
    """What the next step multiplies its loss by; 1 unless it computes in fp16."""
    if dtype != torch.float16:
        return 1.0
    return progress.loss_scale if progress.loss_scale is not None else INITIAL_SCALE


def is_overflow(loss: float, grad_norm: float, scale: float) -> bool:
    """Whether a smaller factor would have helped: a loss that is not finite is another trouble."""
    return scale > MIN_SCALE and math.isfinite(loss) and not math.isfinite(grad_norm)


def after_step(progress: Progress, scale: float, *, overflowed: bool) -> Progress:
    """The progress with the factor for the step that follows."""
    if overflowed:
        return dataclasses.replace(
            progress,
            num_overflow_steps=progress.num_overflow_steps + 1,
            loss_scale=max(scale / 2, MIN_SCALE),
            num_steps_at_scale=0,
        )
    num_steps = progress.num_steps_at_scale + 1
    if num_steps < GROWTH_STEPS:
        return dataclasses.replace(progress, loss_scale=scale, num_steps_at_scale=num_steps)
    return dataclasses.replace(progress, loss_scale=min(scale * 2, MAX_SCALE), num_steps_at_scale=0)
