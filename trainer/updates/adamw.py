"""torch's AdamW. Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019)."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from schemas.training_config import TrainConfig
from trainer.pieces import MOMENTS
from trainer.ranks import Ranks
from trainer.updates.parts import ByTorch, State, Weight, groups
from trainer.weights import whole_shape


def build(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks) -> ByTorch:
    optimizer = torch.optim.AdamW(groups(weights), **_options([w.parameter for w in weights], train))
    return ByTorch(
        optimizer,
        {kind: kind for kind in MOMENTS},
        empty=empty_moments,
        begin=partial(_begin, optimizer),
        can_skip=optimizer.defaults["fused"],
    )


def torch_adamw(weights: Iterable[torch.Tensor], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW as the config asks for it, over parts of weights; its rate is set anew in each step."""
    everything = list(weights)
    # Matrices decay; norms and biases don't: pulling a scale towards 0 is no regularisation.
    matrices = [weight for weight in everything if len(whole_shape(weight)) >= 2]
    vectors = [weight for weight in everything if len(whole_shape(weight)) < 2]
    parts = ((matrices, train.weight_decay), (vectors, 0.0))
    return torch.optim.AdamW(
        [{"params": members, "weight_decay": decay} for members, decay in parts if members],
        **_options(everything, train),
    )


def _options(weights: Sequence[torch.Tensor], train: TrainConfig) -> dict[str, Any]:
    return {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
        "fused": all(weight.is_cuda for weight in weights),
        "foreach": False,
    }


def empty_moments(weight: torch.Tensor) -> State:
    return {kind: torch.zeros_like(weight) for kind in MOMENTS}


def _begin(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, num_updates: int) -> None:
    optimizer.state[weight] = {"step": step_count(num_updates, weight), **empty_moments(weight)}


def step_count(num_updates: int, weight: torch.Tensor) -> torch.Tensor:
    """AdamW's own count of its updates of a weight."""
    # The fused kernel counts on the GPU, the plain one on the CPU.
    return torch.tensor(float(num_updates), device=weight.device if weight.is_cuda else "cpu")
