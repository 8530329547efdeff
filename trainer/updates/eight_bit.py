"""bitsandbytes' AdamW with moments in 8 bits, and with pages of them that may lie in the CPU's memory.

A code a number and a scale for each 256, so 2 bytes a weight in place of 8. Embeddings keep torch's moments, as the
authors advise: few of their rows have a gradient in a step. So do tensors too small to be worth it. Source: Dettmers
et al., 8-bit Optimizers via Block-wise Quantization (2022).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from schemas.training_config import TrainConfig
from trainer.memory import BLOCK_SIZE_OF_8_BITS, FEWEST_NUMBERS_IN_8_BITS, is_in_8_bits
from trainer.ranks import Ranks
from trainer.updates import adamw
from trainer.updates.parts import BySeveral, ByTorch, State, Weight, groups

KEYS = {
    "exp_avg_codes": "state1",
    "exp_avg_sq_codes": "state2",
    "exp_avg_scales": "absmax1",
    "exp_avg_sq_scales": "absmax2",
}


def build(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks) -> BySeveral:
    return _build(weights, train, ranks, is_paged=False)


def build_paged(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks) -> BySeveral:
    # On a CPU there is nothing to page, and bitsandbytes warns of it.
    on_gpu = all(weight.parameter.is_cuda for weight in weights)
    return _build(weights, train, ranks, is_paged=on_gpu)


def _build(weights: Sequence[Weight], train: TrainConfig, ranks: Ranks, *, is_paged: bool) -> BySeveral:
    return BySeveral(
        weights,
        lambda weight: is_in_8_bits(weight.name, weight.parameter.numel()),
        lambda own: _in_8_bits(own, train, is_paged=is_paged),
        lambda others: adamw.build(others, train, ranks),
    )


def _in_8_bits(weights: Sequence[Weight], train: TrainConfig, *, is_paged: bool) -> ByTorch:
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit(
        groups(weights),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        min_8bit_size=FEWEST_NUMBERS_IN_8_BITS,
        is_paged=is_paged,
    )
    return ByTorch(optimizer, KEYS, empty=_empty, begin=partial(_begin, optimizer))


def _empty(weight: torch.Tensor) -> State:
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    scales = torch.zeros(-(-weight.numel() // BLOCK_SIZE_OF_8_BITS), device=weight.device)
    return {
        "exp_avg_codes": codes,
        "exp_avg_sq_codes": torch.zeros_like(codes),
        "exp_avg_scales": scales,
        "exp_avg_sq_scales": torch.zeros_like(scales),
    }


def _begin(optimizer: Any, weight: torch.nn.Parameter, num_updates: int) -> None:
    number, group = next(
        (number, group)
        for number, group in enumerate(optimizer.param_groups)
        if any(member is weight for member in group["params"])
    )
    place = next(place for place, member in enumerate(group["params"]) if member is weight)
    optimizer.init_state(group, weight, number, place)
    optimizer.state[weight]["step"] = num_updates
