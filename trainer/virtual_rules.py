"""Which trainings lay documents out in padded rows, and the rules about those and about virtual tokens. Light: no torch."""

from typing import Any

from schemas.pipeline_config import PipelineConfig
from schemas.training_config import TrainConfig
from trainer.rules import Adaptation, Rule

PROMPT_METHODS = ("prefix", "prompt", "p_tuning")
"""Their virtual tokens take positions."""
VIRTUAL_TOKEN_METHODS = (*PROMPT_METHODS, "llama_adapter")
UNPACKED_STRATEGIES = ("single", "ddp", "pipeline")
"""They exchange nothing inside a step: each process may run the model as often as its padded batches ask for."""
ADAPTER_FAMILIES = ("llama", "mistral")


def is_unpacked(train: TrainConfig) -> bool:
    """Whether each document is a padded row of its own."""
    return train.batches == "unpacked" or (train.batches == "auto" and train.method in VIRTUAL_TOKEN_METHODS)


def tokens_of_a_bin(config: PipelineConfig) -> int:
    return config.pack.capacity or config.split.max_tokens


def _unpacked_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if not is_unpacked(train) or train.strategy in UNPACKED_STRATEGIES:
        return None
    return f"{_why_unpacked(train)}, train.strategy {train.strategy}"


def _unpacked_compiled(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if not is_unpacked(config.train) or not config.train.compile:
        return None
    return f"{_why_unpacked(config.train)}, train.compile true"


def _why_unpacked(train: TrainConfig) -> str:
    return (
        f"train.batches is {train.batches}"
        if train.batches == "unpacked"
        else f"train.method is {train.method}"
    )


UNPACKED_RULES = (
    Rule(
        "unpacked-strategy",
        _unpacked_elsewhere,
        "its processes exchange gradients or weights in each pass, and the padded batches of a step are more on one "
        "than on another",
        "set train.strategy to ddp or single",
    ),
    Rule(
        "unpacked-compile",
        _unpacked_compiled,
        "attention would be compiled with the layers, and what torch writes for its backward pass over rows of any "
        "length did not get through the C++ compiler (found with 2.13 on a CPU)",
        "set train.compile to false",
    ),
)


# Virtual tokens ---------------------------------------------------------------------------------------------


def _virtual_packed(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.method not in VIRTUAL_TOKEN_METHODS or train.batches != "packed":
        return None
    return f"train.method is {train.method}, train.batches packed"


def _virtual_over_adapter(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    model, train = config.model, config.train
    is_merged = model is not None and model.adapter is not None and model.adapter_use == "merge"
    if not is_merged or train.method not in VIRTUAL_TOKEN_METHODS:
        return None
    return f"model.adapter_use is merge, train.method {train.method}"


def _virtual_beyond_positions(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train, positions = config.train, architecture.get("max_position_embeddings")
    if train.method not in PROMPT_METHODS or not isinstance(positions, int):
        return None
    longest = config.split.max_tokens
    if not longest <= positions < longest + train.virtual_tokens.count:
        return None  # without virtual tokens it is too long already, which another rule says
    return f"split.max_tokens is {longest}, train.virtual_tokens.count {train.virtual_tokens.count}, the model has {positions} positions"


def _virtual_without_ids(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if config.train.method not in ("prompt", "p_tuning") or not architecture.get(
        "hidden_size_per_layer_input"
    ):
        return None
    return f"train.method is {config.train.method}, model type {architecture.get('model_type')!r}"


def _prefix_recomputed(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if config.train.method != "prefix" or config.train.gradient_checkpointing == "none":
        return None
    return "train.method is prefix, train.gradient_checkpointing true"


def _prefix_of_unlike_shapes(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if config.train.method != "prefix" or not architecture.get("kv_lora_rank"):
        return None
    return f"train.method is prefix, model type {architecture.get('model_type')!r} has latent attention"


def _adapter_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    family = architecture.get("model_type")
    if config.train.method != "llama_adapter" or family is None or family in ADAPTER_FAMILIES:
        return None
    return f"train.method is llama_adapter, model type {family!r}"


def _adapter_of_other_width(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    heads, size, width = (
        architecture.get(name) for name in ("num_attention_heads", "head_dim", "hidden_size")
    )
    if config.train.method != "llama_adapter" or not all(isinstance(n, int) for n in (heads, size, width)):
        return None
    if heads * size == width:
        return None
    return f"train.method is llama_adapter, {heads} heads of {size} beside a hidden size of {width}"


def _adapter_of_more_layers(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    wanted, there = config.train.virtual_tokens.layers, architecture.get("num_hidden_layers")
    if (
        config.train.method != "llama_adapter"
        or wanted is None
        or not isinstance(there, int)
        or wanted <= there
    ):
        return None
    return f"train.virtual_tokens.layers is {wanted}, the model has {there}"


VIRTUAL_TOKEN_RULES = (
    Rule(
        "virtual-tokens-packed",
        _virtual_packed,
        "virtual tokens would reach only the first document of a packed row",
        "set train.batches to auto",
    ),
    Rule(
        "virtual-tokens-merge",
        _virtual_over_adapter,
        "what is saved would be loaded over the base without the merged adapter",
        "set train.method to lora, or name the merged model as model.path",
    ),
    Rule(
        "virtual-positions",
        _virtual_beyond_positions,
        "virtual tokens take the first positions, and positions beyond the model's range give noise",
        "lower split.max_tokens or train.virtual_tokens.count, or set train.method to llama_adapter or lora",
    ),
    Rule(
        "virtual-tokens-layer-inputs",
        _virtual_without_ids,
        "each layer of this model looks up its tokens by id, and virtual tokens have none",
        "set train.method to prefix or lora",
    ),
    Rule(
        "prefix-checkpointing",
        _prefix_recomputed,
        "a layer that is computed again adds its keys and values to the prefix a second time",
        "set train.gradient_checkpointing to false, or train.method to p_tuning, prompt or lora",
        links=("huggingface/peft#869", "huggingface/peft#2191"),
    ),
    Rule(
        "prefix-latent",
        _prefix_of_unlike_shapes,
        "its keys and values have other sizes than PEFT makes prefixes of",
        "set train.method to p_tuning, prompt or lora",
    ),
    Rule(
        "llama-adapter-family",
        _adapter_elsewhere,
        "PEFT knows the attention of Llama and Mistral alone here",
        "set train.method to prefix, p_tuning or lora",
    ),
    Rule(
        "llama-adapter-heads",
        _adapter_of_other_width,
        "PEFT takes the number of key heads from the hidden size",
        "set train.method to prefix, p_tuning or lora",
    ),
    Rule(
        "llama-adapter-layers",
        _adapter_of_more_layers,
        "there are no more",
        "lower train.virtual_tokens.layers, or leave it out for all layers",
    ),
)


def _virtual(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    method = config.train.method
    return f"train.method is {method}" if method in VIRTUAL_TOKEN_METHODS else None


VIRTUAL_TOKEN_ADAPTATIONS = (
    Adaptation(
        "virtual-tokens",
        _virtual,
        "each document is a row of its own, padded to the longest of its batch; pack.mode token_budget makes bins of "
        "like length, with less padding",
        "virtual tokens would reach only the first document of a packed row",
    ),
)
