"""One optimiser step on this rank: its share of the micro-steps, then one update with all ranks."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch

from trainer.data import MicroBatch
from trainer.draws import Row, draw_seed, drawing_for
from trainer.job import Job
from trainer.loss import summed_loss
from trainer.loss_scale import is_overflow
from trainer.optimizers import NO_LIMITS, Limits, Optimizer
from trainer.padding import computed_batches
from trainer.schedules import learning_rate
from trainer.steps import MicroStep, Step, micro_steps
from trainer.virtual_tokens import num_prepended_tokens

OUT_OF_MEMORY_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
CUDA_PAD_MULTIPLE = 128
"""Rows of few different lengths: tensor cores stay full and the allocator's blocks fit again."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    loss: float
    grad_norm: float
    learning_rate: float
    is_overflow: bool = False
    """The gradient was too large for fp16 under this step's loss scale."""
    is_spike: bool = False
    """Finite, and skipped."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class MicroStepError(Exception):
    """Memory has run out inside a micro-step: nothing is updated yet."""


def run_step(
    job: Job,
    model: torch.nn.Module,
    optimizer: Optimizer,
    step: Step,
    *,
    limits: Limits = NO_LIMITS,
    bins_at_once: int | None = None,
    loss_scale: float = 1.0,
) -> StepOutcome:
    """The step's loss is the weighted mean over its trained tokens, on whichever rank they are; its divisor is
    known from the plan. Weights change if the limits allow its loss and gradient.

    `bins_at_once` cuts this rank's micro-steps further. Raises MicroStepError where they don't fit into memory.
    """
    rate = learning_rate(job.config.train, step.number, len(job.steps))
    if step.weight_sum <= 0:
        return StepOutcome(loss=0.0, grad_norm=0.0, learning_rate=rate)
    try:
        total = _accumulate(job, model, optimizer, step, bins_at_once, loss_scale)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MicroStepError from error
    job.ranks.pulse.mark(f"updating in step {step.number + 1}")
    loss, grad_norm = optimizer.update(total / loss_scale, rate, limits, loss_scale=loss_scale)
    is_spike = NO_LIMITS.allow(loss, grad_norm) and not limits.allow(loss, grad_norm)
    overflowed = is_overflow(loss, grad_norm, loss_scale)
    return StepOutcome(loss, grad_norm, learning_rate=rate, is_overflow=overflowed, is_spike=is_spike)


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or of the host, as torch and Python say it."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)


def _accumulate(
    job: Job,
    model: torch.nn.Module,
    optimizer: Optimizer,
    step: Step,
    bins_at_once: int | None,
    loss_scale: float,
) -> torch.Tensor:
    total = torch.zeros((), device=job.device)
    own = [part for micro_step in _own_micro_steps(job, step) for part in _cut(micro_step, bins_at_once)]
    for number, micro_step in enumerate(own, 1):
        job.ranks.pulse.move()
        factor = (0.0 if micro_step.is_filler else 1.0) * loss_scale / step.weight_sum
        total += _run_micro_step(
            job, model, optimizer, step, micro_step, factor=factor, is_last=number == len(own)
        )
    return total


def _cut(micro_step: MicroStep, bins_at_once: int | None) -> list[MicroStep]:
    first, end = micro_step.first_bin, micro_step.end_bin
    length = bins_at_once or end - first
    return [
        dataclasses.replace(micro_step, first_bin=start, end_bin=min(start + length, end))
        for start in range(first, end, length)
    ]


def _own_micro_steps(job: Job, step: Step) -> list[MicroStep]:
    return micro_steps(
        job.plans[step.epoch],
        step,
        bins_per_micro_step=job.config.train.bins_per_micro_step,
        rank=job.ranks.number,
        num_ranks=job.ranks.count,
    )


def _run_micro_step(
    job: Job,
    model: torch.nn.Module,
    optimizer: Optimizer,
    step: Step,
    micro_step: MicroStep,
    *,
    factor: float,
    is_last: bool,
) -> torch.Tensor:
    """The sum of its losses; padded, it may be several batches, one backward pass after the other."""
    total = torch.zeros((), device=job.device)
    batches = list(
        computed_batches(
            job.plans[step.epoch],
            job.reader,
            micro_step.first_bin,
            micro_step.end_bin,
            tokens_per_bin=job.padded_tokens_per_bin,
            pad_multiple=CUDA_PAD_MULTIPLE if job.device.type == "cuda" else None,
        )
    )
    for number, batch in enumerate(batches, 1):
        rows = _padded_rows(job, model, step, batch) if batch.padded_rows else [_bins(job, step, micro_step)]
        torch.manual_seed(rows[0][0][0])  # for draws that trainer/draws.py does not reach
        with drawing_for(*rows):
            total += optimizer.backward(
                functools.partial(_scaled_loss, model, batch.to(job.device), factor),
                is_last=is_last and number == len(batches),
            )
    return total


def _scaled_loss(model: torch.nn.Module, batch: MicroBatch, factor: float) -> torch.Tensor:
    return summed_loss(model, batch) * factor


def _padded_rows(job: Job, model: torch.nn.Module, step: Step, batch: MicroBatch) -> list[Row]:
    """Seed and number of tokens of each document, those that a method puts before it counted."""
    before = num_prepended_tokens(model)
    seed = job.config.train.seed
    return [[(draw_seed(seed, step.number, row.place), before + row.length)] for row in batch.padded_rows]


def _bins(job: Job, step: Step, micro_step: MicroStep) -> list[tuple[int, int]]:
    """Seed and number of tokens of each bin: the same whoever computes it, and after any resume."""
    plan = job.plans[step.epoch]
    return [
        (
            draw_seed(job.config.train.seed, step.number, number),
            int(plan.num_tokens[plan.documents(number, number + 1)].sum()),
        )
        for number in range(micro_step.first_bin, micro_step.end_bin)
    ]
