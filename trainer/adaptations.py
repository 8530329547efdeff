"""Settings that work otherwise than asked for: what is done in their place, and why. Light: no torch.

The training prints what it does as it begins; this table says it beforehand, and feeds the published matrix.
"""

from collections.abc import Iterator
from typing import Any

from schemas.pipeline_config import PipelineConfig
from trainer.rules import Adaptation
from trainer.setting_rules import takes_layers
from trainer.virtual_rules import VIRTUAL_TOKEN_ADAPTATIONS, is_unpacked


def adaptations(config: PipelineConfig, architecture: dict[str, Any]) -> Iterator[tuple[Adaptation, str]]:
    """Each that the config meets, with what was found."""
    for adaptation in ADAPTATIONS:
        found = adaptation.find(config, architecture)
        if found is not None:
            yield adaptation, found


def _lora_over_bits(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.method != "lora" or train.kernels == "plain" or train.base != "int8":
        return None
    return f"train.base is {train.base}"


def _lora_with_dropout(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.method != "lora" or train.kernels == "plain" or train.lora.dropout == 0:
        return None
    return f"train.lora.dropout is {train.lora.dropout}"


def _dora(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    return "train.lora.dora is true" if train.method == "lora" and train.lora.dora else None


def _half_floats(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    return "model.dtype is float16" if config.model and config.model.dtype == "float16" else None


def _wide_floats(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    is_wide = config.model is not None and config.model.dtype == "float32"
    return "model.dtype is float32" if is_wide and not is_unpacked(config.train) else None


def _compiled(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    is_so = config.train.compile and not takes_layers(config.train) and not is_unpacked(config.train)
    return "train.compile is true" if is_so else None


def _selective_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.gradient_checkpointing != "selective" or takes_layers(train):
        return None
    return (
        f"train.gradient_checkpointing is selective, train.method {train.method}, strategy {train.strategy}"
    )


ADAPTATIONS = (
    Adaptation(
        "lora-over-bits",
        _lora_over_bits,
        "LoRA layers compute PEFT's own way, one product after the other",
        "bitsandbytes multiplies in 8 bits itself, and the fused pass wants to",
    ),
    Adaptation(
        "lora-dropout",
        _lora_with_dropout,
        "LoRA layers compute PEFT's own way, one product after the other",
        "the fused pass gives both products the same input, and dropout changes that of one",
    ),
    Adaptation(
        "dora",
        _dora,
        "LoRA layers compute PEFT's own way; magnitudes and lengths of weights are fp32 whatever model.dtype says",
        "the fused pass knows no magnitudes, and in 16 bits their updates are lost",
        links=("huggingface/trl#7268",),
    ),
    Adaptation(
        "attention-by-document",
        _wide_floats,
        "attention runs one document after the other, also on CUDA",
        "the variable-length kernel computes in 16 bits",
    ),
    Adaptation(
        "compile-parts",
        _compiled,
        "each layer is compiled in two parts, attention runs between them; LoRA, norms and MLPs are fused by the compiler "
        "and by no kernels of ours or Liger's",
        "attention knows the documents' borders as numbers, and a compiler would make a program for each set of them",
        links=("huggingface/peft#1199", "huggingface/peft#2900"),
    ),
    Adaptation(
        "selective-as-full",
        _selective_elsewhere,
        "all but the input of each layer is recomputed, as with full",
        "what is cheap is known where decoder layers are computed as one: with LoRA under strategy single or ddp",
    ),
    Adaptation(
        "loss-scale",
        _half_floats,
        "the loss is multiplied before the backward pass; steps that overflow are skipped and counted",
        "fp16 has no numbers below 6e-8, where many gradients are",
    ),
    *VIRTUAL_TOKEN_ADAPTATIONS,
)
