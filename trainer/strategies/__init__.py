"""Where it is trained: how a model and its optimiser are laid over devices. Adding a strategy is one file and one
line here.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch

from schemas.training_config import TrainConfig
from trainer.optimizers import Optimizer
from trainer.ranks import Ranks
from trainer.strategies import ddp, single, zero, zero3


class Strategy(NamedTuple):
    """`place` puts the model on this rank's device, in training mode, with the same trained weights on all ranks.

    `build_optimizer` takes over its trained weights by name.
    """

    place: Callable[[torch.nn.Module, torch.device, Ranks, TrainConfig], torch.nn.Module]
    build_optimizer: Callable[[Iterable[tuple[str, torch.nn.Parameter]], TrainConfig, Ranks], Optimizer]


STRATEGIES: dict[str, Strategy] = {
    "single": Strategy(single.place, single.build_optimizer),
    "ddp": Strategy(ddp.place, ddp.build_optimizer),
    "zero1": Strategy(ddp.place, partial(zero.build_optimizer, stage=1)),
    "zero2": Strategy(ddp.place, partial(zero.build_optimizer, stage=2)),
    "zero3": Strategy(zero3.place, zero3.build_optimizer),
}
