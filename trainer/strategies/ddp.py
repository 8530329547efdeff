"""Data parallel: each rank holds everything and computes a part of each step.

Gradients are added up locally over a step's micro-steps and summed over the ranks once, in fp32: no wrapper around
the model, and what one rank computes does not depend on when the others answer.
"""

import torch

from schemas.training_config import TrainConfig
from trainer.optimizers import MasterOptimizer, trained_parameters
from trainer.ranks import Ranks


def place(model: torch.nn.Module, device: torch.device, ranks: Ranks, train: TrainConfig) -> torch.nn.Module:
    placed = model.to(device).train()
    ranks.copy_from_first([p.detach() for p in placed.parameters() if p.requires_grad])
    return placed


def build_optimizer(model: torch.nn.Module, train: TrainConfig, ranks: Ranks) -> MasterOptimizer:
    return MasterOptimizer(trained_parameters(model), train, ranks)
