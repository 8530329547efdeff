"""Schedule-free AdamW: gradients are taken between a sequence of weights and its average, and the average is the model.

In the paper's letters: z steps, x is the average, and y = (1 - beta1) z + beta1 x computes. A step counts in the
average by the square of the largest learning rate so far, so a warm-up counts little. Source: Defazio et al., The Road
Less Scheduled (2024).
"""

import math
from collections.abc import Sequence
from functools import partial

import torch

from schemas.training_config import TrainConfig
from trainer.ranks import Ranks
from trainer.updates.parts import ByFormula, Formula, State, Step, Weight


def build(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks) -> ByFormula:
    return ByFormula(weights, Formula(_empty, partial(_change, train)))


def computing_weight(train: TrainConfig, weight: torch.Tensor, state: State) -> torch.Tensor:
    """What the model trains with."""
    return weight.lerp(state["average"], train.adam_beta1) if state else weight


def _empty(weight: Weight) -> State:
    average = weight.parameter.detach().clone()
    # Sum of the steps' parts, and the largest rate. On the CPU: they decide about no number on the device.
    so_far = torch.zeros(2, dtype=torch.float64)
    return {"average": average, "squares": torch.zeros_like(average), "weight_sum": so_far}


def _change(train: TrainConfig, weight: Weight, gradient: torch.Tensor, state: State, step: Step) -> None:
    computing = computing_weight(train, weight.parameter, state)
    squares = state["squares"]
    squares.mul_(train.adam_beta2).addcmul_(gradient, gradient, value=1 - train.adam_beta2)
    root = squares.sqrt().div_(math.sqrt(1 - train.adam_beta2**step.number)).add_(train.adam_epsilon)
    weight.parameter.addcdiv_(gradient, root, value=-step.learning_rate)
    weight.parameter.add_(computing, alpha=-step.learning_rate * weight.decay)
    state["average"].lerp_(weight.parameter, _share(state["weight_sum"], step.learning_rate))


def _share(so_far: torch.Tensor, learning_rate: float) -> float:
    """Of this step in the average."""
    weight_sum, largest_rate = so_far.tolist()
    largest_rate = max(largest_rate, learning_rate)
    part = largest_rate**2
    so_far.copy_(torch.tensor([weight_sum + part, largest_rate], dtype=torch.float64))
    return part / (weight_sum + part) if part else 0.0
