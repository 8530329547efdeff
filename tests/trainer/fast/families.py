"""Tiny models of the families whose layers are written out, and of those that fall back."""

import copy
from typing import Any

import torch

from tests.trainer.tiny_models import example_of, random_documents, tiny_lora, tiny_model
from trainer.attention import use_packed_attention
from trainer.data import MicroBatch, collate
from trainer.fast.layer import Keep, Manner
from trainer.fast.pointwise import PLAIN
from trainer.fast.taking import Taken, take_over
from trainer.loss import summed_loss

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("phi3", {"sliding_window": 16}),
}
FALLING_BACK: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", {"head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of gradients, as a share of their norm. In bf16: more than the libraries' own layers differ from fp32 by."""


def adapted(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """With adapters that do something, biases and norms that are not what they begin with."""
    model_type, own = (FAMILIES | FALLING_BACK)[family]
    model = tiny_model(model_type, dtype=dtype, **own | settings)
    draws = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=draws) * 0.2
            parameter.data += noise.to(dtype)
    wrapped = tiny_lora(model)
    use_packed_attention(wrapped)
    return wrapped.train()


def batch(lengths: tuple[int, ...] = (37, 5, 64, 22)) -> MicroBatch:
    documents = random_documents(lengths)
    return collate([example_of(document, row) for row, document in enumerate(documents)])


def loss_and_gradients(model: Any, micro_batch: MicroBatch | None = None) -> tuple[float, torch.Tensor]:
    """All gradients in the order of the parameters, which taking over must not change."""
    model.zero_grad()
    loss = summed_loss(model, batch() if micro_batch is None else micro_batch)
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)
    return float(loss.detach()), torch.cat([p.grad.flatten().double() for p in trained if p.grad is not None])


def fast(model: Any, keep: Keep = "none", **manner: Any) -> tuple[Any, Taken]:
    """A copy that is taken over."""
    copied = copy.deepcopy(model)
    return copied, take_over(copied, Manner(manner.pop("pointwise", PLAIN), keep, **manner))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
