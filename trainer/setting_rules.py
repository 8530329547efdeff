"""Rules about precision, compiling, and adapters that are trained on: settings that meet strategies and bases."""

import os
import shutil
from typing import Any

from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import ModelConfig, TrainConfig
from trainer.rules import Rule
from trainer.start_adapter import adapter_folder, adapter_problem, adapter_settings, contradiction

WHOLE_BASE_STRATEGIES = ("single", "ddp", "zero1", "zero2", "pipeline")
"""They hold the whole base on each device, and load it as one."""
COMPILING_STRATEGIES = ("single", "ddp", "zero1", "zero2")
COMPILERS = ("g++", "c++", "clang++", "gcc", "cc", "clang")
LAYER_STRATEGIES = ("single", "ddp")
"""They keep weights where they are, whole, through a training."""
FLOAT16_STRATEGIES = ("single", "ddp", "fsdp2", "pipeline")
"""They sum gradients in fp32, and divide the sums by the loss scale."""


def takes_layers(train: TrainConfig) -> bool:
    """Whether the settings ask for decoder layers that are computed as one, where their family can be (trainer/fast).

    GPUs with Triton do it unasked.
    """
    is_wanted = (
        train.kernels == "layers"
        or train.compile
        or train.gradient_checkpointing == "selective"
        or _long_row_settings(train)
    )
    return bool(is_wanted) and can_take_layers(train)


def can_take_layers(train: TrainConfig) -> bool:
    return (
        train.method == "lora"
        and train.batches != "unpacked"
        and train.strategy in LAYER_STRATEGIES
        and train.base != "int8"
        and train.lora.dropout == 0
        and train.kernels != "plain"
    )


def _long_row_settings(train: TrainConfig) -> list[str]:
    found = ["train.offload_checkpoints is true"] if train.offload_checkpoints else []
    if train.mlp_tokens_at_once is not None:
        found.append(f"train.mlp_tokens_at_once is {train.mlp_tokens_at_once}")
    return found


def _float16_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    is_float16 = config.model is not None and config.model.dtype == "float16"
    if not is_float16 or config.train.strategy in FLOAT16_STRATEGIES:
        return None
    return f"model.dtype is float16, train.strategy {config.train.strategy}"


def _adapter(config: PipelineConfig) -> tuple[ModelConfig, dict[str, Any]] | None:
    """The section model and the adapter's config; None where there is none, or none that can be read."""
    model = config.model
    if model is None or model.adapter is None:
        return None
    try:
        return model, adapter_settings(adapter_folder(model))
    except InputError:
        return model, {}


