"""`python -m tests.trainer.ranks_program CONFIG...` in each of several processes, started as torchrun starts them.

Several trainings one after the other in one group of ranks: loading the libraries takes longer than all of them.
Each rank leaves beside each config what it saw: FACTS_NAME.
"""

import gc
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from schemas.pipeline_config import PipelineConfig
from trainer import stepping
from trainer import train as train_module
from trainer.draws import draw_seed
from trainer.job import plan_job
from trainer.launch import _silence_libraries, read_config
from trainer.ranks import joined_ranks
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


FACTS_NAME = "facts-{rank}.json"


def held_bytes() -> int:
    """Of all tensors that are alive, each storage once. What a strategy has freed has no bytes any more."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage() for tensor in tensors if not tensor.is_meta}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextmanager
def watched(*, is_measured: bool) -> Iterator[dict[str, Any]]:
    """Bytes read from the model's files by fill(); of fp32 FSDP2 bytes held before and after the first step."""
    facts: dict[str, Any] = {"bytes_read": None}
    run_step = stepping.run_step
    bytes_before = held_bytes() if is_measured else 0

    class CountedFiles(WeightFiles):
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            facts["bytes_read"] = self.num_bytes_read

    def measured_step(*arguments: Any) -> Any:
        if not is_measured or "bytes_after_step" in facts:
            return run_step(*arguments)
        facts["bytes_before_step"] = held_bytes() - bytes_before
        outcome = run_step(*arguments)
        facts["bytes_after_step"] = held_bytes() - bytes_before
        return outcome

    with (
        mock.patch.object(train_module, "WeightFiles", CountedFiles),
        mock.patch.object(train_module, "run_step", measured_step),
    ):
        yield facts


def main(paths: list[str]) -> None:
    _silence_libraries()
    configs = [read_config(Path(path)) for path in paths]
    original = stepping.summed_loss
    with joined_ranks(configs[0]) as ranks:
        for config in configs:
            if config.train.seed == POISONED_SEED:
                poison_some_losses(config)
            is_measured = config.train.strategy == "fsdp2" and config.train.method == "full"
            with watched(is_measured=is_measured) as facts:
                train_job(plan_job(config, ranks))
            (config.run_root / FACTS_NAME.format(rank=ranks.number)).write_text(json.dumps(facts))
            stepping.summed_loss = original


if __name__ == "__main__":
    main(sys.argv[1:])
