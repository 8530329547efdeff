"""`python -m tests.trainer.ranks_program CONFIG...` in each of several processes, started as torchrun starts them.

Several trainings one after the other in one group of ranks: loading the libraries takes longer than all of them.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch

from schemas.pipeline_config import PipelineConfig
from trainer import stepping
from trainer.draws import draw_seed
from trainer.job import plan_job
from trainer.launch import _silence_libraries, read_config
from trainer.ranks import joined_ranks
from trainer.train import train_job

POISONED_SEED = 7
"""Trainings of this seed meet a loss that is not a number, in one micro-step of each of these steps."""
POISONED_STEPS = (2, 5)


def poison_some_losses(config: PipelineConfig) -> None:
    """The loss alone is bad in the first of those steps; in the second the gradient is, too."""
    steps = plan_job(config).steps
    seeds = {
        draw_seed(POISONED_SEED, number, steps[number].first_bin): kind
        for kind, number in enumerate(POISONED_STEPS)
    }
    original = stepping.summed_loss

    def poisoned(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        loss = original(model, batch)
        kind = seeds.get(torch.initial_seed())
        if kind is None:
            return loss
        return loss + math.inf if kind == 0 else loss * math.nan

    stepping.summed_loss = poisoned


def main(paths: list[str]) -> None:
    _silence_libraries()
    configs = [read_config(Path(path)) for path in paths]
    original = stepping.summed_loss
    with joined_ranks(configs[0]) as ranks:
        for config in configs:
            if config.train.seed == POISONED_SEED:
                poison_some_losses(config)
            train_job(plan_job(config, ranks))
            stepping.summed_loss = original


if __name__ == "__main__":
    main(sys.argv[1:])