def _no_adapter_there(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    found = _adapter(config)
    return f"model.adapter is {found[0].adapter}" if found is not None and not found[1] else None


def _odd_adapter(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    found = _adapter(config)
    if found is None or not found[1]:
        return None
    problem = adapter_problem(found[1], use=found[0].adapter_use)
    return f"model.adapter {found[0].adapter}: {problem}" if problem is not None else None


def _continued_otherwise(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    found = _adapter(config)
    if found is None or not found[1] or found[0].adapter_use != "continue":
        return None
    return contradiction(found[1], config.train.lora)


def _continued_under_full(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    model = config.model
    if (
        model is None
        or model.adapter is None
        or model.adapter_use != "continue"
        or config.train.method == "lora"
    ):
        return None
    return f"model.adapter_use is continue, train.method {config.train.method}"


def _merged_into_bits(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    model = config.model
    if model is None or model.adapter is None or model.adapter_use != "merge" or config.train.base == "plain":
        return None
    return f"model.adapter_use is merge, train.base {config.train.base}"


def _adapter_in_shards(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    model = config.model
    if model is None or model.adapter is None:
        return None
    if config.train.strategy in WHOLE_BASE_STRATEGIES:
        return None
    return f"model.adapter_use is {model.adapter_use}, train.strategy {config.train.strategy}"


def _whole_modules_in_shards(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if not train.lora.modules_to_save or train.method != "lora" or train.strategy in WHOLE_BASE_STRATEGIES:
        return None
    return f"train.lora.modules_to_save is {train.lora.modules_to_save}, train.strategy {train.strategy}"


def _saved_and_target(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    lora = config.train.lora
    both = set(lora.modules_to_save).intersection(lora.targets if isinstance(lora.targets, list) else ())
    return f"{sorted(both)[0]!r} is in train.lora.modules_to_save and in targets" if both else None


def _no_layers(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    asked = _long_row_settings(train) + (["train.kernels is layers"] if train.kernels == "layers" else [])
    if not asked or can_take_layers(train):
        return None
    return (
        f"{', '.join(asked)}, train.method {train.method}, strategy {train.strategy}, base {train.base}, batches "
        f"{train.batches}, kernels {train.kernels}, lora.dropout {train.lora.dropout}"
    )


def _offload_of_nothing(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if not train.offload_checkpoints or train.gradient_checkpointing == "full":
        return None
    return f"train.offload_checkpoints is true, train.gradient_checkpointing {train.gradient_checkpointing}"


def _compiled_bits(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if not config.train.compile or config.train.base == "plain" or takes_layers(config.train):
        return None
    return f"train.compile is true, train.base {config.train.base}"


def _compiled_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if not train.compile or (train.strategy in COMPILING_STRATEGIES and train.offload != "all"):
        return None
    return f"train.compile is true, train.strategy {train.strategy}, train.offload {train.offload}"


def _compiled_dropout(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if not train.compile or train.method != "lora" or train.lora.dropout == 0:
        return None
    return f"train.compile is true, train.lora.dropout {train.lora.dropout}"


def _compiled_recomputed(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if not train.compile or train.gradient_checkpointing == "none" or takes_layers(train):
        return None
    return f"train.compile is true, train.gradient_checkpointing {train.gradient_checkpointing}"


def _no_compiler(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    named = [os.environ[name] for name in ("CXX", "CC") if name in os.environ]
    if not config.train.compile or any(shutil.which(name) for name in (*named, *COMPILERS)):
        return None
    return "train.compile is true"


SETTING_RULES = (
    Rule(
        "layers",
        _no_layers,
        "decoder layers are computed as one with LoRA without dropout over weights that stay whole",
        "set train.kernels to auto and leave offload_checkpoints and mlp_tokens_at_once out, or set train.method to lora, "
        "train.strategy to single or ddp, train.base to plain, int8_rows or nf4 and train.lora.dropout to 0",
    ),
    Rule(
        "offload-checkpoints",
        _offload_of_nothing,
        "the inputs of layers are kept for themselves with full checkpointing alone",
        "set train.gradient_checkpointing to full",
    ),
    Rule(
        "compile-bits",
        _compiled_bits,
        "bitsandbytes' products can't be traced, so a layer would fall into a dozen pieces, each compiled for itself",
        "set train.compile to false, or train.base to plain, or to int8_rows or nf4 with train.strategy single or ddp",
    ),
    Rule(
        "compile-strategy",
        _compiled_elsewhere,
        "weights that come and go inside a layer, or layers on several devices, are not compiled here",
        "set train.compile to false, or train.strategy to ddp, zero1 or zero2",
    ),
    Rule(
        "compile-dropout",
        _compiled_dropout,
        "draws that belong to a bin are made one by one, which a compiler would do for each number of bins anew",
        "set train.lora.dropout to 0, or train.compile to false",
        links=("huggingface/peft#3020",),
    ),
    Rule(
        "compile-checkpointing",
        _compiled_recomputed,
        "a layer that is recomputed is compiled as a whole or not at all, and its attention is not compiled: nothing "
        "would be",
        "set train.compile or train.gradient_checkpointing to false, or train.strategy to single or ddp with LoRA",
    ),
    Rule(
        "compiler",
        _no_compiler,
        "no C++ compiler is on PATH",
        "install g++ or clang, or set train.compile to false",
        of_machine=True,
    ),
    Rule(
        "adapter",
        _no_adapter_there,
        "it holds no adapter_config.json and adapter_model.safetensors",
        "name the folder of an adapter that PEFT has saved as safetensors",
    ),
    Rule(
        "adapter-kind",
        _odd_adapter,
        "training starts from plain LoRA alone; to be merged it has one rank and whole modules of its own nowhere",
        "merge it into the base with PEFT's merge_and_unload, and name the result as model.path",
    ),
    Rule(
        "adapter-contradiction",
        _continued_otherwise,
        "an adapter that is continued keeps its shape",
        "leave that setting out, or set model.adapter_use to merge",
    ),
    Rule(
        "adapter-full",
        _continued_under_full,
        "this method trains no such adapter",
        "set model.adapter_use to merge, or train.method to lora",
    ),
    Rule(
        "adapter-merge-bits",
        _merged_into_bits,
        "adding to quantised weights rounds the sum to 8 or 4 bits, and most of the adapter is lost",
        "set model.adapter_use to continue, or train.base to plain",
        links=("huggingface/peft#2321", "huggingface/peft#2105", "huggingface/transformers#31293"),
    ),
    Rule(
        "adapter-sharded",
        _adapter_in_shards,
        "the base is read in pieces: no process holds a whole weight to add to, nor cuts an adapter that is there",
        "set train.strategy to ddp, zero1 or zero2",
    ),
    Rule(
        "whole-modules-sharded",
        _whole_modules_in_shards,
        "modules that are trained whole are copied before the base is read in pieces",
        "leave train.lora.modules_to_save out, or set train.strategy to ddp, zero1 or zero2",
        links=("huggingface/peft#2450",),
    ),
    Rule(
        "saved-target",
        _saved_and_target,
        "a module is trained whole or by matrices beside it",
        "name it in one of them",
    ),
    Rule(
        "float16-strategy",
        _float16_elsewhere,
        "this strategy sums gradients in its own place, which does not know the loss scale",
        "set train.strategy to ddp, fsdp2 or single, or model.dtype to bfloat16 or float32",
    ),
)
