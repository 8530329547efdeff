"""Faster ways to compute the same: decoder layers as one, LoRA layers in two passes, Liger's kernels.

They take over layers of a loaded model in place. Parameters, their names, saving and loading stay PEFT's and
transformers' own; a layer that a fast way can't compute keeps its old one.
"""

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLayer

from schemas.training_config import TrainConfig
from trainer.attention import unwrapped
from trainer.compiling import compiler_backend
from trainer.fast import pointwise
from trainer.fast.layer import Manner
from trainer.fast.offload import CheckpointOffload
from trainer.fast.pointwise import Pointwise, has_triton
from trainer.fast.products import member_of
from trainer.fast.taking import Taken, take_over
from trainer.int8_rows import Int8RowsLinear, dequantised
from trainer.nf4 import NF4Linear, unpacked
from trainer.setting_rules import can_take_layers, takes_layers


@dataclass(frozen=True, slots=True)
class Kernels:
    """What was taken over: LoRA layers of how many, and whether Liger computes norms, rotations and MLPs."""

    num_lora_layers: int
    num_fused_lora_layers: int
    has_liger: bool

    def __str__(self) -> str:
        liger = "Liger norms, rotations and MLPs" if self.has_liger else "transformers' norms and MLPs"
        if self.num_lora_layers == 0:
            return liger
        return f"{self.num_fused_lora_layers} of {self.num_lora_layers} LoRA layers fused, {liger}"


def use_fast_kernels(model: torch.nn.Module, train: TrainConfig, *, device: torch.device) -> Kernels:
    """Take over what can be, unless train.kernels is "plain".

    A compiler gets layers as they are: with a forward of its own each layer would be a program of its own.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if train.kernels == "plain" or train.compile:
        return Kernels(len(layers), 0, has_liger=False)
    fused = [layer for layer in layers if member_of(layer) is not None]
    for layer in fused:
        layer.forward = functools.partial(_lora_forward, layer)  # type: ignore[method-assign]
    return Kernels(len(layers), len(fused), has_liger=device.type == "cuda" and _use_liger(model))


def use_fast_layers(model: torch.nn.Module, train: TrainConfig, *, device: torch.device) -> Taken | None:
    """Compute decoder layers as one where their family can be, and the settings ask for it or it is faster; else None.

    For a model that has its weights and lies on its device: they move.
    """
    if not takes_layers(train) and not (can_take_layers(train) and has_triton(device)):
        return None
    manner = Manner(
        pointwise=_pointwise(train, device),
        keep=train.gradient_checkpointing,
        mlp_tokens=train.mlp_tokens_at_once,
        offload=CheckpointOffload(device) if train.offload_checkpoints else None,
    )
    return take_over(model, manner)


def _pointwise(train: TrainConfig, device: torch.device) -> Pointwise:
    if has_triton(device):
        from trainer.fast.triton_pointwise import ON_GPU

        return ON_GPU
    return pointwise.compiled(compiler_backend()) if train.compile else pointwise.PLAIN


# LoRA -------------------------------------------------------------------------------------------------------


def _lora_forward(layer: LoraLayer, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or arguments or options:
        return LoraLayer.forward(layer, x, *arguments, **options)
    name = layer.active_adapters[0]
    base = layer.base_layer
    form = _form(base)
    # A strategy may hand them over as fp32 masters; elsewhere this casts nothing.
    down, up = layer.lora_A[name].weight.to(x.dtype), layer.lora_B[name].weight.to(x.dtype)
    output: torch.Tensor = _FusedLora.apply(x, *form, base.bias, down, up, layer.scaling[name])
    return output


def _form(base: Any) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, int] | None]:
    """What `_dense` makes the weight of."""
    if isinstance(base, NF4Linear):
        return base.packed, base.absmax, base.shape
    if isinstance(base, Int8RowsLinear):
        return base.rows, base.scales, None
    return base.weight, None, None


class _FusedLora(torch.autograd.Function):
    """x W' + s (x A') B': the second product is added to the first one inside the matrix multiplication.

    PEFT's own way scales, adds and stores the whole output once more each, forwards and backwards. Shapes: x
    [..., in], W [out, in], A [rank, in], B [out, rank]. With `scales` the weight is held in bits (packed NF4 where
    there is a shape, else int8 rows), unpacked forwards and backwards and never kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None,
        shape: tuple[int, int] | None,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ down.T
        dense = _dense(weight, scales, shape, x.dtype)
        output = F.linear(rows, dense, bias).addmm_(low, up.T, alpha=scaling)
        ctx.save_for_backward(rows, weight, scales, down, up, low)
        ctx.scaling, ctx.input_shape, ctx.weight_shape = scaling, x.shape, shape
        return output.view(*x.shape[:-1], output.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, scales, down, up, low = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1])
        low_gradient = (gradient @ up).mul_(ctx.scaling)
        down_gradient = low_gradient.T @ rows
        up_gradient = (gradient.T @ low).mul_(ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            dense = _dense(weight, scales, ctx.weight_shape, gradient.dtype)
            x_gradient = (gradient @ dense).addmm_(low_gradient, down).view(ctx.input_shape)
        return x_gradient, None, None, None, None, down_gradient, up_gradient, None


def _dense(
    weight: torch.Tensor, scales: torch.Tensor | None, shape: tuple[int, int] | None, dtype: torch.dtype
) -> torch.Tensor:
    if scales is None:
        return weight
    return dequantised(weight, scales, dtype) if shape is None else unpacked(weight, scales, shape, dtype)


# Liger ------------------------------------------------------------------------------------------------------


def _use_liger(model: torch.nn.Module) -> bool:
    """True where Liger is installed and knows the architecture."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.transformers.monkey_patch import (
        MODEL_TYPE_TO_APPLY_LIGER_FN,
        _apply_liger_kernel_to_instance,
    )

    # It warns of each kernel that it has for other makers' hardware.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    inner = unwrapped(model)
    if inner.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    modeling = sys.modules[type(inner).__module__]
    before = dict(vars(modeling))
    _apply_liger_kernel_to_instance(model=inner, cross_entropy=False, fused_linear_cross_entropy=False)
    _undo_for_other_models(modeling, before)
    return True


def _undo_for_other_models(modeling: Any, before: dict[str, Any]) -> None:
    """Liger changes an instance, and its module for all models to come, on a CPU too, where it can't run."""
    for name, original in before.items():
        changed = getattr(modeling, name)
        if changed is original:
            continue
        # The rotation is a function of the module: the instance has no place of its own for it.
        is_rotation = name == "apply_rotary_pos_emb"
        setattr(modeling, name, _by_device(changed, original) if is_rotation else original)


def _by_device(on_cuda: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(elsewhere)
    def rotate(query: torch.Tensor, *others: Any, **options: Any) -> Any:
        return (on_cuda if query.is_cuda else elsewhere)(query, *others, **options)

    return rotate
