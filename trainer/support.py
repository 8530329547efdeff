"""What can't work together, why, and the nearest settings that do: one table, asked before the first stage.

Light: reads the config and the model's config.json, never imports torch. The table is the validator and the
matrix that the docs print (support_matrix.py).
"""

import importlib.util
import json
from collections.abc import Iterator
from typing import Any

from pipelines.hub_cache import model_folder
from schemas.errors import InputError, RefusedError
from schemas.pipeline_config import PipelineConfig
from trainer.lora_rules import LORA_RULES
from trainer.memory import BITSANDBYTES_OPTIMIZERS
from trainer.model_rules import SECTION_MODEL_RULES
from trainer.optimizer_rules import OPTIMIZER_RULES
from trainer.rules import MODEL_RULES, Rule
from trainer.setting_rules import SETTING_RULES
from trainer.virtual_rules import UNPACKED_RULES, VIRTUAL_TOKEN_RULES
from trainer.weight_rules import WEIGHT_RULES
from trainer.whole_weight_rules import WHOLE_WEIGHT_RULES


def check_supported(config: PipelineConfig) -> None:
    """Raises RefusedError naming every rule that the config breaks."""
    problems = refusals(config)
    if problems:
        raise RefusedError("; ".join(problems))


def refusals(config: PipelineConfig) -> list[str]:
    """One line for each rule that the config breaks: what was found, why it can't work, what does."""
    return [f"{rule.id}: {found}: {rule.reason}; {rule.alternative}" for rule, found in _broken_rules(config)]


def _broken_rules(config: PipelineConfig) -> Iterator[tuple[Rule, str]]:
    architecture = model_architecture(config)
    for rule in RULES:
        found = rule.find(config, architecture)
        if found is not None:
            yield rule, found


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

ONE_PROCESS = ("single", "pipeline")
"""Strategies of one process."""
SHARDED_STRATEGIES = ("zero3", "fsdp2")
"""They cut the frozen weights into pieces too."""
OFFLOADS = {
    "zero1": ("optimizer",),
    "zero2": ("optimizer",),
    "zero3": ("optimizer", "all"),
    "fsdp2": ("optimizer", "all"),
}
"""What a strategy can leave in the CPU's memory."""


