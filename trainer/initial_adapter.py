"""LoRA that begins elsewhere than at noise and zero: train.lora.init. What it began with stays beside the checkpoints.

    <training>/initial_adapter/    a plain LoRA adapter: what the first rank computed, and all ranks and resumes read

pissa and olora take the product of their first matrices out of the base while it is trained, so the trained matrices
say nothing over the base itself. What is published is their difference to the first ones: plain LoRA of twice the
rank. loftq makes up for what a quantised base has lost: over that base its matrices are a plain adapter, over the
unquantised one their difference is.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file

from pipelines import storage
from schemas.errors import InputError, IntegrityError
from schemas.run import MANIFEST_NAME, FileEntry
from schemas.training_config import ModelConfig, TrainConfig
from trainer.attention import unwrapped
from trainer.checkpoint import step_folders
from trainer.data import micro_batch
from trainer.eva import leading_directions, shared_ranks
from trainer.folders import built_aside
from trainer.job import Job
from trainer.lora_rules import TAKEN_FROM_BASE
from trainer.lora_starts import STARTS
from trainer.lora_targets import target_layers
from trainer.loss import hidden_states
from trainer.methods import lora
from trainer.model_files import check_model_folder
from trainer.start_adapter import CONFIG_NAME, TENSORS_NAME, adapter_settings, combined, take_off_adapter
from trainer.weights import WeightFiles, name_in_files

FOLDER_NAME = "initial_adapter"
OVER_UNQUANTISED_BASE = "over_unquantised_base"
"""Folder in an adapter that is right over a quantised base: the same training, for the unquantised one."""


def is_needed(train: TrainConfig) -> bool:
    return train.method == "lora" and train.lora.init != "default"


def apply(job: Job, model: torch.nn.Module) -> PeftModel:
    """The model wrapped in its initial adapter, with what is in that taken out of the base."""
    train = job.config.train
    trained = wrapped_in(model, train, _prepared(job, model))
    if train.lora.init in TAKEN_FROM_BASE:
        _take_from_base(trained)
    return trained


def wrapped_in(model: torch.nn.Module, train: TrainConfig, folder: Path) -> PeftModel:
    """The model with that adapter. Raises IntegrityError when it is not the one that was written."""
    record = storage.read_record(folder / MANIFEST_NAME, cure=_cure(folder))
    for entry in record["files"]:
        storage.check_file(folder, FileEntry.model_validate(entry), cure=_cure(folder))
    return lora.apply_existing(unwrapped(model), train, folder)


def complete(output: Path, train: TrainConfig, training_folder: Path) -> None:
    """Make of an adapter that was saved over the changed base one that is right over the base as it is."""
    if not is_needed(train) or train.lora.init == "eva":
        return
    target = output
    if train.lora.init not in TAKEN_FROM_BASE:
        target = output / OVER_UNQUANTISED_BASE
        target.mkdir()
    tensors, settings = combined(
        load_file(output / TENSORS_NAME),
        adapter_settings(output),
        training_folder / FOLDER_NAME,
        factor=-1.0,
    )
    save_file(tensors, target / TENSORS_NAME, metadata={"format": "pt"})
    storage.write_json(target / CONFIG_NAME, settings)


@torch.no_grad()
def _take_from_base(model: PeftModel) -> None:
    """The same numbers from the same base and adapter: a resumed training goes on over the same weights."""
    for layer in _lora_layers(model).values():
        weight = layer.get_base_layer().weight
        assert isinstance(weight, torch.nn.Parameter)
        down, up = _matrices(layer)
        weight.copy_(weight.float() - layer.scaling[lora.ADAPTER_NAME] * (up.float() @ down.float()))


# Made once --------------------------------------------------------------------------------------------------


def _prepared(job: Job, model: torch.nn.Module) -> Path:
    folder = job.folder / FOLDER_NAME
    if job.ranks.is_first and not folder.exists():
        if step_folders(job.folder):
            raise IntegrityError(
                f"{folder} is gone, and the checkpoints beside it go on from what it held; {_cure(folder)}"
            )
        with built_aside(folder) as aside:
            _write(job, model, aside)
    job.ranks.wait_for_all()
    return folder


def _cure(folder: Path) -> str:
    return f"put it back, or delete {folder.parent} and train again"


@torch.no_grad()
def _write(job: Job, model: torch.nn.Module, folder: Path) -> None:
    train = job.config.train
    wrapped = _eva(job, model) if train.lora.init == "eva" else _from_weights(job, model)
    weights = ((name, wrapped.get_parameter(name).cpu()) for name in lora.saved_names(wrapped))
    lora.save(wrapped, folder, job.model, weights)
    take_off_adapter(wrapped)
    entries = [storage.file_entry(folder / name, folder=folder) for name in (CONFIG_NAME, TENSORS_NAME)]
    storage.write_record(folder / MANIFEST_NAME, {"files": [entry.model_dump() for entry in entries]})


def _from_weights(job: Job, model: torch.nn.Module) -> PeftModel:
    """Matrices out of the weights that they stand beside."""
    train = job.config.train
    wrapped = lora.apply(unwrapped(model), train)
    for name, layer in _lora_layers(wrapped).items():
        job.ranks.pulse.move()
        weight = _held(layer.get_base_layer())
        if train.lora.init == "loftq":
            weight = _unquantised(job.model, name, weight) - weight
        matrices = STARTS[train.lora.init](weight, train.lora.rank, layer.scaling[lora.ADAPTER_NAME])
        for parameter, matrix in zip(_matrices(layer), matrices, strict=True):
            parameter.copy_(matrix)
    return wrapped


def _held(layer: torch.nn.Module) -> torch.Tensor:
    """The weight that a layer computes with, in fp32."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    scales = getattr(
        weight, "SCB", None
    )  # bitsandbytes' int8; PEFT's own way to unpack it leaves the layer broken
    return weight.detach().float() if scales is None else weight.data.float() * scales[:, None] / 127


