"""DeepSpeed's ZeRO 3: each rank keeps a part of every weight, frozen ones too, of the gradients, masters and moments.

A module's weights are gathered before it computes, by hooks on it, and given back afterwards. So whoever reads a
weight has to stand inside the forward of a module that DeepSpeed knows to need it.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from schemas.training_config import TrainConfig
from trainer.attention import unwrapped
from trainer.optimizers import ComputeLoss, trainable, trained_parameters
from trainer.pieces import MOMENTS
from trainer.ranks import Ranks
from trainer.strategies.deepspeed_engine import engine_settings, start_engine
from trainer.strategies.zero import Fragment, Parameters, Shards, ZeroAdamW


def place(model: torch.nn.Module, device: torch.device, ranks: Ranks, train: TrainConfig) -> torch.nn.Module:
    """Cut every weight into as many parts as there are ranks. The engine is made with it: its hooks gather them."""
    trained = [parameter for _, parameter in trained_parameters(model)]
    settings = engine_settings(trained, train, stage=3)
    # By default small ones are kept whole, which hides that something reads them without gathering them.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = start_engine(_Whole(model), trained, train, ranks, settings)
    _start_afresh_outside_of_steps(unwrapped(model).base_model, engine)
    _know_what_lora_layers_read(model)
    model.zero3_engine = [engine]  # in a list: else the model would be a part of itself
    return model.train()


def build_optimizer(model: torch.nn.Module, train: TrainConfig, ranks: Ranks) -> ZeroAdamW:
    (engine,) = model.zero3_engine
    return ZeroAdamW(trainable(trained_parameters(model)), engine, ranks, SHARDS)


def full_weights(model: torch.nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    from deepspeed.runtime.zero import GatheredParameters

    parameters = dict(model.named_parameters())
    for name in names:
        with GatheredParameters([parameters[name]]):
            whole = parameters[name].detach().to("cpu", copy=True)
        yield name, whole


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
        group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = parameter.ds_zero_partition_rank * length  # type: ignore[attr-defined]
        count = min(length, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if count > 0:  # parts are of one length, so the last ranks may have less or nothing
            part = optimizer.fp32_partitioned_groups_flat[group]
            tensors = {"weight": part.detach()} | {kind: optimizer.optimizer.state[part][kind] for kind in MOMENTS}
            yield Fragment(name, start, {kind: t.narrow(0, offset, count) for kind, t in tensors.items()})


def _write_back(engine: Any) -> None:
    for group in range(len(engine.optimizer.fp32_partitioned_groups_flat)):
        engine.optimizer._reassign_or_swap_out_partitioned_parameters(group)


SHARDS = Shards(_parts, _fragments, _write_back, takes_mean=True)
