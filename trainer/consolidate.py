"""`sft-pipeline consolidate`: a Hugging Face folder, adapter or model, from any checkpoint.

Offline, on the CPU, whatever strategy and number of processes wrote it. The trained weights alone are read; the base
model gives names and shapes and is not loaded, where its files can be read in parts.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from schemas.run import CHECKPOINTS_FOLDER
from trainer import initial_adapter
from trainer.checkpoint import BEST_NAME, LATEST_NAME, Checkpoint, read_checkpoint, step_folders
from trainer.folders import built_aside
from trainer.methods import METHODS
from trainer.metrics import report
from trainer.model import load_base_model, load_tokenizer, needed_model
from trainer.pieces import Shapes, check_shapes, read_whole
from trainer.weights import model_without_weights, whole_shape


def consolidate(config: PipelineConfig, *, checkpoint: str = LATEST_NAME, out: Path) -> Path:
    """Write `out`. `checkpoint` is a folder, or latest, best or step-<n> of the newest training of the run root.

    Raises InputError where there is no such checkpoint or `out` is there, IntegrityError for a damaged one,
    TrainingError for one of other weights than the config trains.
    """
    if out.exists():
        raise InputError(f"{out} is there already; name a folder that is not")
    folder = find_checkpoint(config, checkpoint)
    found = _read(folder)
    dtype: torch.dtype = getattr(torch, str(found.facts["dtype"]))
    method = METHODS[config.train.method]
    model = _model(config, dtype, folder.parent)
    names = method.saved_names(model)
    check_shapes(found.shapes, _trained_shapes(model))
    with built_aside(out) as temporary:
        method.save(model, temporary, needed_model(config), _weights(found, model, names, dtype))
        initial_adapter.complete(temporary, config.train, folder.parent)
        load_tokenizer(config).save_pretrained(temporary)
    return out


def run_consolidate(config: PipelineConfig, *, checkpoint: str, out: Path) -> None:
    """Prints the folder."""
    report(f"reading {find_checkpoint(config, checkpoint)}")
    print(consolidate(config, checkpoint=checkpoint, out=out))


def find_checkpoint(config: PipelineConfig, name: str) -> Path:
    """The folder of a checkpoint. Raises InputError that says which ones there are."""
    if "/" in name or Path(name).is_dir():
        return Path(name)
    trainings = sorted(
        (config.run_root / CHECKPOINTS_FOLDER).glob(f"*/{LATEST_NAME}"), key=lambda path: path.stat().st_mtime
    )
    if not trainings:
        raise InputError(f"{config.run_root} has no checkpoint; train first, or give a checkpoint's folder")
    training = trainings[-1].parent
    pointer = training / name
    if name in (LATEST_NAME, BEST_NAME) and pointer.is_file():
        name = pointer.read_text().strip()
    if re.fullmatch(r"step-\d{8}", name) and (training / name).is_dir():
        return training / name
    there = ", ".join(folder.name for folder in step_folders(training)) or "none"
    raise InputError(f"{training} has no checkpoint {name}; there are {there}; best needs train.keep_best")


def _read(folder: Path) -> Checkpoint:
    try:
        return read_checkpoint(folder, facts=None)
    except ValueError as error:
        raise InputError(f"{folder} can't be used: {' '.join(str(error).split())}") from error


def _model(config: PipelineConfig, dtype: torch.dtype, training_folder: Path) -> Any:
    """Names and shapes of what is trained; in what form the frozen weights were held plays no part.

    Its other weights come along where the method saves them too.
    """
    settings, method = needed_model(config), METHODS[config.train.method]
    if not getattr(method, "NEEDS_WEIGHTS", False) and not settings.new_tokens:
        base = model_without_weights(settings, dtype=dtype)
        model = _applied(base, config, training_folder) if base is not None else None
        if model is not None and set(method.saved_names(model)) <= _trained_shapes(model).keys():
            return model
    base = load_base_model(settings, device=torch.device("cpu"), dtype=dtype)
    return _applied(base, config, training_folder)


def _applied(base: PreTrainedModel, config: PipelineConfig, training_folder: Path) -> torch.nn.Module:
    train = config.train
    if initial_adapter.is_needed(train):
        return initial_adapter.wrapped_in(base, train, training_folder / initial_adapter.FOLDER_NAME)
    model: torch.nn.Module = METHODS[train.method].apply(base, train)
    return model


def _trained_shapes(model: torch.nn.Module) -> Shapes:
    return {name: torch.Size(whole_shape(p)) for name, p in model.named_parameters() if p.requires_grad}


def _weights(
    found: Checkpoint, model: torch.nn.Module, names: Iterable[str], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        if name not in found.shapes:
            yield name, model.get_parameter(name).detach()
            continue
        weight = read_whole(found.read, "average", name, found.shapes[name])
        if weight is None:
            weight = read_whole(found.read, "weight", name, found.shapes[name])
        assert weight is not None, "a checkpoint holds all weights"
        yield name, weight.to(dtype)
