"""One device holds everything."""

from collections.abc import Iterable

import torch

from schemas.training_config import TrainConfig
from trainer.optimizers import MasterAdamW
from trainer.ranks import Ranks


def place(model: torch.nn.Module, device: torch.device, ranks: Ranks) -> torch.nn.Module:
    return model.to(device).train()


def build_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], train: TrainConfig, ranks: Ranks
) -> MasterAdamW:
    return MasterAdamW(parameters, train)
