"""What can't work together, why, and the nearest settings that do: one table, asked before the first stage.

Light: reads the config and the model's config.json, never imports torch. The table is the validator and the
matrix that the docs print.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.errors import InputError, RefusedError
from schemas.pipeline_config import PipelineConfig


def check_supported(config: PipelineConfig) -> None:
    """Raises RefusedError naming every rule that the config breaks."""
    problems = refusals(config)
    if problems:
        raise RefusedError("; ".join(problems))


def refusals(config: PipelineConfig) -> list[str]:
    """One line for each rule that the config breaks: what was found, why it can't work, what does."""
    return [f"{rule.id}: {found}: {rule.reason}; {rule.alternative}" for rule, found in _broken_rules(config)]


@dataclass(frozen=True, slots=True)
class Rule:
    """`find` gives what was found, in words, or None where the rule is kept.

    It sees the config and the model's config.json ({} when the folder is not there yet).
    """

    id: str
    find: Callable[[PipelineConfig, dict[str, Any]], str | None]
    reason: str
    alternative: str


def _broken_rules(config: PipelineConfig) -> Iterator[tuple[Rule, str]]:
    architecture = model_architecture(config)
    for rule in RULES:
        found = rule.find(config, architecture)
        if found is not None:
            yield rule, found


def model_folder(name: str, revision: str | None = None) -> Path:
    """The folder of a model or tokenizer: itself, or its snapshot in the local hub cache. No network.

    Raises InputError when it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    # Imported late: the hub client costs more than all of this module.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise InputError(
            f"model {name!r} is neither a folder nor in the local hub cache; download it once "
            f"with `hf download {name}` or give a folder"
        ) from None


def model_architecture(config: PipelineConfig) -> dict[str, Any]:
    """The model's config.json, the language model's part of it first; {} where there is none yet."""
    if config.model is None:
        return {}
    try:
        path = model_folder(config.model.path, config.model.revision) / "config.json"
    except InputError:
        return {}  # loading the model says it; a rule needs facts
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); download the model again") from None
    # Multimodal configs keep the language model's numbers one level down.
    return {**settings, **settings.get("text_config", {})}


# The rules --------------------------------------------------------------------------------------------------

SHARDED_STRATEGIES = ("zero3", "fsdp2")
"""They cut the frozen weights into pieces too."""
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


def _no_model(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    return "the config has no section model" if config.model is None else None


def _capacity_below_examples(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    capacity, longest = config.pack.capacity, config.split.max_tokens
    if capacity is None or capacity >= longest:
        return None
    return f"pack.capacity is {capacity}, split.max_tokens {longest}"


def _longer_than_positions(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    positions = architecture.get("max_position_embeddings")
    if not isinstance(positions, int) or config.split.max_tokens <= positions:
        return None
    return f"split.max_tokens is {config.split.max_tokens}, the model has {positions} positions"


def _quantised(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    settings = architecture.get("quantization_config")
    if settings is None:
        return None
    return f"the model's weights are quantised ({settings.get('quant_method', 'unknown method')})"


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


def _warmup_never_ends(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    warmup_steps, max_steps = config.train.warmup_steps, config.train.max_steps
    if warmup_steps is None or max_steps is None or warmup_steps < max_steps:
        return None
    return f"train.warmup_steps is {warmup_steps}, train.max_steps {max_steps}"


def _int8_in_shards(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.base != "int8" or train.strategy not in SHARDED_STRATEGIES:
        return None
    return f"train.base is int8, train.strategy {train.strategy}"


def _strategy_to_come(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.base == "int8" or train.strategy not in SHARDED_STRATEGIES:
        return None  # refused for good by the rule above
    return f"train.strategy is {train.strategy}"


def _int8_trained_whole(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if config.train.base != "int8" or config.train.method != "full":
        return None
    return "train.base is int8, train.method full"


def _several_on_single(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    num_processes = config.train.num_processes
    if config.train.strategy != "single" or num_processes in (None, 1):
        return None
    return f"train.num_processes is {num_processes}, train.strategy single"


def _no_deepspeed(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if not config.train.strategy.startswith("zero") or importlib.util.find_spec("deepspeed") is not None:
        return None
    return f"train.strategy is {config.train.strategy}"


def _no_bitsandbytes(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if config.train.base != "int8" or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return "train.base is int8"


def _no_wandb(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if "wandb" not in config.train.trackers or importlib.util.find_spec("wandb") is not None:
        return None
    return "train.trackers names wandb"


def _micro_step_above_step(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    micro_step, step = config.train.bins_per_micro_step, config.train.bins_per_step
    if micro_step <= step:
        return None
    return f"train.bins_per_micro_step is {micro_step}, train.bins_per_step {step}"


RULES = (
    Rule("model", _no_model, "there is nothing to train", "add model.path"),
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
        "set split.max_tokens to the model's positions or fewer",
    ),
    Rule(
        "quantised-base",
        _quantised,
        "training over a quantised base is not built yet",
        "use the model's unquantised weights; train.base int8 holds them in 8 bits",
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
    Rule(
        "int8-sharded",
        _int8_in_shards,
        "8-bit weights do not survive being cut into pieces and put together: it trains silently wrong",
        "set train.strategy to zero2, zero1 or ddp, which keep the base whole on each device",
    ),
    Rule("strategy", _strategy_to_come, "it is not built yet", "set train.strategy to ddp, zero1 or zero2"),
    Rule(
        "int8-full",
        _int8_trained_whole,
        "8-bit weights have no gradients",
        "set train.method to lora, or train.base to plain",
    ),
    Rule(
        "processes",
        _several_on_single,
        "this strategy uses one device",
        "set train.strategy to ddp, zero1 or zero2",
    ),
    Rule(
        "deepspeed",
        _no_deepspeed,
        "deepspeed is not installed",
        "pip install 'sft-pipeline[deepspeed]', or set train.strategy to ddp",
    ),
    Rule(
        "bitsandbytes",
        _no_bitsandbytes,
        "bitsandbytes is not installed",
        "pip install 'sft-pipeline[deepspeed]' or 'sft-pipeline[gpu]', or set train.base to plain",
    ),
    Rule(
        "wandb",
        _no_wandb,
        "wandb is not installed",
        "pip install 'sft-pipeline[wandb]', or take it out of train.trackers",
    ),
)
