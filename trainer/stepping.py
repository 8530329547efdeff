"""One optimiser step on this rank: its share of the micro-steps, then one update with all ranks."""

import hashlib
import math
from dataclasses import dataclass

import torch

from trainer.data import micro_batch
from trainer.job import Job
from trainer.loss import summed_loss
from trainer.optimizers import Optimizer, learning_rate
from trainer.steps import MicroStep, Step, micro_steps

CUDA_PAD_MULTIPLE = 128
"""Rows of few different lengths: tensor cores stay full and the allocator's blocks fit again."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    loss: float
    grad_norm: float
    learning_rate: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def run_step(job: Job, model: torch.nn.Module, optimizer: Optimizer, step: Step) -> StepOutcome:
    """The step's loss is the weighted mean over its trained tokens, on whichever rank they are; its divisor is
    known from the plan. Weights change unless loss or gradient is not finite.
    """
    rate = learning_rate(job.config.train, step.number, len(job.steps))
    if step.weight_sum <= 0:
        return StepOutcome(loss=0.0, grad_norm=0.0, learning_rate=rate)
    total = torch.zeros((), device=job.device)
    own = _own_micro_steps(job, step)
    for number, micro_step in enumerate(own, 1):
        total += _run_micro_step(job, model, optimizer, step, micro_step, is_last=number == len(own))
    loss, grad_norm = optimizer.update(total, rate)
    return StepOutcome(loss=loss, grad_norm=grad_norm, learning_rate=rate)


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
    is_last: bool,
) -> torch.Tensor:
    batch = micro_batch(
        job.plans[step.epoch],
        job.reader,
        micro_step.first_bin,
        micro_step.end_bin,
        pad_multiple=CUDA_PAD_MULTIPLE if job.device.type == "cuda" else None,
    ).to(job.device)
    share = 0.0 if micro_step.is_filler else 1.0
    torch.manual_seed(draw_seed(job.config.train.seed, step.number, micro_step.first_bin))
    return optimizer.backward(lambda: summed_loss(model, batch) / step.weight_sum * share, is_last=is_last)


def draw_seed(seed: int, step: int, first_bin: int) -> int:
    """Seed of a micro-batch's draws (dropout): the same whoever computes it, and after any resume."""
    digest = hashlib.blake2b(f"{seed}:{step}:{first_bin}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
