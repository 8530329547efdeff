"""GaLore and APOLLO: AdamW's moments of a projection of each matrix's gradient, a few numbers in place of a matrix.

GaLore projects on the largest singular vectors of a gradient, found anew every so many updates, and steps along the
projection. APOLLO projects at random, compares each channel before and after AdamW there, and scales the gradient's
channels by that. Both for matrices of linear layers; AdamW has the others. Sources: Zhao et al., GaLore:
Memory-Efficient LLM Training by Gradient Low-Rank Projection (2024); Zhu et al., APOLLO: SGD-like Memory, AdamW-level
Performance (2024).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch

from schemas.training_config import TrainConfig
from trainer.draws import draw_seed
from trainer.memory import is_projected
from trainer.ranks import Ranks
from trainer.updates import adamw
from trainer.updates.parts import ByFormula, BySeveral, Formula, State, Step, Weight

GALORE_SCALE, APOLLO_SCALE = 0.25, 1.0
"""The papers' own, where the config gives none."""
MAX_GROWTH = 1.01
"""APOLLO: of the norm of an update over the one before."""
TINY = 1e-8
"""Added to norms that are divided by."""


def build_galore(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks) -> BySeveral:
    empty = partial(_empty_galore, train)
    return _build(weights, train, ranks, Formula(empty, partial(_change_by_galore, train, ranks)))


def build_apollo(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks) -> BySeveral:
    empty = partial(_empty_apollo, train)
    return _build(weights, train, ranks, Formula(empty, partial(_change_by_apollo, train)))


def _build(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks, formula: Formula) -> BySeveral:
    return BySeveral(
        weights,
        lambda weight: is_projected(weight.name, tuple(weight.parameter.shape), train),
        lambda own: ByFormula(own, formula),
        lambda others: adamw.build(others, train, ranks),
    )


def _lying(matrix: torch.Tensor) -> torch.Tensor:
    """Transposed where it has more rows than columns: what is projected is the shorter side."""
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _small_moments(weight: Weight, train: TrainConfig) -> State:
    parameter = weight.parameter
    size = (train.low_rank.rank, max(parameter.shape))
    return {
        "small_exp_avg": parameter.new_zeros(size),
        "small_exp_avg_sq": parameter.new_zeros(size),
    }


def _direction(train: TrainConfig, small: torch.Tensor, state: State) -> torch.Tensor:
    """AdamW's in the projection, before the correction of its bias."""
    mean, square = state["small_exp_avg"], state["small_exp_avg_sq"]
    mean.lerp_(small, 1 - train.adam_beta1)
    square.mul_(train.adam_beta2).addcmul_(small, small, value=1 - train.adam_beta2)
    return mean / square.sqrt().add_(train.adam_epsilon)


def _corrected(train: TrainConfig, step: Step) -> float:
    """The learning rate with the corrections for moments that began at 0."""
    squares = math.sqrt(1 - train.adam_beta2**step.number)
    return step.learning_rate * squares / (1 - train.adam_beta1**step.number)


def _move(weight: Weight, update: torch.Tensor, size: float, step: Step) -> None:
    weight.parameter.mul_(1 - step.learning_rate * weight.decay)
    _lying(weight.parameter).add_(update, alpha=-size)


# GaLore -----------------------------------------------------------------------------------------------------


def _empty_galore(train: TrainConfig, weight: Weight) -> State:
    projection = weight.parameter.new_zeros(min(weight.parameter.shape), train.low_rank.rank)
    return {"projection": projection, **_small_moments(weight, train)}


def _change_by_galore(
    train: TrainConfig, ranks: Ranks, weight: Weight, gradient: torch.Tensor, state: State, step: Step
) -> None:
    projection, lying = state["projection"], _lying(gradient)
    if step.is_first or (step.number - 1) % train.low_rank.every_updates == 0:
        vectors = torch.linalg.svd(lying, full_matrices=False)[0]
        projection.copy_(vectors[:, : train.low_rank.rank])
        # Singular vectors hang on the last bit, and on the sign that a library picks: all ranks take the first one's.
        ranks.copy_from_first([projection])
    small = _direction(train, projection.T @ lying, state)
    scale = GALORE_SCALE if train.low_rank.scale is None else train.low_rank.scale
    _move(weight, projection @ small, scale * _corrected(train, step), step)


# APOLLO -----------------------------------------------------------------------------------------------------


def _empty_apollo(train: TrainConfig, weight: Weight) -> State:
    return {"update_norm": weight.parameter.new_zeros(1), **_small_moments(weight, train)}


def _change_by_apollo(
    train: TrainConfig, weight: Weight, gradient: torch.Tensor, state: State, step: Step
) -> None:
    lying = _lying(gradient)
    small = random_projection(train, weight, step.number, lying) @ lying
    direction = _direction(train, small, state)
    channels = direction.norm(dim=0) / (small.norm(dim=0) + TINY)
    update = lying * channels
    _limit_growth(update, state["update_norm"])
    scale = APOLLO_SCALE if train.low_rank.scale is None else train.low_rank.scale
    _move(weight, update, scale * _corrected(train, step), step)


def random_projection(train: TrainConfig, weight: Weight, number: int, lying: torch.Tensor) -> torch.Tensor:
    """[rank, rows], drawn anew every so many updates, and made again in each: it takes no memory between them."""
    period = (number - 1) // train.low_rank.every_updates
    draws = torch.Generator(lying.device).manual_seed(draw_seed(train.seed, weight.number, period))
    size = (train.low_rank.rank, lying.shape[0])
    drawn = torch.randn(size, generator=draws, device=lying.device, dtype=lying.dtype)
    return drawn.div_(math.sqrt(train.low_rank.rank))


def _limit_growth(update: torch.Tensor, norm_before: torch.Tensor) -> None:
    """In place, and the norm with it; nothing here waits for the device."""
    norm = update.norm()
    limit = torch.where(norm_before > 0, MAX_GROWTH * norm_before / (norm + TINY), 1.0).clamp(max=1.0)
    update.mul_(limit)
    norm_before.copy_(norm * limit)