def _no_model(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    return "the config has no section model" if config.model is None else None


def _foreign_quantisation(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    settings = architecture.get("quantization_config")
    if settings is None or _form(settings) is not None:
        return None
    kind = settings.get("bnb_4bit_quant_type", "") if settings.get("load_in_4bit") else ""
    return (
        f"the model's weights are quantised ({settings.get('quant_method', 'unknown method')} {kind}".rstrip()
        + ")"
    )


def _other_form(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    form = _form(architecture.get("quantization_config") or {})
    if form is None or config.train.base in (form, f"{form}_rows"):
        return None
    return f"the model's weights are quantised to {form}, train.base is {config.train.base}"


def _form(settings: dict[str, Any]) -> str | None:
    """What train.base must be over a model folder that is quantised already; None for what we don't read."""
    if settings.get("quant_method") != "bitsandbytes":
        return None
    if settings.get("load_in_8bit"):
        return "int8"
    return "nf4" if settings.get("load_in_4bit") and settings.get("bnb_4bit_quant_type") == "nf4" else None


def _int8_in_shards(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.base not in ("int8", "int8_rows") or train.strategy not in SHARDED_STRATEGIES:
        return None
    return f"train.base is {train.base}, train.strategy {train.strategy}"


def _cannot_offload(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.offload in ("none", *OFFLOADS.get(train.strategy, ())):
        return None
    return f"train.offload is {train.offload}, train.strategy {train.strategy}"


def _int8_trained_whole(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if config.train.base not in ("int8", "int8_rows") or config.train.method != "full":
        return None
    return f"train.base is {config.train.base}, train.method full"


def _nf4_trained_whole(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if config.train.base != "nf4" or config.train.method != "full":
        return None
    return "train.base is nf4, train.method full"


def _several_on_single(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    num_processes = config.train.num_processes
    if config.train.strategy not in ONE_PROCESS or num_processes in (None, 1):
        return None
    return f"train.num_processes is {num_processes}, train.strategy {config.train.strategy}"


def _no_deepspeed(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if not config.train.strategy.startswith("zero") or importlib.util.find_spec("deepspeed") is not None:
        return None
    return f"train.strategy is {config.train.strategy}"


def _no_bitsandbytes(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    is_needed = train.base != "plain" or train.optimizer in BITSANDBYTES_OPTIMIZERS
    if not is_needed or importlib.util.find_spec("bitsandbytes") is not None:
        return None
    return f"train.base is {train.base}, train.optimizer {train.optimizer}"


def _no_wandb(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if "wandb" not in config.train.trackers or importlib.util.find_spec("wandb") is not None:
        return None
    return "train.trackers names wandb"


def _early_stopping_without_evaluations(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.early_stopping_evaluations == 0 or train.evaluate_every_steps > 0:
        return None
    return f"train.early_stopping_evaluations is {train.early_stopping_evaluations}, train.evaluate_every_steps 0"


def _spikes_in_deepspeed(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if not train.strategy.startswith("zero") or not (train.max_loss_spike or train.max_grad_spike):
        return None
    return (
        f"train.max_loss_spike is {train.max_loss_spike:g}, train.max_grad_spike {train.max_grad_spike:g}, "
        f"train.strategy {train.strategy}"
    )


RULES = (
    Rule("model", _no_model, "there is nothing to train", "add model.path"),
    Rule(
        "quantised-base",
        _foreign_quantisation,
        "of quantised weights only bitsandbytes' int8 and nf4 are read",
        "use the model's unquantised weights; train.base int8 or nf4 quantises them as they are read",
    ),
    Rule(
        "quantised-form",
        _other_form,
        "what was cut off is not in the folder any more",
        "set train.base to the form in the folder, or use the model's unquantised weights",
    ),
    *MODEL_RULES,
    *SECTION_MODEL_RULES,
    *SETTING_RULES,
    *LORA_RULES,
    *UNPACKED_RULES,
    *VIRTUAL_TOKEN_RULES,
    *OPTIMIZER_RULES,
    *WHOLE_WEIGHT_RULES,
    Rule(
        "int8-sharded",
        _int8_in_shards,
        "8-bit weights do not survive being cut into pieces and put together: it trains silently wrong",
        "set train.strategy to zero2, zero1 or ddp, which keep the base whole on each device",
        links=(
            "bitsandbytes-foundation/bitsandbytes#1451",
            "bitsandbytes-foundation/bitsandbytes#1709",
            "huggingface/peft#2833",
            "huggingface/accelerate#1415",
        ),
    ),
    Rule(
        "offload",
        _cannot_offload,
        "this strategy does not leave that in the CPU's memory",
        "set train.offload to optimizer with train.strategy zero1, zero2, zero3 or fsdp2, or to all with zero3 or fsdp2",
    ),
    Rule(
        "early-stopping",
        _early_stopping_without_evaluations,
        "there is one validation, at the end",
        "set train.evaluate_every_steps",
    ),
    Rule(
        "spikes-zero",
        _spikes_in_deepspeed,
        "DeepSpeed decides by itself which step it skips",
        "set train.strategy to ddp or fsdp2, or both limits to 0",
    ),
    Rule(
        "int8-full",
        _int8_trained_whole,
        "8-bit weights have no gradients",
        "set train.method to lora, or train.base to plain",
    ),
    Rule(
        "nf4-full",
        _nf4_trained_whole,
        "4-bit weights have no gradients",
        "set train.method to lora, or train.base to plain",
    ),
    Rule(
        "processes",
        _several_on_single,
        "this strategy uses one process",
        "set train.strategy to ddp, zero1 or zero2",
    ),
    Rule(
        "deepspeed",
        _no_deepspeed,
        "deepspeed is not installed",
        "pip install 'sft-pipeline[deepspeed]', or set train.strategy to ddp",
        of_machine=True,
    ),
    Rule(
        "bitsandbytes",
        _no_bitsandbytes,
        "bitsandbytes is not installed",
        "pip install 'sft-pipeline[deepspeed]' or 'sft-pipeline[gpu]', or set train.base to plain and "
        "train.optimizer to adamw",
        of_machine=True,
    ),
    Rule(
        "wandb",
        _no_wandb,
        "wandb is not installed",
        "pip install 'sft-pipeline[wandb]', or take it out of train.trackers",
        of_machine=True,
    ),
    *WEIGHT_RULES,
)
