"""`python -m tests.trainer.ranks_program CONFIG...` in each of several processes, started as torchrun starts them.

Several trainings one after the other in one group of ranks: loading the libraries takes longer than all of them.
"""

import gc
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from schemas.pipeline_config import PipelineConfig
from trainer import stepping
from trainer import train as training
from trainer.job import plan_job
from trainer.launch import _silence_libraries, read_config
from trainer.ranks import joined_ranks
from trainer.stepping import draw_seed
from trainer.train import train_job
from trainer.weights import WeightFiles

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


MEASURED_SEED = 8
"""Trainings of this seed write bytes-<rank>.json into their run root: what a rank reads, and holds after its first
step.
"""


def measure(config: PipelineConfig) -> None:
    original = training.run_step
    found: dict[str, Any] = {"read": None}

    class CountedFiles(WeightFiles):
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            found["read"] = self.num_bytes_read

    def measured(job: Any, model: torch.nn.Module, optimizer: Any, step: Any) -> Any:
        outcome = original(job, model, optimizer, step)
        if step.number == 0:
            found.update(held(model, optimizer))
            (config.run_root / f"bytes-{job.ranks.number}.json").write_text(json.dumps(found))
        return outcome

    training.run_step, training.WeightFiles = measured, CountedFiles  # type: ignore[misc]


def held(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    """Bytes behind the weights, masters and moments of this rank, and shapes of weights that lie whole somewhere."""
    weights = [
        getattr(t, "_local_tensor", t)  # of a DTensor what lies here
        for p in model.parameters()
        for t in (p, getattr(p, "ds_tensor", None))
        if t is not None
    ]
    shapes = {tuple(getattr(p, "ds_shape", p.shape)) for p in model.parameters()}
    alive = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    whole = {tuple(t.shape) for t in alive if t.dim() == 2 and t.untyped_storage().nbytes() >= t.nbytes > 0}
    return {
        "weights": num_bytes(weights),
        "all": num_bytes([*weights, *(piece.values for piece in optimizer.pieces())]),
        "whole": sorted(whole & shapes),
    }


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def main(paths: list[str]) -> None:
    _silence_libraries()
    configs = [read_config(Path(path)) for path in paths]
    original, originals = stepping.summed_loss, (training.run_step, training.WeightFiles)
    with joined_ranks(configs[0]) as ranks:
        for config in configs:
            if config.train.seed == POISONED_SEED:
                poison_some_losses(config)
            if config.train.seed == MEASURED_SEED:
                measure(config)
            train_job(plan_job(config, ranks))
            stepping.summed_loss = original
            training.run_step, training.WeightFiles = originals  # type: ignore[misc]


if __name__ == "__main__":
    main(sys.argv[1:])
