"""LLaMA-Adapter: virtual tokens beside the attention of each layer, behind a gate that begins at zero.

So the model before the first step is the base. Source: Zhang et al., LLaMA-Adapter: Efficient Fine-tuning of
Language Models with Zero-init Attention (2023).
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import AdaptionPromptConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipelines import storage
from schemas.training_config import ModelConfig, TrainConfig
from trainer.methods.lora import ADAPTER_NAME, adapter_config
from trainer.methods.prompt_learning import OUTPUT_FOLDER, saved_names
from trainer.model import outdated_names_allowed
from trainer.weights import check_weights, whole_shape

__all__ = ["OUTPUT_FOLDER", "apply", "save", "saved_names"]


def apply(model: PreTrainedModel, train: TrainConfig) -> PeftModel:
    num_layers = model.config.get_text_config().num_hidden_layers
    settings = AdaptionPromptConfig(
        adapter_len=train.virtual_tokens.count,
        adapter_layers=train.virtual_tokens.layers or num_layers,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(train.seed)
    with outdated_names_allowed():
        wrapped = get_peft_model(model, settings, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
    assert isinstance(wrapped, PeftModel)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:  # over 8 bits PEFT takes fp32
            parameter.data = parameter.data.to(model.dtype)
    return wrapped


def save(
    model: PeftModel, folder: Path, model_config: ModelConfig, weights: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """adapter_config.json and adapter_model.safetensors. Raises TrainingError when a tensor is empty or odd."""
    tensors = get_peft_model_state_dict(model, state_dict=dict(weights))
    shapes = {name: whole_shape(p) for name, p in model.named_parameters() if p.requires_grad}
    check_weights(tensors, shapes)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    storage.write_json(folder / "adapter_config.json", adapter_config(model, model_config))
