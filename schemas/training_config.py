"""Settings of the trainer, the evaluation and the gate."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class ModelConfig(_Section):
    path: str
    """Folder with a Hugging Face model and tokenizer, or a hub name that is in the local cache."""
    revision: str | None = None
    tokenizer: str | None = None
    """Folder or name of another tokenizer; default: the model's."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 from compute capability 8.0 on, and on CPUs; else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


class LoraConfig(_Section):
    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: str | list[str] = "all-linear"
    """'all-linear', or names of modules."""


class TrainConfig(_Section):
    method: Literal["lora", "full"] = "lora"
    lora: LoraConfig = LoraConfig()
    strategy: Literal["single"] = "single"
    epochs: int = Field(default=1, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    """Stop after this many optimiser steps."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Stop before the step that would pass this many tokens (padding not counted)."""
    bins_per_step: int = Field(default=8, gt=0)
    """Bins of the packing plan in one optimiser step, over all micro-steps."""
    bins_per_micro_step: int = Field(default=1, gt=0)
    """Bins in memory at once; changes speed and memory, never the result."""
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    """Default: warmup_share of all steps."""
    warmup_share: float = Field(default=0.03, ge=0, lt=1)
    min_learning_rate_share: float = Field(default=0.0, ge=0, le=1)
    """Where linear and cosine end, as a share of learning_rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Clip the global gradient norm to this; 0 is off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a quarter to a third slower."""
    kernels: Literal["auto", "plain"] = "auto"
    """auto: LoRA layers fused and, on CUDA with liger-kernel installed, its kernels; plain: the libraries' own."""
    deterministic: bool = False
    """CUDA only: bit-equal resume, slower. On CPU it always is."""
    seed: int = 0
    checkpoint_every_steps: int = Field(default=100, gt=0)
    keep_checkpoints: int = Field(default=2, gt=0)
    evaluate_every_steps: int = Field(default=0, ge=0)
    """Loss on the validation side every so many steps; 0: only at the end."""
    max_nonfinite_steps: int = Field(default=3, ge=0)
    """Skipped steps (loss or gradient not finite) before training gives up."""


class EvaluateConfig(_Section):
    split: Literal["validation", "test"] = "test"
    """Which held-out side the report and the gate use."""
    questions: list[str] = Field(default_factory=list)
    """Prompts answered greedily by the base model and by the candidate, for people to read."""
    max_new_tokens: int = Field(default=96, gt=0)


class PromoteConfig(_Section):
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided level of the paired bootstrap's lower bound."""
    bootstrap_samples: int = Field(default=2000, gt=0)
    seed: int = 0
    max_source_regression: float = Field(default=0.02, ge=0)
    """A source's bits per byte may grow by at most this share."""
