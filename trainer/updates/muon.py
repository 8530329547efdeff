"""torch's Muon: the momentum of a matrix with all its singular values made about 1. For matrices of linear layers;
AdamW has the others. The update is scaled as large as AdamW's, so that its learning rate and decay fit. Source: Jordan
et al., Muon: An optimizer for hidden layers in neural networks (2024); the scale: Liu et al., Muon is Scalable for LLM
Training (2025).
"""

from collections.abc import Sequence

import torch

from schemas.training_config import TrainConfig
from trainer.memory import is_linear
from trainer.ranks import Ranks
from trainer.updates import adamw
from trainer.updates.parts import BySeveral, ByTorch, State, Weight, groups


def build(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks) -> BySeveral:
    return BySeveral(
        weights,
        is_hidden_matrix,
        lambda own: _muon(own, train),
        lambda others: adamw.build(others, train, ranks),
    )


def is_hidden_matrix(weight: Weight) -> bool:
    return is_linear(weight.name, tuple(weight.parameter.shape))


def _muon(weights: Sequence[Weight], train: TrainConfig) -> ByTorch:
    optimizer = torch.optim.Muon(
        groups(weights),
        lr=train.learning_rate,
        momentum=train.muon.momentum,
        nesterov=True,
        ns_steps=train.muon.newton_schulz_steps,
        adjust_lr_fn="match_rms_adamw",
    )

    def begin(weight: torch.nn.Parameter, num_updates: int) -> None:
        optimizer.state[weight] = {"momentum_buffer": torch.zeros_like(weight)}

    return ByTorch(optimizer, {"momentum": "momentum_buffer"}, empty=_empty, begin=begin)


def _empty(weight: torch.Tensor) -> State:
    return {"momentum": torch.zeros_like(weight)}
