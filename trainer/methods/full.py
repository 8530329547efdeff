"""Full tuning: every weight is trained."""

import os
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from schemas.errors import TrainingError
from schemas.training_config import ModelConfig, TrainConfig
from trainer.support import model_folder

OUTPUT_FOLDER = "model"


def apply(model: PreTrainedModel, train: TrainConfig) -> PreTrainedModel:
    """Switch gradients on everywhere; tied weights stay one parameter."""
    return model.requires_grad_(True)


def save(model: PreTrainedModel, folder: Path, model_config: ModelConfig) -> None:
    """A model folder in the model's dtype. Raises TrainingError when a weight is empty or not finite."""
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0 or not bool(torch.isfinite(parameter).all()):
            raise TrainingError(f"weight {name} {tuple(parameter.shape)} is empty or not finite; not saved")
    # Saving imports DeepSpeed where it is installed, and that would print what hardware it looked for in vain.
    os.environ.setdefault("DS_ACCELERATOR", model.device.type)
    # transformers 5.17 refuses to write generation settings that it reads without a word: keep the base's file.
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    own_settings = model_folder(model_config.path, model_config.revision) / "generation_config.json"
    if own_settings.is_file():
        (folder / "generation_config.json").write_bytes(own_settings.read_bytes())
