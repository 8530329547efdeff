"""DeepSpeed's ZeRO 3: each rank keeps a part of every weight, frozen ones too, of the gradients, masters and moments.

A module's weights are gathered before it computes, by hooks on it, and given back afterwards. So whoever reads a
weight has to stand inside the forward of a module that DeepSpeed knows to need it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from schemas.training_config import TrainConfig
from trainer import nf4
from trainer.attention import unwrapped
from trainer.decoder_layers import decoder_layers
from trainer.nf4 import NF4Linear
from trainer.optimizers import ComputeLoss, trainable, trained_parameters
from trainer.pieces import MOMENTS
from trainer.ranks import Ranks
from trainer.stand_ins import is_stand_in
from trainer.strategies.deepspeed_engine import engine_settings, import_deepspeed, start_engine
from trainer.strategies.zero import Fragment, Parameters, Shards, ZeroAdamW
from trainer.weights import WeightSource, name_in_files


class Placed(NamedTuple):
    """What `place` leaves at the model for those who come after."""

    engine: Any
    to_be_filled: tuple[str, ...]


def place(model: torch.nn.Module, device: torch.device, ranks: Ranks, train: TrainConfig) -> torch.nn.Module:
    """Cut every weight into as many parts as there are ranks. The engine is made with it: its hooks gather them."""
    trained = [parameter for _, parameter in trained_parameters(model)]
    settings = engine_settings(trained, train, stage=3, device=device)
    settings["zero_optimization"] |= _gathering(model)
    to_be_filled = tuple(name for name, parameter in model.named_parameters() if is_stand_in(parameter))
    _cut(model, device, ranks, settings)
    engine = start_engine(_Whole(model), trained, train, ranks, settings)
    _start_afresh_outside_of_steps(unwrapped(model).base_model, engine)
    _know_what_lora_layers_read(model)
    # Beside its submodules: the engine is one that holds the model itself.
    vars(model)["zero3"] = Placed(engine, to_be_filled)
    return model.train()


@torch.no_grad()
def _cut(model: torch.nn.Module, device: torch.device, ranks: Ranks, settings: dict[str, Any]) -> None:
    """One weight after the other: no rank holds more than one of them whole."""
    deepspeed = import_deepspeed(device)
    cutter = deepspeed.zero.Init(module=torch.nn.Module(), config_dict_or_path=settings)
    for parameter in model.parameters():
        if is_stand_in(parameter):
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        else:
            parameter.data = parameter.to(device)
            ranks.copy_from_first([parameter.data])
        cutter._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
    for buffer in model.buffers():
        buffer.data = buffer.to(device)


@torch.no_grad()
def fill(model: torch.nn.Module, files: WeightSource, ranks: Ranks) -> None:
    """Read this rank's parts of the weights that came without numbers."""
    placed: Placed = vars(model)["zero3"]
    for name in placed.to_be_filled:
        layer_name, _, kind = name.rpartition(".")
        layer = model.get_submodule(layer_name)
        if not isinstance(layer, NF4Linear) or kind == "bias":
            parameter = layer.get_parameter(kind)
            _keep(parameter, files.read(name_in_files(name), *_own_range(parameter)))
        elif kind == "packed":  # together with its scales, so that the weight is read once
            _fill_in_4_bits(
                layer, functools.partial(files.read, name_in_files(f"{layer_name}.weight")), ranks
            )
    placed.engine.optimizer.refresh_fp32_params()


def _fill_in_4_bits(layer: NF4Linear, read: Callable[[int, int], torch.Tensor], ranks: Ranks) -> None:
    def read_as_it_computes(start: int, end: int) -> torch.Tensor:
        return read(start, end).to(ranks.device, layer.dtype)

    ranges = _own_range(layer.packed), _own_range(layer.absmax)
    packed, scales = nf4.quantised_part(read_as_it_computes, layer.shape, *ranges)
    _keep(layer.packed, packed)
    _keep(layer.absmax, scales)


def _own_range(parameter: Any) -> tuple[int, int]:
    """Numbers of a flattened weight that this rank keeps: equally many each, so the last ranks may have less or none."""
    length = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_zero_partition_rank * length, parameter.ds_numel)
    return start, min(start + length, parameter.ds_numel)


def _keep(parameter: Any, part: torch.Tensor) -> None:
    parameter.ds_tensor.narrow(0, 0, len(part)).copy_(part)


def build_optimizer(model: torch.nn.Module, train: TrainConfig, ranks: Ranks) -> ZeroAdamW:
    placed: Placed = vars(model)["zero3"]
    return ZeroAdamW(trainable(trained_parameters(model)), placed.engine, ranks, SHARDS)


def full_weights(model: torch.nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """All gather, one weight at a time; the first one keeps it."""
    from deepspeed.runtime.zero import GatheredParameters

    parameters = dict(model.named_parameters())
    for name in names:
        with GatheredParameters([parameters[name]]):
            whole = parameters[name].detach().to("cpu", copy=True)
        yield name, whole


def _gathering(model: torch.nn.Module) -> dict[str, int]:
    """What is gathered at once: about two layers, one that computes and the next one.

    By default DeepSpeed keeps a billion weights from the forward pass for the backward pass, and small ones always,
    which hides that something reads them without gathering them.
    """
    _, layers = decoder_layers(model)
    largest = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    return {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": largest,  # a layer that was recomputed is there for its gradient
        "stage3_max_live_parameters": 2 * largest,
        "stage3_prefetch_bucket_size": largest,
    }


class _Whole(torch.nn.Module):
    """The model as the engine's: it computes what the micro-step says."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute_loss: ComputeLoss) -> torch.Tensor:
        return compute_loss()


def _start_afresh_outside_of_steps(backbone: torch.nn.Module, engine: Any) -> None:
    """DeepSpeed expects the modules in the order of a whole step; a forward pass alone begins anew."""

    def start_afresh(*_: Any) -> None:
        if not backbone.training:
            engine.optimizer.parameter_offload.partition_all_parameters()
            engine.optimizer.parameter_offload.get_param_coordinator().reset_step()

    backbone.register_forward_pre_hook(start_afresh, prepend=True)


def _know_what_lora_layers_read(model: torch.nn.Module) -> None:
    """A fused LoRA layer reads the weights of its parts: they are gathered with it."""
    from deepspeed.runtime.zero import register_external_parameter
    from peft.tuners.lora.layer import Linear as LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for parameter in layer.parameters():
                register_external_parameter(layer, parameter)


# Where the optimiser's numbers are --------------------------------------------------------------------------


def _parts(engine: Any) -> list[torch.Tensor]:
    parts: list[torch.Tensor] = engine.optimizer.fp32_partitioned_groups_flat
    return parts


def _fragments(engine: Any, parameters: Parameters) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    for name, parameter in parameters.items():
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start, end = _own_range(parameter)
        if start < end:
            part = optimizer.fp32_partitioned_groups_flat[group]
            state = optimizer.optimizer.state[part]
            tensors = {"weight": part.detach(), **{kind: state[kind] for kind in MOMENTS}}
            yield Fragment(
                name, start, {kind: t.narrow(0, offset, end - start) for kind, t in tensors.items()}
            )


def _write_back(engine: Any) -> None:
    # What an earlier pass has left gathered would be computed with as it is.
    engine.optimizer.parameter_offload.partition_all_parameters()
    for group in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
        engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)


SHARDS = Shards(_parts, _fragments, _write_back, takes_mean=True)
