"""What a finished training leaves: trained weights with tokenizer and template, and the record of how."""

import collections
import math
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

import torch
from transformers import PreTrainedTokenizerBase

from pipelines import storage
from schemas.run import FileEntry
from schemas.training_result import TRAINING_RESULT_NAME, TrainingResult
from trainer import initial_adapter
from trainer.checkpoint import Progress
from trainer.folders import built_aside
from trainer.job import Job
from trainer.memory import BITSANDBYTES_OPTIMIZERS
from trainer.methods import METHODS
from trainer.strategies import STRATEGIES
from trainer.weights import whole_shape

LIBRARIES = ("torch", "transformers", "peft", "safetensors", "tokenizers")


def write_output(job: Job, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The output folder, built aside and published whole. The method checks every tensor before it counts.

    All ranks call it, since each may hold a part of the weights; the first one writes.
    """
    method = METHODS[job.config.train.method]
    final = job.folder / method.OUTPUT_FOLDER
    weights = STRATEGIES[job.config.train.strategy].full_weights(model, method.saved_names(model))
    if not job.ranks.is_first:
        collections.deque(weights, maxlen=0)
        return final
    with built_aside(final) as temporary:
        method.save(model, temporary, job.model, weights)
        initial_adapter.complete(temporary, job.config.train, job.folder)
        tokenizer.save_pretrained(temporary)
    return final


def write_result(
    job: Job, model: torch.nn.Module, progress: Progress, output: Path, *, output_step: int
) -> TrainingResult:
    """training.json, the last write: from now on the training is finished."""
    result = TrainingResult(
        key=job.key,
        method=job.config.train.method,
        output=cast(Literal["adapter", "model"], output.name),
        model_path=job.model.path,
        inputs=job.inputs,
        settings=job.settings,
        dtype=str(job.dtype).removeprefix("torch."),
        device=job.device.type,
        num_steps=progress.num_steps,
        output_step=output_step,
        num_updates=progress.num_updates,
        num_overflow_steps=progress.num_overflow_steps,
        num_tokens=progress.num_tokens,
        num_trained_tokens=progress.num_trained_tokens,
        num_trainable_weights=num_trainable_weights(model),
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
        validation_loss=progress.validation_loss,
        validation_bits_per_byte=progress.validation_bits_per_byte,
        validation_token_accuracy=progress.validation_token_accuracy,
        strategy=job.config.train.strategy,
        num_processes=job.ranks.count,
        versions={name: version(name) for name in _libraries(job)},
        files=tuple(_entries(job.folder, output)),
    )
    storage.write_record(job.folder / TRAINING_RESULT_NAME, result.model_dump(mode="json"))
    return result


def num_trainable_weights(model: torch.nn.Module) -> int:
    return sum(math.prod(whole_shape(p)) for p in model.parameters() if p.requires_grad)


def _libraries(job: Job) -> Iterator[str]:
    yield from LIBRARIES
    train = job.config.train
    if train.base != "plain" or train.optimizer in BITSANDBYTES_OPTIMIZERS:
        yield "bitsandbytes"
    if train.strategy.startswith("zero"):
        yield "deepspeed"


def _entries(training_folder: Path, output: Path) -> list[FileEntry]:
    paths = [Path(folder) / name for folder, _, names in os.walk(output) for name in names]
    return [storage.file_entry(path, folder=training_folder) for path in sorted(paths)]
