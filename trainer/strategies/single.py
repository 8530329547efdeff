"""One device holds everything."""

from collections.abc import Iterable, Iterator

import torch

from schemas.training_config import TrainConfig
from trainer.optimizers import MasterOptimizer, trained_parameters
from trainer.ranks import Ranks


def place(model: torch.nn.Module, device: torch.device, ranks: Ranks, train: TrainConfig) -> torch.nn.Module:
    return model.to(device).train()


def build_optimizer(model: torch.nn.Module, train: TrainConfig, ranks: Ranks) -> MasterOptimizer:
    return MasterOptimizer(trained_parameters(model), train)


def full_weights(model: torch.nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    parameters = dict(model.named_parameters())
    for name in names:
        yield name, parameters[name].detach().cpu()
