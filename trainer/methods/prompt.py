"""Prompt tuning: embeddings before those of each document are trained, and nothing else.

Source: Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning (2021).
"""

from peft import PeftModel, PromptTuningConfig
from transformers import PreTrainedModel

from schemas.training_config import TrainConfig
from trainer.methods.prompt_learning import OUTPUT_FOLDER, save, saved_names, wrapped

__all__ = ["OUTPUT_FOLDER", "apply", "save", "saved_names"]

STARTS = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM"}


def apply(model: PreTrainedModel, train: TrainConfig) -> PeftModel:
    settings = PromptTuningConfig(
        num_virtual_tokens=train.virtual_tokens.count,
        prompt_tuning_init=STARTS[train.virtual_tokens.init],
        task_type="CAUSAL_LM",
    )
    return wrapped(model, settings, seed=train.seed)
