"""DeepSpeed's ZeRO 3: each rank keeps a part of every weight, frozen ones too, of the gradients, masters and moments.

A module's weights are gathered before it computes, by hooks on it, and given back afterwards. So whoever reads a
weight has to stand inside the forward of a module that DeepSpeed knows it by.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from schemas.training_config import TrainConfig
from trainer.attention import unwrapped
from trainer.optimizers import ComputeLoss, trainable
from trainer.ranks import Ranks
from trainer.strategies.deepspeed_engine import engine_settings, start_engine
from trainer.strategies.zero import ZeroAdamW


def place(model: torch.nn.Module, device: torch.device, ranks: Ranks, train: TrainConfig) -> torch.nn.Module:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = engine_settings(trained, train, stage=3)
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    engine = start_engine(_Whole(model), trained, train, ranks, settings)
    _start_afresh_outside_of_steps(unwrapped(model).base_model, engine)
    _know_what_lora_layers_read(model)
    for parameter in trained:
        parameter.zero3_engine = engine
    return model.train()


class _Whole(torch.nn.Module):
    """The model as the engine's: it computes what the micro-step says."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute_loss: ComputeLoss) -> torch.Tensor:
        return compute_loss()


def build_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], train: TrainConfig, ranks: Ranks
) -> ZeroAdamW:
    trained = trainable(parameters)
    engine = next(iter(trained.values())).zero3_engine
    return ZeroAdamW(trained, engine, ranks)


def full_weights(model: torch.nn.Module, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    from deepspeed.runtime.zero import GatheredParameters

    parameters = dict(model.named_parameters())
    for name in names:
        with GatheredParameters([parameters[name]]):
            whole = parameters[name].detach().to("cpu", copy=True)
        yield name, whole


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
