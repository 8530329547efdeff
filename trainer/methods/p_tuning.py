"""P-tuning: embeddings before those of each document come out of a small network that is trained.

Source: Liu et al., GPT Understands, Too (2021).
"""

from peft import PeftModel, PromptEncoderConfig
from transformers import PreTrainedModel

from schemas.training_config import TrainConfig
from trainer.methods.prompt_learning import OUTPUT_FOLDER, save, saved_names, wrapped

__all__ = ["OUTPUT_FOLDER", "apply", "save", "saved_names"]


def apply(model: PreTrainedModel, train: TrainConfig) -> PeftModel:
    settings = PromptEncoderConfig(
        num_virtual_tokens=train.virtual_tokens.count,
        encoder_hidden_size=train.virtual_tokens.inner_size,  # type: ignore[arg-type]  # None: the hidden size
        task_type="CAUSAL_LM",
    )
    return wrapped(model, settings, seed=train.seed)
