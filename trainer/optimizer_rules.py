"""Rules about optimisers and averages of weights: which strategy, method and schedule they work with."""

from typing import Any

from schemas.pipeline_config import PipelineConfig
from trainer.memory import WHOLE_MODEL_METHODS
from trainer.rules import Rule

WHOLE_STATE_STRATEGIES = ("single", "ddp")
"""A device holds all that is trained, in one piece."""
WHOLE_MATRIX_OPTIMIZERS = ("muon", "galore", "apollo")


def _optimizer_in_shards(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.optimizer == "adamw" or train.strategy in WHOLE_STATE_STRATEGIES:
        return None
    return f"train.optimizer is {train.optimizer}, train.strategy {train.strategy}"


def _average_in_shards(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if not train.ema_decay or train.strategy in WHOLE_STATE_STRATEGIES:
        return None
    return f"train.ema_decay is {train.ema_decay:g}, train.strategy {train.strategy}"


def _matrices_of_an_adapter(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.optimizer not in WHOLE_MATRIX_OPTIMIZERS or train.method in WHOLE_MODEL_METHODS:
        return None
    return f"train.optimizer is {train.optimizer}, train.method {train.method}"


def _scheduled_schedule_free(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.optimizer != "schedule_free" or train.schedule == "constant":
        return None
    return f"train.optimizer is schedule_free, train.schedule {train.schedule}"


def _averaged_twice(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.optimizer != "schedule_free" or not train.ema_decay:
        return None
    return f"train.optimizer is schedule_free, train.ema_decay {train.ema_decay:g}"


def _sixteen_bits_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    model = config.model
    if config.train.optimizer != "adamw_bf16" or model is None or model.dtype in ("auto", "bfloat16"):
        return None
    return f"train.optimizer is adamw_bf16, model.dtype {model.dtype}"


OPTIMIZER_RULES = (
    Rule(
        "optimizer-strategy",
        _optimizer_in_shards,
        "strategies that cut what is trained, or lay it on several devices, are shown right with AdamW alone",
        "set train.strategy to ddp or single, or train.optimizer to adamw",
        links=("bitsandbytes-foundation/bitsandbytes#89", "deepspeedai/DeepSpeed#8090"),
    ),
    Rule(
        "ema-strategy",
        _average_in_shards,
        "an average is kept of whole weights",
        "set train.strategy to ddp or single, or train.ema_decay to 0",
    ),
    Rule(
        "optimizer-method",
        _matrices_of_an_adapter,
        "it works on a layer's whole matrix; those of an adapter are narrow already, and small",
        "set train.optimizer to adamw, or train.method to full",
    ),
    Rule(
        "schedule-free-schedule",
        _scheduled_schedule_free,
        "its average takes the place of a falling learning rate",
        "set train.schedule to constant; train.warmup_steps may stay",
    ),
    Rule(
        "schedule-free-ema",
        _averaged_twice,
        "its model is an average already",
        "set train.ema_decay to 0",
    ),
    Rule(
        "adamw-bf16-dtype",
        _sixteen_bits_elsewhere,
        "its weights have no other form than bfloat16",
        "set model.dtype to bfloat16, or train.optimizer to adamw or adamw_8bit",
    ),
)
