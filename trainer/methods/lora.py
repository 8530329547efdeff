"""LoRA through PEFT: the base is frozen, small matrices beside its linear layers are trained.

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021).
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipelines import storage
from schemas.errors import ConfigError
from schemas.training_config import ModelConfig, TrainConfig
from trainer.model import outdated_names_allowed
from trainer.weights import check_weights, whole_shape

OUTPUT_FOLDER = "adapter"
ADAPTER_NAME = "default"


def apply(model: PreTrainedModel, train: TrainConfig) -> PeftModel:
    """Wrap the model. Adapters get the base's dtype: PEFT's default, fp32, makes it copy every activation to
    fp32 (10.8 k in place of 15.9 k tokens/s, 8 B shape, H100); their fp32 masters stand in the optimiser.

    Raises ConfigError when a target matches nothing.
    """
    _check_targets(model, train.lora.targets)
    settings = LoraConfig(
        r=train.lora.rank,
        lora_alpha=train.lora.alpha,  # type: ignore[arg-type]  # PEFT says int and takes any number
        lora_dropout=train.lora.dropout,
        target_modules=train.lora.targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(train.seed)
    with outdated_names_allowed():
        wrapped = get_peft_model(model, settings, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    assert isinstance(wrapped, PeftModel)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:  # beside 8-bit layers PEFT knows no dtype and takes fp32
            parameter.data = parameter.data.to(model.dtype)
    return wrapped


def saved_names(model: PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save(
    model: PeftModel, folder: Path, model_config: ModelConfig, weights: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """adapter_config.json and adapter_model.safetensors. Raises TrainingError when a tensor is empty or odd.

    Sharded strategies have left empty tensors in this place in several trainers, without an error.
    """
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in get_peft_model_state_dict(model, state_dict=dict(weights)).items()
    }
    check_weights(tensors, _expected_shapes(model))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    storage.write_json(folder / "adapter_config.json", _adapter_config(model, model_config))


def _adapter_config(model: PeftModel, model_config: ModelConfig) -> dict[str, Any]:
    # PEFT writes its sets in the order of the process's hash seed: equal work would give unequal bytes.
    settings = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in model.peft_config[ADAPTER_NAME].to_dict().items()
    }
    return settings | {
        "base_model_name_or_path": model_config.path,
        "revision": model_config.revision,
        "inference_mode": True,
    }


def _expected_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    return {
        name.replace(f".{ADAPTER_NAME}", ""): whole_shape(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


# Targets ----------------------------------------------------------------------------------------------------


def _check_targets(model: PreTrainedModel, targets: str | list[str]) -> None:
    if targets == "all-linear":
        return
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    patterns = [targets] if isinstance(targets, str) else targets
    for pattern in patterns:
        if not any(_matches(name, pattern, is_pattern=isinstance(targets, str)) for name in names):
            raise ConfigError(
                f"train.lora.targets: {pattern!r} matches no linear layer; {_nearest(pattern, names)}"
            )


def _matches(name: str, target: str, *, is_pattern: bool) -> bool:
    # PEFT's own reading: a string is a pattern for the whole name, names in a list match its last parts.
    if is_pattern:
        return re.fullmatch(target, name) is not None
    return name == target or name.endswith(f".{target}")


def _nearest(target: str, names: list[str]) -> str:
    known = sorted({name.rpartition(".")[2] for name in names})
    close = difflib.get_close_matches(target, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"
