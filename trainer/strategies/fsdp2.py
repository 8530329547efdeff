"""FSDP2: each rank keeps a slice of every weight, gathers a layer when it computes, and drops it again.

A unit is what is gathered at once: a decoder layer, the embedding, the LM head. Trained weights are fp32 masters and
are gathered in the dtype that computes. A frozen base that fits is better kept whole on each rank
(train.shard_base): then only what is trained is cut, and little is sent. Source: Zhao et al., PyTorch FSDP (2023).
"""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion

from schemas.errors import RefusedError
from schemas.training_config import TrainConfig
from trainer import nf4
from trainer.attention import unwrapped
from trainer.loss import computed_by
from trainer.memory import free_machine_bytes
from trainer.nf4 import NF4Linear
from trainer.optimizers import trained_parameters
from trainer.ranks import Ranks
from trainer.stand_ins import change_parameters, is_stand_in
from trainer.strategies.shards import ShardedAdamW, element_range
from trainer.weights import WeightSource, name_in_files

WHOLE_BASE_SHARE = 0.5
"""Of the memory that is free on the fullest device: a frozen base that takes more is cut. The rest is for
activations, gathered layers and what is trained."""


def place(model: torch.nn.Module, device: torch.device, ranks: Ranks, train: TrainConfig) -> torch.nn.Module:
    causal_lm = unwrapped(model)
    change_parameters(model, _prepared)
    if torch.__version__ < TorchVersion("2.12"):
        nf4.store_as(model, torch.float32)  # older ones cut floating-point parameters alone
    whole = set() if _is_base_cut(model, device, ranks, train) else _frozen(model)
    head = causal_lm.get_output_embeddings()
    is_tied = _tie_to_sharded(causal_lm.get_input_embeddings(), head, whole)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (ranks.count,)),
        "reshard_after_forward": True,
        "offload_policy": _offload_policy(device, train),
        "ignored_params": whole,
    }
    backbone = causal_lm.base_model
    units = [causal_lm.get_input_embeddings(), *_layers(backbone), *([] if is_tied else [head]), backbone]
    taken = set(whole)
    for unit in units:
        own = [parameter for parameter in unit.parameters() if parameter not in taken]
        taken.update(own)
        if own or unit is backbone:
            fully_shard(unit, mp_policy=_precision(unit, own, compute_dtype(model)), **options)
    _sum_gradients(model)
    if not is_tied and isinstance(units[0], FSDPModule):
        units[0].set_unshard_in_backward(False)  # the gradient of a look-up needs no table
    _bring_to_device(model, device, torch.device("cpu") if train.offload == "all" else device)
    if left := [name for name, p in trained_parameters(model) if not isinstance(p, DTensor)]:
        raise RefusedError(
            f"{type(causal_lm).__name__} has the trained weight {left[0]} outside its layers, embeddings and head, "
            "which strategy fsdp2 does not cut; use strategy zero2 or ddp"
        )
    return model.train()


def build_optimizer(model: torch.nn.Module, train: TrainConfig, ranks: Ranks) -> ShardedAdamW:
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return ShardedAdamW(trained_parameters(model), units, train, ranks)


def compute_dtype(model: torch.nn.Module) -> torch.dtype:
    """The masters' own is fp32, whatever computes."""
    dtype = unwrapped(model).config.dtype
    assert isinstance(dtype, torch.dtype), f"loading sets it, found {dtype!r}"
    return dtype


