"""Lion: the sign of a mean of gradients, and one moment a weight. Each number moves by the whole learning rate, so it
wants a third to a tenth of AdamW's. Source: Chen et al., Symbolic Discovery of Optimization Algorithms (2023).
"""

from collections.abc import Sequence
from functools import partial

import torch

from schemas.training_config import LionConfig, TrainConfig
from trainer.ranks import Ranks
from trainer.updates.parts import ByFormula, Formula, State, Step, Weight


def build(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks) -> ByFormula:
    return ByFormula(weights, Formula(_empty, partial(_change, train.lion)))


def _empty(weight: Weight) -> State:
    return {"momentum": torch.zeros_like(weight.parameter)}


def _change(lion: LionConfig, weight: Weight, gradient: torch.Tensor, state: State, step: Step) -> None:
    momentum = state["momentum"]
    direction = momentum.lerp(gradient, 1 - lion.beta1).sign_()
    weight.parameter.mul_(1 - step.learning_rate * weight.decay)
    weight.parameter.add_(direction, alpha=-step.learning_rate)
    momentum.lerp_(gradient, 1 - lion.beta2)
