"""What a rule and an adaptation are, and the rules about the model and the lengths of its rows.

Light: no torch. The rules about how it is trained stand in support.py, the adaptations in adaptations.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from schemas.pipeline_config import PipelineConfig
from trainer.experts import has_experts
from trainer.rope import scaled_positions

Find = Callable[[PipelineConfig, dict[str, Any]], str | None]
"""What was found, in words, or None where there is nothing to say.

It sees the config and the model's config.json ({} when the folder is not there yet).
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings that are refused. `links` are "owner/repository#number": where others met the same."""

    id: str
    find: Find
    reason: str
    alternative: str
    links: tuple[str, ...] = ()
    of_machine: bool = False
    """About what this machine has, not about settings: no part of the published matrix."""


@dataclass(frozen=True, slots=True)
class Adaptation:
    """Settings that work otherwise than asked for: what is done, and why."""

    id: str
    find: Find
    change: str
    reason: str
    links: tuple[str, ...] = ()


RECURRENT_LAYER_TYPES = {"linear_attention", "mamba", "mamba2", "recurrent", "conv"}
RECURRENT_MODEL_TYPES = {
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "jamba",
    "mamba",
    "mamba2",
    "nemotron_h",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "zamba",
    "zamba2",
}


def _capacity_below_examples(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    capacity, longest = config.pack.capacity, config.split.max_tokens
    if capacity is None or capacity >= longest:
        return None
    return f"pack.capacity is {capacity}, split.max_tokens {longest}"


def _longer_than_positions(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    positions = architecture.get("max_position_embeddings")
    scaling = config.model.rope_scaling if config.model is not None else None
    if not isinstance(positions, int) or config.split.max_tokens <= scaled_positions(positions, scaling):
        return None
    scaled = f", {scaled_positions(positions, scaling)} with model.rope_scaling" if scaling else ""
    return f"split.max_tokens is {config.split.max_tokens}, the model has {positions} positions{scaled}"


def _encoder_decoder(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    return "the model is an encoder-decoder" if architecture.get("is_encoder_decoder") else None


def _recurrent(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    model_type = architecture.get("model_type")
    layers = RECURRENT_LAYER_TYPES.intersection(architecture.get("layer_types") or ())
    if model_type not in RECURRENT_MODEL_TYPES and not layers:
        return None
    return f"model type {model_type!r} has recurrent layers"


def _attention_sinks(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    return "the model is a gpt_oss" if architecture.get("model_type") == "gpt_oss" else None


def _experts_under_zero3(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if config.train.strategy != "zero3" or not has_experts(architecture):
        return None
    return f"train.strategy is zero3, model type {architecture.get('model_type')!r} has experts"


def _warmup_never_ends(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    warmup_steps, max_steps = config.train.warmup_steps, config.train.max_steps
    if warmup_steps is None or max_steps is None or warmup_steps < max_steps:
        return None
    return f"train.warmup_steps is {warmup_steps}, train.max_steps {max_steps}"


def _micro_step_above_step(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    micro_step, step = config.train.bins_per_micro_step, config.train.bins_per_step
    if micro_step <= step:
        return None
    return f"train.bins_per_micro_step is {micro_step}, train.bins_per_step {step}"


MODEL_RULES = (
    Rule(
        "capacity",
        _capacity_below_examples,
        "an example of full length fits into no bin",
        "set pack.capacity to split.max_tokens or more",
    ),
    Rule(
        "positions",
        _longer_than_positions,
        "positions beyond the model's range give noise",
        "set split.max_tokens to the model's positions or fewer, or model.rope_scaling to a factor that covers it",
    ),
    Rule(
        "encoder-decoder",
        _encoder_decoder,
        "only causal language models are trained",
        "use a decoder-only model",
    ),
    Rule(
        "recurrent-layers",
        _recurrent,
        "their state leaks from one packed document into the next",
        "use a model whose layers are all attention",
    ),
    Rule(
        "attention-sinks",
        _attention_sinks,
        "packed attention does not compute learned sinks",
        "use a model without them, such as Llama, Qwen, Mistral or Gemma",
    ),
    Rule(
        "experts-zero3",
        _experts_under_zero3,
        "DeepSpeed's hook on a layer of experts ends the check of packed gradients (found with 0.19.8)",
        "set train.strategy to fsdp2 or zero2",
    ),
    Rule(
        "warm-up",
        _warmup_never_ends,
        "the learning rate would never be reached",
        "set train.warmup_steps below train.max_steps",
    ),
    Rule(
        "micro-step",
        _micro_step_above_step,
        "a micro-step is a part of a step",
        "set train.bins_per_micro_step to train.bins_per_step or fewer",
    ),
)