def _unquantised(model: ModelConfig, name: str, like: torch.Tensor) -> torch.Tensor:
    """The weight as it stands in the model's files."""
    key = name_in_files(f"{name}.weight")
    with WeightFiles(check_model_folder(model)) as files:
        stored = files.tensors.get(key)
        if stored is None or stored.shape != tuple(like.shape):
            raise InputError(
                f"the model's files hold {key} {'not at all' if stored is None else stored.shape}, expected "
                f"{tuple(like.shape)}: train.lora.init loftq needs the unquantised weights; set it to default"
            )
        return files.read(key, 0, like.numel()).view(like.shape).to(like)


def _eva(job: Job, model: torch.nn.Module) -> PeftModel:
    """Matrices out of what flows through the layers over the first bins of the training side."""
    train, base = job.config.train, unwrapped(model)
    layers = target_layers(base, train.lora.targets)
    was_training = base.training
    base.eval()
    found = leading_directions(
        layers, lambda: _forward_passes(job, base), num=round(train.lora.rank * train.lora.eva_rho)
    )
    base.train(was_training)
    shares = {name: found[name].shares[: layer.out_features] for name, layer in layers.items()}
    ranks = shared_ranks(shares, train.lora.rank)
    wrapped = lora.apply_with_ranks(base, train, ranks)
    for name, layer in _lora_layers(wrapped).items():
        vectors = found[name.removeprefix("base_model.model.")].vectors
        down, _ = _matrices(layer)
        down.copy_(vectors[: len(down)])
    return wrapped


def _forward_passes(job: Job, model: torch.nn.Module) -> Iterator[torch.Tensor]:
    plan = job.plans[0]
    for number in range(min(job.config.train.lora.eva_bins, plan.num_bins)):
        job.ranks.pulse.move()
        yield hidden_states(model, micro_batch(plan, job.reader, number, number + 1).to(job.device))


def _lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _matrices(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    down, up = (parts[lora.ADAPTER_NAME].weight for parts in (layer.lora_A, layer.lora_B))
    assert isinstance(down, torch.Tensor)
    assert isinstance(up, torch.Tensor)
    return down, up
