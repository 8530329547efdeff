"""One optimiser step on this rank: its share of the micro-steps, then one update with all ranks."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch

from trainer.data import MicroBatch
from trainer.draws import draw_seed, drawing_for
from trainer.job import Job
from trainer.loss import summed_loss
from trainer.loss_scale import is_overflow
from trainer.noise import NoisyBin, noise_for
from trainer.optimizers import NO_LIMITS, Limits, Optimizer, begin_reading
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
    token_accuracy: float | None = None
    """Share of the trained tokens that were the most likely ones; None in a step that trains nothing."""
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
    ahead: "BatchesAhead | None" = None,
) -> StepOutcome:
    """The step's loss is the weighted mean over its trained tokens, on whichever rank they are; its divisor is
    known from the plan. Weights change if the limits allow its loss and gradient.

    `bins_at_once` cuts this rank's micro-steps further. Raises MicroStepError where they don't fit into memory.
    """
    rate = learning_rate(job.config.train, step.number, len(job.steps))
    if step.weight_sum <= 0:
        return StepOutcome(loss=0.0, grad_norm=0.0, learning_rate=rate)
    ahead = ahead or BatchesAhead(job)
    try:
        total, counts = _accumulate(job, model, optimizer, step, bins_at_once, loss_scale, ahead)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MicroStepError from error
    job.ranks.pulse.mark(f"updating in step {step.number + 1}")
    arrived = begin_reading(job.ranks.add_up(counts))
    ahead.make(step.number + 1, bins_at_once)
    loss, grad_norm = optimizer.update(total / loss_scale, rate, limits, loss_scale=loss_scale)
    is_spike = NO_LIMITS.allow(loss, grad_norm) and not limits.allow(loss, grad_norm)
    overflowed = is_overflow(loss, grad_norm, loss_scale)
    num_right, num_trained = arrived()
    return StepOutcome(
        loss,
        grad_norm,
        learning_rate=rate,
        token_accuracy=num_right / num_trained,
        is_overflow=overflowed,
        is_spike=is_spike,
    )


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
    ahead: "BatchesAhead",
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the loss, and of the tokens that were predicted right and that were trained."""
    total = torch.zeros((), device=job.device)
    counts = torch.zeros(2, dtype=torch.int64, device=job.device)
    own = _own_parts(job, step, bins_at_once)
    for number, micro_step in enumerate(own, 1):
        job.ranks.pulse.move()
        factor = (0.0 if micro_step.is_filler else 1.0) * loss_scale / step.weight_sum
        batches = ahead.take(step, micro_step)
        total += _run_micro_step(
            job,
            model,
            optimizer,
            step,
            micro_step,
            batches,
            counts,
            factor=factor,
            is_last=number == len(own),
        )
    return total, counts


class BatchesAhead:
    """The first batches of the next step, made while the GPU is still busy with this one."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._made: tuple[tuple[int, MicroStep], list[MicroBatch]] | None = None

    def make(self, step_number: int, bins_at_once: int | None) -> None:
        """Those of this step, if there is one. On a CPU they would be ready no sooner."""
        job = self._job
        if job.device.type == "cpu" or step_number >= len(job.steps):
            return
        step = job.steps[step_number]
        for first in _own_parts(job, step, bins_at_once)[:1]:
            self._made = (step.number, first), _batches(job, step, first)

    def take(self, step: Step, micro_step: MicroStep) -> list[MicroBatch]:
        made, self._made = self._made, None
        if made is not None and made[0] == (step.number, micro_step):
            return made[1]
        return _batches(self._job, step, micro_step)


def _batches(job: Job, step: Step, micro_step: MicroStep) -> list[MicroBatch]:
    """On the job's device; padded, a micro-step may be several."""
    batches = computed_batches(
        job.plans[step.epoch],
        job.reader,
        micro_step.first_bin,
        micro_step.end_bin,
        tokens_per_bin=job.padded_tokens_per_bin,
        pad_multiple=CUDA_PAD_MULTIPLE if job.device.type == "cuda" else None,
    )
    return [batch.to(job.device) for batch in batches]


def _own_parts(job: Job, step: Step, bins_at_once: int | None) -> list[MicroStep]:
    return [part for micro_step in _own_micro_steps(job, step) for part in _cut(micro_step, bins_at_once)]


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
    batches: list[MicroBatch],
    counts: torch.Tensor,
    *,
    factor: float,
    is_last: bool,
) -> torch.Tensor:
    """The sum of its losses; of several batches, one backward pass after the other."""
    total = torch.zeros((), device=job.device)
    for number, batch in enumerate(batches, 1):
        rows = _rows(job, step, micro_step, batch)
        # Tokens that a method puts before each padded document are no embeddings of the table.
        before = num_prepended_tokens(model) if batch.padded_rows else 0
        torch.manual_seed(rows[0][0][0])  # for draws that trainer/draws.py does not reach
        drawn = ([(seed, before + sum(lengths)) for seed, lengths in bins] for bins in rows)
        with drawing_for(*drawn), noise_for(*rows):
            total += optimizer.backward(
                functools.partial(
                    _scaled_loss,
                    job,
                    model,
                    batch,
                    factor,
                    None if micro_step.is_filler else counts,
                ),
                is_last=is_last and number == len(batches),
            )
    return total


def _scaled_loss(
    job: Job, model: torch.nn.Module, batch: MicroBatch, factor: float, counts: torch.Tensor | None
) -> torch.Tensor:
    """Counts the tokens that it predicts and trains, but for a filler."""
    num_right = torch.zeros((), device=job.device)
    smoothing = job.config.train.label_smoothing
    loss = summed_loss(model, batch, label_smoothing=smoothing, num_right=num_right)
    if counts is not None:
        counts[0] += num_right.long()
        counts[1] += batch.num_trained_tokens
    return loss * factor


def _rows(job: Job, step: Step, micro_step: MicroStep, batch: MicroBatch) -> list[list[NoisyBin]]:
    """A padded document is a bin by itself."""
    if not batch.padded_rows:
        return [_bins(job, step, micro_step)]
    seed = job.config.train.seed
    return [[(draw_seed(seed, step.number, row.place), (row.length,))] for row in batch.padded_rows]


def _bins(job: Job, step: Step, micro_step: MicroStep) -> list[NoisyBin]:
    """Seed and lengths of the documents of each bin: the same whoever computes it, and after any resume."""
    plan = job.plans[step.epoch]
    return [
        (
            draw_seed(job.config.train.seed, step.number, number),
            plan.num_tokens[plan.documents(number, number + 1)].tolist(),
        )
        for number in range(micro_step.first_bin, micro_step.end_bin)
    ]
