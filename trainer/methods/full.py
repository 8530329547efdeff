"""Full tuning: every weight is trained."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from schemas.training_config import ModelConfig, TrainConfig
from trainer.support import model_folder
from trainer.weights import check_weights, whole_shape

OUTPUT_FOLDER = "model"


def apply(model: PreTrainedModel, train: TrainConfig) -> PreTrainedModel:
    """Switch gradients on everywhere; tied weights stay one parameter."""
    return model.requires_grad_(True)


def saved_names(model: PreTrainedModel) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def save(
    model: PreTrainedModel,
    folder: Path,
    model_config: ModelConfig,
    weights: Iterable[tuple[str, torch.Tensor]],
) -> None:
    """A model folder in the model's dtype. Raises TrainingError when a weight is missing, empty, of another shape
    or not finite.
    """
    tensors = dict(weights)
    check_weights(tensors, {name: whole_shape(parameter) for name, parameter in model.named_parameters()})
    persistent = model.state_dict().keys() - tensors.keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    # Saving imports DeepSpeed where it is installed, and that would print what hardware it looked for in vain.
    os.environ.setdefault("DS_ACCELERATOR", model.device.type)
    # transformers 5.17 refuses to write generation settings that it reads without a word: keep the base's file.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder, state_dict=tensors | buffers)
    own_settings = model_folder(model_config.path, model_config.revision) / "generation_config.json"
    if own_settings.is_file():
        (folder / "generation_config.json").write_bytes(own_settings.read_bytes())
