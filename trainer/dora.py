"""DoRA in fp32 where it counts: the lengths of the weights' rows, which PEFT rounds to the dtype that computes.

An output is scaled by magnitude / length, which begins at 1. In bf16 the length moves in steps of up to 1/128, and
the whole output of the layer with it. Source: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation (2024).
"""

from collections.abc import Iterator

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer


def compute_in_float32(model: torch.nn.Module) -> None:
    """Take over the lengths in each DoRA layer of a model; all else stays PEFT's."""
    for _, magnitudes in _layers(model):
        magnitudes.get_weight_norm = _row_lengths  # type: ignore[method-assign]
        magnitudes.get_lora_weight = _product  # type: ignore[method-assign]


@torch.no_grad()
def begin_at_own_length(model: torch.nn.Module) -> None:
    """Magnitudes of a fresh adapter: PEFT's are rounded, and the model would not begin as the base."""
    for layer, magnitudes in _layers(model):
        for name in layer.lora_magnitude_vector:
            weight = layer.get_base_layer().weight
            assert isinstance(weight, torch.Tensor)
            product = _product(layer.lora_A[name], layer.lora_B[name])
            magnitudes.weight.copy_(_row_lengths(weight, product, layer.scaling[name]))


def _layers(model: torch.nn.Module) -> Iterator[tuple[LoraLayer, DoraLinearLayer]]:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for magnitudes in module.lora_magnitude_vector.values():
                assert isinstance(magnitudes, DoraLinearLayer)
                yield module, magnitudes


@torch.no_grad()
def _row_lengths(
    weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
) -> torch.Tensor:
    return torch.linalg.vector_norm(weight.float() + scaling * lora_weight.float(), dim=1)


@torch.no_grad()
def _product(
    lora_A: torch.nn.Module,  # PEFT calls it by these names
    lora_B: torch.nn.Module,
    adapter_name: str | None = None,
) -> torch.Tensor:
    """PEFT multiplies an identity matrix of the input's size through both instead."""
    up, down = lora_B.weight, lora_A.weight
    assert isinstance(up, torch.Tensor)
    assert isinstance(down, torch.Tensor)
    return up.float() @ down.float()
