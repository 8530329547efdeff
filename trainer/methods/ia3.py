"""IA3 through PEFT: the base is frozen, a vector each scales keys, values and what the MLPs compute inside.

The vectors begin at 1 and stay fp32. Source: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and
Cheaper than In-Context Learning (2022).
"""

import torch
from peft import IA3Config, PeftModel, get_peft_model
from transformers import PreTrainedModel

from schemas.errors import ConfigError
from schemas.training_config import Ia3Config, TrainConfig
from trainer.lora_targets import matching_names
from trainer.memory import IA3_KEYS_AND_VALUES, IA3_LAST_OF_MLP
from trainer.methods.lora import ADAPTER_NAME, OUTPUT_FOLDER, save, saved_names
from trainer.model import outdated_names_allowed

__all__ = ["OUTPUT_FOLDER", "apply", "check", "save", "saved_names"]


def check(model: PreTrainedModel, train: TrainConfig) -> None:
    _targets(model, train.ia3)


def apply(model: PreTrainedModel, train: TrainConfig) -> PeftModel:
    """Wrap the model. Raises ConfigError when a target matches nothing."""
    outputs, inputs = _targets(model, train.ia3)
    settings = IA3Config(
        target_modules=[*outputs, *inputs], feedforward_modules=list(inputs), task_type="CAUSAL_LM"
    )
    with outdated_names_allowed():
        wrapped = get_peft_model(model, settings, adapter_name=ADAPTER_NAME)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def _targets(model: PreTrainedModel, ia3: Ia3Config) -> tuple[list[str], list[str]]:
    """Ends of names: whose outputs are scaled, and whose inputs."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    last_parts = {name.rpartition(".")[2] for name in layers}
    outputs = ia3.targets or [end for end in IA3_KEYS_AND_VALUES if end in last_parts]
    inputs = ia3.feedforward_targets or [end for end in IA3_LAST_OF_MLP if end in last_parts]
    if not outputs or not inputs:
        raise ConfigError(
            f"train.ia3: {type(model).__name__} has none of {', '.join((*IA3_KEYS_AND_VALUES, *IA3_LAST_OF_MLP))}; name "
            f"train.ia3.targets and train.ia3.feedforward_targets; known: {', '.join(sorted(last_parts))}"
        )
    matching_names(layers, outputs, setting="train.ia3.targets")
    matching_names(layers, inputs, setting="train.ia3.feedforward_targets")
    return outputs, inputs
