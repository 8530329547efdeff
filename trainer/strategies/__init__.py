"""Where it is trained: how a model and its optimiser are laid over devices. Adding a strategy is one file and one
line here.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from schemas.training_config import TrainConfig
from trainer.model import LayOut
from trainer.optimizers import Optimizer
from trainer.ranks import Ranks
from trainer.strategies import ddp, fsdp2, pipeline, single, zero, zero3
from trainer.weights import WeightSource


class Strategy(NamedTuple):
    """`place` puts the model on this rank's device, in training mode, with the same trained weights on all ranks.

    `build_optimizer` takes over its trained weights by name. `full_weights` yields the named parameters one at a
    time, whole and on the CPU; all ranks call it and walk all of it, and on ranks but the first a tensor may be
    empty. With `fill` the model comes to `place` with stand-ins (trainer/stand_ins.py) for the weights of its files,
    and `fill` reads into each rank what it keeps; None: the model comes with its weights. With `lay_out` these are
    loaded onto the several devices of one process.
    """

    place: Callable[[torch.nn.Module, torch.device, Ranks, TrainConfig], torch.nn.Module]
    build_optimizer: Callable[[torch.nn.Module, TrainConfig, Ranks], Optimizer]
    full_weights: Callable[[torch.nn.Module, Iterable[str]], Iterator[tuple[str, torch.Tensor]]]
    fill: Callable[[torch.nn.Module, WeightSource, Ranks], None] | None = None
    lay_out: LayOut | None = None
    can_redo_step: bool = False
    """Ranks exchange nothing before a step's update: one that runs out of memory can begin its part again."""


STRATEGIES: dict[str, Strategy] = {
    "single": Strategy(single.place, single.build_optimizer, single.full_weights, can_redo_step=True),
    "ddp": Strategy(ddp.place, ddp.build_optimizer, single.full_weights, can_redo_step=True),
    "fsdp2": Strategy(fsdp2.place, fsdp2.build_optimizer, fsdp2.full_weights, fsdp2.fill),
    "zero1": Strategy(ddp.place, partial(zero.build_optimizer, stage=1), single.full_weights),
    "zero2": Strategy(ddp.place, partial(zero.build_optimizer, stage=2), single.full_weights),
    "zero3": Strategy(zero3.place, zero3.build_optimizer, zero3.full_weights, zero3.fill),
    "pipeline": Strategy(
        pipeline.place,
        single.build_optimizer,
        single.full_weights,
        lay_out=pipeline.lay_out,
        can_redo_step=True,
    ),
}
