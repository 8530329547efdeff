"""Prefix tuning: keys and values before those of each document, in every layer, are trained.

Source: Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation (2021).
"""

from peft import PeftModel, PrefixTuningConfig
from transformers import PreTrainedModel

from schemas.training_config import TrainConfig
from trainer.methods.prompt_learning import OUTPUT_FOLDER, save, saved_names, wrapped

__all__ = ["OUTPUT_FOLDER", "apply", "save", "saved_names"]


def apply(model: PreTrainedModel, train: TrainConfig) -> PeftModel:
    """With an inner size the keys and values come out of a network of two layers, as in the paper."""
    settings = PrefixTuningConfig(
        num_virtual_tokens=train.virtual_tokens.count,
        prefix_projection=train.virtual_tokens.inner_size is not None,
        encoder_hidden_size=train.virtual_tokens.inner_size,  # type: ignore[arg-type]  # PEFT's own default is None
        task_type="CAUSAL_LM",
    )
    return wrapped(model, settings, seed=train.seed)
