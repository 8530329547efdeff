"""A part of the weights is trained, the rest stays as it is: the last layers, the head, what a pattern names."""

import difflib

import torch
from transformers import PreTrainedModel

from schemas.errors import ConfigError
from schemas.training_config import FreezeConfig, TrainConfig
from trainer.layer_names import is_in_last, matches, num_layers
from trainer.methods import full

OUTPUT_FOLDER = full.OUTPUT_FOLDER
save = full.save
saved_names = full.saved_names


def apply(model: PreTrainedModel, train: TrainConfig) -> PreTrainedModel:
    """Raises ConfigError when there are fewer layers than named, or a pattern matches nothing."""
    names = [name for name, _ in model.named_parameters()]
    _check(names, train.freeze)
    modules = _modules(model, train.freeze)
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if _is_named(name, train.freeze, num_layers(names)):
            parameter.requires_grad_(True)
    return model


def _modules(model: PreTrainedModel, freeze: FreezeConfig) -> list[torch.nn.Module]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return [*([head] if freeze.head else []), *([embedding] if freeze.embeddings else [])]


def _is_named(name: str, freeze: FreezeConfig, num_layers: int) -> bool:
    return is_in_last(name, freeze.last_layers, num_layers=num_layers) or matches(name, freeze.parameters)


def _check(names: list[str], freeze: FreezeConfig) -> None:
    count = num_layers(names)
    if freeze.last_layers > count:
        raise ConfigError(
            f"train.freeze.last_layers is {freeze.last_layers}, the model has {count} layers; set {count} or fewer"
        )
    for pattern in freeze.parameters:
        if not any(matches(name, [pattern]) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ConfigError(
                f"train.freeze.parameters: {pattern!r} matches the whole name of no parameter; nearest: "
                f"{', '.join(close)}"
            )
