"""Every optimiser step of a run, decided from the plans: which bins, how many tokens, which divisor of the loss."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data import Plan


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


def plan_steps(
    plans: Sequence[Plan],
    *,
    bins_per_step: int,
    max_steps: int | None = None,
    max_tokens: int | None = None,
) -> list[Step]:
    """Every step of the run, one plan an epoch. `max_tokens` ends it before the step that would pass it."""
    steps: list[Step] = []
    num_tokens_left = max_tokens if max_tokens is not None else np.iinfo(np.int64).max
    for plan in plans:
        for step in _steps_of_epoch(plan, bins_per_step, first_number=len(steps)):
            num_tokens_left -= step.num_tokens
            if num_tokens_left < 0 or (max_steps is not None and len(steps) >= max_steps):
                return steps
            steps.append(step)
    return steps


def _steps_of_epoch(plan: Plan, bins_per_step: int, *, first_number: int) -> list[Step]:
    if not plan.num_bins:
        return []
    first_bins = np.arange(0, plan.num_bins, bins_per_step)
    starts = plan.bin_starts[first_bins]
    sums = (
        np.add.reduceat(values, starts, dtype=dtype).tolist()
        for values, dtype in (
            (plan.num_tokens, np.int64),
            (plan.num_trained_tokens, np.int64),
            (plan.weight_sums, np.float64),
        )
    )
    bins = zip(first_bins.tolist(), [*first_bins[1:].tolist(), plan.num_bins], strict=True)
    return [
        Step(first_number + number, plan.epoch, *borders, *numbers)
        for number, (borders, *numbers) in enumerate(zip(bins, *sums, strict=True))
    ]


@dataclass(frozen=True, slots=True)
class MicroStep:
    """Bins that one process computes at once. A filler has no part in the result: its loss is multiplied by 0."""

    first_bin: int
    end_bin: int
    is_filler: bool = False


def micro_steps(
    plan: Plan,
    step: Step,
    *,
    bins_per_micro_step: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> list[MicroStep]:
    """This rank's part of a step, without micro-steps that train nothing.

    Ranks get equally many micro-steps, and nearly the same work in attention, which grows with the squares of the
    documents' lengths. Fillers give every rank as many as any other: some strategies exchange gradients in each
    backward pass.
    """
    useful = [
        MicroStep(first, min(first + bins_per_micro_step, step.end_bin))
        for first in range(step.first_bin, step.end_bin, bins_per_micro_step)
    ]
    useful = [m for m in useful if plan.weight_sums[plan.documents(m.first_bin, m.end_bin)].sum() > 0]
    if not useful:
        return []
    ranks = share_out([_cost(plan, m) for m in useful], num_ranks)
    own = [m for m, owner in zip(useful, ranks, strict=True) if owner == rank]
    filler = dataclasses.replace(useful[0], is_filler=True)
    return own + [filler] * (-(-len(useful) // num_ranks) - len(own))


def share_out(costs: Sequence[float], num_ranks: int) -> list[int]:
    """The rank of each piece of work: counts differ by one at most, the most costly go first to who has least."""
    most = -(-len(costs) // num_ranks)
    num_full = len(costs) - (most - 1) * num_ranks  # ranks that get `most`, the others one less
    counts, sums = [0] * num_ranks, [0.0] * num_ranks
    ranks = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        num_at_most = sum(count == most for count in counts)
        limit = most if num_at_most < num_full else most - 1
        rank = min((r for r in range(num_ranks) if counts[r] < limit), key=lambda r: (sums[r], r))
        ranks[number] = rank
        counts[rank] += 1
        sums[rank] += costs[number]
    return ranks


def _cost(plan: Plan, micro_step: MicroStep) -> float:
    lengths = plan.num_tokens[plan.documents(micro_step.first_bin, micro_step.end_bin)].astype(np.float64)
    return float(lengths @ lengths)
