"""What prefix, prompt and p_tuning share: PEFT's prompt encoder over a frozen base, and how it is saved.

A small network that makes the virtual tokens is needed in training alone: what is saved is what it makes.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptLearningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipelines import storage
from schemas.training_config import ModelConfig
from trainer.methods.lora import ADAPTER_NAME, adapter_config
from trainer.model import outdated_names_allowed
from trainer.weights import check_weights

OUTPUT_FOLDER = "adapter"
ENCODER_PREFIX = f"prompt_encoder.{ADAPTER_NAME}."


def wrapped(model: PreTrainedModel, settings: PromptLearningConfig, *, seed: int) -> PeftModel:
    """The encoder computes in the model's dtype; its fp32 masters stand in the optimiser."""
    torch.manual_seed(seed)
    with outdated_names_allowed():
        peft_model = get_peft_model(model, settings, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    assert isinstance(peft_model, PeftModel)
    for parameter in peft_model.base_model.parameters():
        parameter.requires_grad_(False)
    peft_model.prompt_encoder.to(dtype=model.dtype)
    return peft_model


def saved_names(model: PeftModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save(
    model: PeftModel, folder: Path, model_config: ModelConfig, weights: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """adapter_config.json and adapter_model.safetensors. Raises TrainingError when a number is missing or not
    finite.
    """
    tensors = {"prompt_embeddings": _made_tokens(model, dict(weights))}
    check_weights(tensors, {"prompt_embeddings": _shape(model)})
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    storage.write_json(folder / "adapter_config.json", adapter_config(model, model_config))


@torch.no_grad()
def _made_tokens(model: PeftModel, trained: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the encoder makes of its trained weights, computed in fp32 and rounded once."""
    encoder = copy.deepcopy(model.prompt_encoder[ADAPTER_NAME])
    dtype = next(iter(trained.values())).dtype
    encoder.to_empty(device="cpu").float()
    encoder.load_state_dict({name.removeprefix(ENCODER_PREFIX): tensor for name, tensor in trained.items()})
    tokens: torch.Tensor = encoder(torch.arange(_shape(model)[0])[None])[0]
    return tokens.to(dtype).contiguous()


def _shape(model: PeftModel) -> tuple[int, int]:
    settings: Any = model.peft_config[ADAPTER_NAME]
    per_layer = 2 * settings.num_layers if settings.peft_type == "PREFIX_TUNING" else 1
    return settings.num_virtual_tokens, per_layer * settings.token_dim
