"""Which layers of a model the matrices of LoRA stand beside, and whether they fit: asked of names and shapes alone."""

import difflib
import re
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from schemas.errors import ConfigError
from schemas.training_config import LoraConfig
from trainer.lora_rules import TAKEN_FROM_BASE

ALL_LINEAR = "all-linear"


def check_targets(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Raises ConfigError for a target or a whole module that the model has not, or a rank that is too high for one."""
    layers = target_layers(model, lora.targets)
    for name, layer in layers.items():
        highest = min(layer.in_features, layer.out_features)
        if lora.rank > highest:
            raise ConfigError(
                f"train.lora.rank is {lora.rank}, {name} is a matrix of {layer.out_features} x {layer.in_features}: "
                f"set it to at most {highest}, or name train.lora.targets without {name.rpartition('.')[2]!r}"
            )
    _check_whole_modules(model, lora.modules_to_save)
    if lora.init in TAKEN_FROM_BASE:
        _check_untied(model, layers)


def _check_untied(model: PreTrainedModel, layers: Mapping[str, torch.nn.Linear]) -> None:
    embedding = model.get_input_embeddings()
    for name, layer in layers.items():
        if layer.weight is embedding.weight:
            raise ConfigError(
                f"{name} is the embedding too, and what train.lora.init would take out of it the embedding needs: "
                "name train.lora.targets without it, or set train.lora.init to default"
            )


def target_layers(model: PreTrainedModel, targets: str | list[str]) -> dict[str, torch.nn.Linear]:
    """By name, as PEFT finds them. Raises ConfigError when a target matches nothing."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings()
        return {name: layer for name, layer in layers.items() if layer is not head}
    if isinstance(targets, str):
        return _matching_pattern(layers, targets)
    return matching_names(layers, targets, setting="train.lora.targets")


def targets_for_peft(model: PreTrainedModel, targets: str | list[str]) -> str | list[str]:
    """As the config has them; of a pattern that matches norms and the like too, which PEFT refuses, the linear ones."""
    if targets == ALL_LINEAR or isinstance(targets, list):
        return targets
    layers = target_layers(model, targets)
    matched = {name for name, _ in model.named_modules() if re.fullmatch(targets, name)}
    return targets if matched == set(layers) else list(layers)


def matching_names(
    layers: Mapping[str, torch.nn.Linear], targets: Iterable[str], *, setting: str
) -> dict[str, torch.nn.Linear]:
    """Layers whose last parts of the name are one of these. Raises ConfigError when one matches nothing."""
    found: dict[str, torch.nn.Linear] = {}
    for target in targets:
        matching = {name: layers[name] for name in layers if name == target or name.endswith(f".{target}")}
        if not matching:
            raise ConfigError(f"{setting}: {target!r} matches no linear layer; {nearest(target, layers)}")
        found |= matching
    return found


def _matching_pattern(layers: Mapping[str, torch.nn.Linear], pattern: str) -> dict[str, torch.nn.Linear]:
    try:
        found = {name: layer for name, layer in layers.items() if re.fullmatch(pattern, name)}
    except re.error as error:
        raise ConfigError(
            f"train.lora.targets: {pattern!r} is no regular expression ({error}); names of modules stand in a list"
        ) from None
    if not found:
        raise ConfigError(
            f"train.lora.targets: {pattern!r} matches no linear layer; {nearest(pattern, layers)}"
        )
    return found


def _check_whole_modules(model: PreTrainedModel, names: list[str]) -> None:
    modules = [name for name, _ in model.named_modules() if name]
    for wanted in names:
        # PEFT's own reading, and it says nothing where none matches.
        if not any(name.endswith(wanted) for name in modules):
            raise ConfigError(
                f"train.lora.modules_to_save: {wanted!r} is the end of no module's name; {nearest(wanted, modules)}"
            )


def nearest(target: str, names: Iterable[str]) -> str:
    """Words for a message: the last parts of names that are like this one."""
    known = sorted({name.rpartition(".")[2] for name in names})
    close = difflib.get_close_matches(target, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"
