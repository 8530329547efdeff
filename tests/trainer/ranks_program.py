"""`python -m tests.trainer.ranks_program CONFIG...` in each of several processes, started as torchrun starts them.

Several trainings one after the other in one group of ranks: loading the libraries takes longer than all of them.
"""

import gc
import hashlib
import json
import math
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer

from schemas.pipeline_config import PipelineConfig
from trainer import building, compiling, out_of_memory, stepping
from trainer.draws import draw_seed
from trainer.job import plan_job
from trainer.launch import _silence_libraries, read_config
from trainer.ranks import joined_ranks
from trainer.train import train_job
from trainer.weights import WeightFiles

BACKEND_VARIABLE = "SFT_PIPELINE_TEST_BACKEND"
"""What torch.compile is to compile with: another one than the slow default."""
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

    def poisoned(model: torch.nn.Module, batch: Any, **options: Any) -> torch.Tensor:
        loss = original(model, batch, **options)
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
    original = out_of_memory.run_step
    found: dict[str, Any] = {"read": None}
    earlier = {id(tensor): weakref.ref(tensor) for tensor in alive_tensors()}

    class CountedFiles(WeightFiles):
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            found["read"] = self.num_bytes_read

    def measured(job: Any, model: torch.nn.Module, optimizer: Any, step: Any, **options: Any) -> Any:
        if step.number > 0:
            return original(job, model, optimizer, step, **options)
        with computing_parameters(model) as seen:
            outcome = original(job, model, optimizer, step, **options)
        found.update(held(model, optimizer, earlier), seen=seen)
        (config.run_root / f"bytes-{job.ranks.number}.json").write_text(json.dumps(found))
        return outcome

    out_of_memory.run_step, building.WeightFiles = measured, CountedFiles  # type: ignore[misc]


@contextmanager
def computing_parameters(model: torch.nn.Module) -> Iterator[dict[str, str]]:
    """Of each parameter, as its module or the LoRA layer around that sees it in a forward pass: shape, dtype, and of
    4-bit weights the digest of their bytes.
    """
    seen: dict[str, str] = {}

    def look(name: str, module: torch.nn.Module) -> None:
        for part, parameter in module.named_parameters():
            seen[f"{name}.{part}"] = f"{tuple(parameter.shape)} {parameter.dtype}"
            if part.endswith(("packed", "absmax")):
                # Cloned, since the memory behind an array can't be given back.
                numbers = parameter.detach().clone().view(torch.uint8).numpy()
                seen[f"{name}.{part}"] += f" {hashlib.sha256(numbers.tobytes()).hexdigest()}"

    # The last to be registered, after those that gather.
    handles = [
        module.register_forward_pre_hook(lambda module, _, name=name: look(name, module))  # type: ignore[misc]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) or list(module.parameters(recurse=False))
    ]
    yield seen
    for handle in handles:
        handle.remove()


def alive_tensors() -> list[torch.Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]


def held(model: torch.nn.Module, optimizer: Any, earlier: dict[int, Any]) -> dict[str, Any]:
    """Bytes behind the weights, masters and moments of this rank, and shapes of weights that lie whole somewhere.

    Libraries may hold on to a model of an `earlier` training.
    """
    weights = [
        getattr(t, "_local_tensor", t)  # of a DTensor what lies here
        for p in model.parameters()
        for t in (p, getattr(p, "ds_tensor", None))
        if t is not None
    ]
    shapes = {tuple(getattr(p, "ds_shape", p.shape)) for p in model.parameters()}
    is_whole = not any(hasattr(p, "ds_tensor") or hasattr(p, "_local_tensor") for p in model.parameters())
    everything = [*weights, *(piece.values for piece in optimizer.pieces())]
    # A part of one weight may have the shape of another one.
    parts = {tensor.untyped_storage().data_ptr() for tensor in everything if not is_whole}
    whole = {
        tuple(t.shape)
        for t in alive_tensors()
        if (id(t) not in earlier or earlier[id(t)]() is not t)
        and t.dim() == 2
        and t.untyped_storage().nbytes() >= t.nbytes > 0
        and t.untyped_storage().data_ptr() not in parts
    }
    return {
        "weights": num_bytes(weights),
        "all": num_bytes(everything),
        "whole": sorted(whole & shapes),
    }


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def main(paths: list[str]) -> None:
    _silence_libraries()
    if backend := os.environ.get(BACKEND_VARIABLE):
        compiling.BACKEND = backend
    configs = [read_config(Path(path)) for path in paths]
    original, originals = stepping.summed_loss, (out_of_memory.run_step, building.WeightFiles)
    gc.freeze()  # alive_tensors() asks the collector: without the libraries' own million objects
    with joined_ranks(configs[0]) as ranks:
        for config in configs:
            if config.train.seed == POISONED_SEED:
                poison_some_losses(config)
            if config.train.seed == MEASURED_SEED:
                measure(config)
            train_job(plan_job(config, ranks))
            stepping.summed_loss = original
            out_of_memory.run_step, building.WeightFiles = originals  # type: ignore[misc]


if __name__ == "__main__":
    main(sys.argv[1:])
