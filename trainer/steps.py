"""Every optimiser step of a run, decided from the plans: which bins, how many tokens, which divisor of the loss."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data import Plan, ShardReader


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser step, counted from 0 over all epochs. The loss is divided by `weight_sum`."""

    number: int
    epoch: int
    first_bin: int
    end_bin: int
    num_tokens: int
    num_trained_tokens: int
    weight_sum: float


def step_bins(plan: Plan, step: int, bins_per_step: int) -> range:
    """Bins of the epoch's step number `step`; the last step of an epoch may have fewer."""
    first = min(step * bins_per_step, plan.num_bins)
    return range(first, min(first + bins_per_step, plan.num_bins))


def plan_steps(
    plans: Sequence[Plan],
    reader: ShardReader,
    *,
    bins_per_step: int,
    max_steps: int | None = None,
    max_tokens: int | None = None,
) -> list[Step]:
    """Every step of the run, one plan an epoch. `max_tokens` ends it before the step that would pass it."""
    steps: list[Step] = []
    num_tokens_left = max_tokens if max_tokens is not None else np.iinfo(np.int64).max
    for plan in plans:
        for number in range(-(-plan.num_bins // bins_per_step)):
            step = _step(plan, reader, step_bins(plan, number, bins_per_step), len(steps))
            num_tokens_left -= step.num_tokens
            if num_tokens_left < 0 or (max_steps is not None and len(steps) >= max_steps):
                return steps
            steps.append(step)
    return steps


def _step(plan: Plan, reader: ShardReader, bins: range, number: int) -> Step:
    rows = plan.rows(bins.start, bins.stop)
    return Step(
        number=number,
        epoch=plan.epoch,
        first_bin=bins.start,
        end_bin=bins.stop,
        num_tokens=int(reader.num_tokens[rows].sum()),
        num_trained_tokens=int(reader.num_trained_tokens[rows].sum()),
        weight_sum=float(reader.weight_sums[rows].sum()),
    )


@dataclass(frozen=True, slots=True)
class MicroStep:
    """Bins that one process computes at once. A filler has no part in the result: its loss is multiplied by 0."""

    first_bin: int
    end_bin: int
    is_filler: bool = False


def micro_steps(
    plan: Plan,
    reader: ShardReader,
    step: Step,
    *,
    bins_per_micro_step: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> list[MicroStep]:
    """This rank's part of a step: the ranks take turns over its micro-steps, but for those that train nothing.

    Bins are filled to nearly the same number of tokens, so turns are fair. Fillers give every rank as many micro-
    steps as any other: some strategies exchange gradients in each backward pass.
    """
    useful = [
        MicroStep(first, min(first + bins_per_micro_step, step.end_bin))
        for first in range(step.first_bin, step.end_bin, bins_per_micro_step)
    ]
    useful = [m for m in useful if reader.weight_sums[plan.rows(m.first_bin, m.end_bin)].sum() > 0]
    own = useful[rank::num_ranks]
    if not useful:
        return own
    filler = dataclasses.replace(useful[0], is_filler=True)
    return own + [filler] * (-(-len(useful) // num_ranks) - len(own))
