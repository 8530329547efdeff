"""In which dtype a model computes, and that all of it does."""

from typing import Any

import torch
from transformers import PreTrainedModel

from schemas.errors import RefusedError, TrainingError
from schemas.training_config import ModelConfig
from trainer.attention import unwrapped

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BFLOAT16_CAPABILITY, FLOAT16_CAPABILITY = (8, 0), (7, 0)
"""Compute capabilities from which on tensor cores multiply in that precision."""


def resolve_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware computes in it, float16 where only that has tensor cores, else float32.

    Raises RefusedError where bfloat16 was asked for and is emulated.
    """
    capability = _compute_capability(device) if device.type == "cuda" else BFLOAT16_CAPABILITY
    if model.dtype == "bfloat16" and capability < BFLOAT16_CAPABILITY:
        raise RefusedError(
            f"model.dtype is bfloat16 but {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability}, below 8.0; use dtype: float16 (from 7.0 on) or float32"
        )
    if model.dtype != "auto":
        return DTYPES[model.dtype]
    if capability >= BFLOAT16_CAPABILITY:
        return torch.bfloat16
    return torch.float16 if capability >= FLOAT16_CAPABILITY else torch.float32


def _compute_capability(device: torch.device) -> tuple[int, int]:
    # torch.cuda.is_bf16_supported() says yes below 8.0 too, through emulation.
    return torch.cuda.get_device_capability(device)


def check_dtypes(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """PEFT and bitsandbytes make fp32 of adapters, norms or the head here and there: slower, and no mistake shows.

    Raises TrainingError when a parameter computes in another dtype, unless its family asks for fp32 itself.
    """
    causal_lm = unwrapped(model)
    for name, parameter in model.named_parameters():
        is_floating = parameter.is_floating_point()
        if is_floating and parameter.dtype != dtype and not _is_own_dtype(causal_lm, name):
            raise TrainingError(f"{name} is {parameter.dtype}, expected {dtype}: report this")


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """From a quantised folder transformers takes norms, biases and the head in the dtype that they have there."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16) and not _is_own_dtype(
            model, name
        ):
            parameter.data = parameter.data.to(dtype)


def _is_own_dtype(model: Any, name: str) -> bool:
    """Quantised bytes, their scales, and what a model's family computes in fp32 whatever the rest does."""
    in_fp32 = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    is_own = name.endswith((".packed", ".absmax", ".rows", ".scales")) or is_scale_vector(name)
    return is_own or any(part in in_fp32 for part in name.split("."))


def is_scale_vector(name: str) -> bool:
    """A parameter of IA3 or a magnitude of DoRA, held in fp32: near 1, bf16 knows steps of 1/128 alone."""
    return ".ia3_l." in name or ".lora_magnitude_vector." in name
