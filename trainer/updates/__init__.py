"""How trained weights change by their gradients: train.optimizer. Adding one is one file and one line here.

An update gets the weights that the optimiser adds up (trainer/optimizers.py): fp32 masters, or with `is_masterless` the
16-bit weights that compute. Their gradients are fp32, summed and clipped.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from schemas.training_config import TrainConfig
from trainer.ranks import Ranks
from trainer.updates import adamw, eight_bit, kahan, lion, low_rank, muon, schedule_free
from trainer.updates.parts import Update, Weight


class Kind(NamedTuple):
    """`build` gets all weights. With `moves_apart` the model computes with other weights than those that are added up,
    so even an fp32 weight has a master beside it.
    """

    build: Callable[[Sequence[Weight], TrainConfig, Ranks], Update]
    is_masterless: bool = False
    moves_apart: bool = False


UPDATES: dict[str, Kind] = {
    "adamw": Kind(adamw.build),
    "adamw_bf16": Kind(kahan.build, is_masterless=True),
    "adamw_8bit": Kind(eight_bit.build),
    "paged_adamw_8bit": Kind(eight_bit.build_paged),
    "lion": Kind(lion.build),
    "schedule_free": Kind(schedule_free.build, moves_apart=True),
    "muon": Kind(muon.build),
    "galore": Kind(low_rank.build_galore),
    "apollo": Kind(low_rank.build_apollo),
}