def _prepared(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """Trained weights as fp32 masters; in the place of stand-ins nothing but a shape, to be filled when it is cut."""
    dtype = torch.float32 if parameter.requires_grad else parameter.dtype
    if is_stand_in(parameter):
        return torch.empty(parameter.shape, dtype=dtype, device="meta")
    return None if parameter.dtype == dtype else parameter.detach().to(dtype)


def _frozen(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    return {parameter for parameter in model.parameters() if not parameter.requires_grad}


def _layers(backbone: torch.nn.Module) -> list[torch.nn.Module]:
    """Members of the outermost module lists: decoder layers. Lists inside them, of experts, are parts of a layer."""
    found: list[torch.nn.Module] = []
    for child in backbone.children():
        found += child if isinstance(child, torch.nn.ModuleList) else _layers(child)
    return found


def _precision(
    unit: torch.nn.Module, own: list[torch.nn.Parameter], dtype: torch.dtype
) -> MixedPrecisionPolicy:
    """Trained weights are gathered in the dtype that computes and their gradients summed in fp32.

    Such a policy casts whatever it gathers. Where frozen weights have another dtype on purpose (the scales of 4-bit
    weights), the trained ones are gathered as they are and cast by their own layers.
    """
    has_trained = any(parameter.requires_grad for parameter in own)
    if not has_trained or dtype == torch.float32:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    if all(parameter.requires_grad or parameter.dtype == dtype for parameter in own):
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    _cast_in_own_layers(unit, own)
    return MixedPrecisionPolicy(cast_forward_inputs=False)


def _cast_in_own_layers(unit: torch.nn.Module, own: list[torch.nn.Parameter]) -> None:
    trained = {parameter for parameter in own if parameter.requires_grad}
    for name, module in unit.named_modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # PEFT would cast activations to fp32
        if trained.isdisjoint(module.parameters(recurse=False)):
            continue
        if type(module) is not torch.nn.Linear:
            raise RefusedError(
                f"{name}, a {type(module).__name__}, is trained beside 4-bit weights, which strategy fsdp2 does not "
                "do; use strategy ddp or zero2, or train.lora.targets without it"
            )
        module.forward = functools.partial(_linear, module)  # type: ignore[method-assign]


def _linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def _offload_policy(device: torch.device, train: TrainConfig) -> OffloadPolicy:
    if train.offload != "all":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


def _sum_gradients(model: torch.nn.Module) -> None:
    """The loss is divided by the whole step's weight, so gradients are added up and not averaged."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


UNFILLED = "is_unfilled"
"""Attribute of a parameter that has memory now and no numbers yet."""


def _bring_to_device(model: torch.nn.Module, device: torch.device, device_of_slices: torch.device) -> None:
    """Memory for what had none, marked to be filled; weights that are kept whole come along."""
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]

    def brought(parameter: torch.nn.Parameter) -> torch.Tensor | None:
        if isinstance(parameter, DTensor):
            return None
        return (
            torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.detach().to(device)
        )

    change_parameters(model, brought)
    # FSDP2 hears of new slices through _apply alone; buffers that it does not know come to the device here.
    model._apply(lambda t: torch.empty_like(t, device=device_of_slices) if t.is_meta else t)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    parameters = dict(model.named_parameters())
    for name in empty:
        setattr(parameters[name], UNFILLED, True)


# Whether the frozen weights are cut --------------------------------------------------------------------------


def _is_base_cut(model: torch.nn.Module, device: torch.device, ranks: Ranks, train: TrainConfig) -> bool:
    if train.offload == "all":
        return True  # what is cut can wait on the CPU
    if train.shard_base != "auto":
        return train.shard_base == "always"
    num_bytes = sum(parameter.numel() * parameter.itemsize for parameter in _frozen(model))
    least_free = -ranks.largest(-_free_bytes(device, ranks))
    return num_bytes > WHOLE_BASE_SHARE * least_free


def _free_bytes(device: torch.device, ranks: Ranks) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_machine_bytes() // ranks.count  # the ranks of a CPU training are mostly on one machine


# An LM head that shares the embedding's weight ---------------------------------------------------------------


def _tie_to_sharded(
    embedding: torch.nn.Module, head: torch.nn.Module, whole: set[torch.nn.Parameter]
) -> bool:
    """Whether the head computes with the embedding's weight and that is cut: then it borrows it at each use.

    Two units can't share a weight, and one unit of both would stay gathered between them.
    """
    shared = set(embedding.parameters()) & set(head.parameters()) - whole
    if not shared:
        return False
    if type(head) is not torch.nn.Linear or head.weight not in shared or head.weight is not embedding.weight:
        raise RefusedError(
            f"the LM head, a {type(head).__name__}, shares a weight with the embedding and is trained apart from it, "
            "which strategy fsdp2 does not cut; use strategy zero2 or ddp"
        )
    del head.weight
    head.__class__ = _BorrowingHead
    vars(head)["embedding"] = embedding  # not as a submodule: its weight would count twice
    return True


class _BorrowingHead(torch.nn.Linear):
    """Computes inside the embedding's forward pass: around that the weight is gathered."""

    embedding: torch.nn.Module

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        weight: torch.Tensor = self.embedding.weight  # type: ignore[assignment]
        return weight

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return computed_by(self.embedding, super().__call__, *inputs)


# Filling and gathering ---------------------------------------------------------------------------------------


@torch.no_grad()
def fill(model: torch.nn.Module, files: WeightSource, ranks: Ranks) -> None:
    """Read what this rank keeps. Of weights that all keep whole each reads a share and sends it to the others."""
    parameters = dict(model.named_parameters())
    for name in [name for name, parameter in parameters.items() if hasattr(parameter, UNFILLED)]:
        delattr(parameters[name], UNFILLED)
        layer_name, _, kind = name.rpartition(".")
        layer = model.get_submodule(layer_name)
        if not isinstance(layer, NF4Linear) or kind == "bias":
            part = _read(model, files, name, *_own_range(parameters[name], ranks))
            _put(parameters[name], part, ranks)
        elif kind == "packed":  # together with its scales, so that the weight is read once
            _fill_in_4_bits(model, files, layer_name, layer, ranks)


def _read(model: torch.nn.Module, files: WeightSource, name: str, start: int, end: int) -> torch.Tensor:
    """Numbers of a weight as it computes."""
    found = files.read(name_in_files(name), start, end)
    return found.to(compute_dtype(model)) if found.is_floating_point() else found


def _fill_in_4_bits(
    model: torch.nn.Module, files: WeightSource, name: str, layer: NF4Linear, ranks: Ranks
) -> None:
    size = layer.packed.itemsize
    first_byte, end_byte = (element * size for element in _own_range(layer.packed, ranks))
    first_block, end_block = _own_range(layer.absmax, ranks)

    def read(start: int, end: int) -> torch.Tensor:
        return _read(model, files, f"{name}.weight", start, end).to(ranks.device)

    packed, scales = nf4.quantised_part(read, layer.shape, (first_byte, end_byte), (first_block, end_block))
    _put(layer.packed, packed.view(layer.packed.dtype), ranks)
    _put(layer.absmax, scales, ranks)


def _own_range(parameter: torch.Tensor, ranks: Ranks) -> tuple[int, int]:
    """What this rank keeps of a weight that is cut, or reads of one that all keep."""
    if isinstance(parameter, DTensor):
        return element_range(parameter)
    share = -(-parameter.numel() // ranks.count)
    start = min(ranks.number * share, parameter.numel())
    return start, min(start + share, parameter.numel())


def _put(parameter: torch.Tensor, part: torch.Tensor, ranks: Ranks) -> None:
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        local.copy_(part.view(local.shape))
        return
    share = -(-parameter.numel() // ranks.count)
    own = torch.zeros(share, dtype=parameter.dtype, device=parameter.device)
    own[: len(part)] = part
    whole = torch.empty(share * ranks.count, dtype=parameter.dtype, device=parameter.device)
    dist.all_gather(list(whole.split(share)), own)
    parameter.copy_(whole[: parameter.numel()].view(parameter.shape))


def full_weights(model: torch.nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """In the dtype that computes. The first rank puts them together, the others send."""
    parameters = dict(model.named_parameters())
    for name in names:
        parameter = parameters[name].detach()
        if isinstance(parameter, DTensor):
            yield name, _gathered_by_first(parameter, compute_dtype(model))
        else:
            yield name, parameter.cpu()


def _gathered_by_first(parameter: DTensor, dtype: torch.dtype) -> torch.Tensor:
    group = parameter.device_mesh.get_group()
    local = parameter.to_local()
    rows = -(-parameter.shape[0] // group.size())
    part = torch.zeros((rows, *parameter.shape[1:]), dtype=dtype, device=parameter.device_mesh.device_type)
    part[: len(local)] = local
    parts = [torch.empty_like(part) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(part, parts, group=group, group_dst=0)
    return torch.empty(0) if parts is None else torch.cat(parts)[: parameter.shape[0]].cpu()
