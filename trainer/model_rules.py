"""Rules about what the section model changes in a model before it is trained: positions, first weights, tokens."""

from typing import Any

from schemas.pipeline_config import PipelineConfig
from schemas.training_config import RopeScalingConfig
from trainer.rope import rope_types
from trainer.rules import Rule


def _scaling(config: PipelineConfig) -> RopeScalingConfig | None:
    return config.model.rope_scaling if config.model is not None else None


def _scaled_twice(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    scaling, before = _scaling(config), next(rope_types(architecture), None)
    if scaling is None or before is None:
        return None
    return f"model.rope_scaling is {scaling.type}, the model's own config.json scales by {before}"


def _scaling_of_phi3(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    scaling = _scaling(config)
    if scaling is None or architecture.get("model_type") != "phi3":
        return None
    return f"model.rope_scaling is {scaling.type}, model type 'phi3'"


def _angles_by_row(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    """Types that look at the longest position of a row, and so at other documents in it."""
    scaling = _scaling(config)
    found = [scaling.type] if scaling is not None else list(rope_types(architecture))
    kind = next((name for name in found if name in ("dynamic", "longrope")), None)
    is_alone = config.pack.mode == "unpacked" and config.train.bins_per_micro_step == 1
    known = architecture.get("original_max_position_embeddings") or architecture.get(
        "max_position_embeddings"
    )
    if kind is None or is_alone or not isinstance(known, int) or config.split.max_tokens <= known:
        return None
    return (
        f"positions are scaled by {kind}, split.max_tokens is {config.split.max_tokens}, pack.mode "
        f"{config.pack.mode}, train.bins_per_micro_step {config.train.bins_per_micro_step}"
    )


def _random_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    model, train = config.model, config.train
    if model is None or model.init != "random":
        return None
    if train.base not in ("plain", "nf4"):
        return f"model.init is random, train.base {train.base}"
    if train.strategy == "pipeline":
        return "model.init is random, train.strategy pipeline"
    return f"model.init is random, model.adapter {model.adapter}" if model.adapter is not None else None


def _new_tokens(config: PipelineConfig) -> bool:
    return config.model is not None and bool(config.model.new_tokens)


def _new_tokens_untrained(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    trains_rows = train.method == "freeze" and train.freeze.embeddings and train.freeze.head
    if not _new_tokens(config) or train.method in ("lora", "full") or trains_rows:
        return None
    return f"model.new_tokens is set, train.method is {train.method}"


def _new_tokens_in_shards(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if not _new_tokens(config) or train.method != "lora" or train.strategy not in ("zero3", "fsdp2"):
        return None
    return f"model.new_tokens is set, train.method is lora, train.strategy {train.strategy}"


def _new_tokens_beside(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    model, lora = config.model, config.train.lora
    if model is None or not model.new_tokens or config.train.method != "lora":
        return None
    if model.adapter is not None:
        return f"model.new_tokens is set, model.adapter is {model.adapter}"
    targets = lora.targets if isinstance(lora.targets, list) else []
    both = {"lm_head", "embed_tokens"}.intersection(targets)
    return f"model.new_tokens is set, {sorted(both)[0]!r} is in train.lora.targets" if both else None


SECTION_MODEL_RULES = (
    Rule(
        "rope-twice",
        _scaled_twice,
        "two stretchings of the same positions would multiply",
        "leave model.rope_scaling out, or use the model that was trained without it",
    ),
    Rule(
        "rope-phi3",
        _scaling_of_phi3,
        "transformers builds this family with longrope alone, which needs a factor for each angle",
        "leave model.rope_scaling out, or use a model of the family that was trained with more positions",
    ),
    Rule(
        "rope-row",
        _angles_by_row,
        "the longest document of a row would change the angles of all others in it",
        "set pack.mode to unpacked and train.bins_per_micro_step to 1, split.max_tokens to the positions that the model "
        "was trained with, or model.rope_scaling.type to yarn, llama3 or linear",
    ),
    Rule(
        "random",
        _random_elsewhere,
        "weights that are drawn are neither quantised by bitsandbytes nor laid over several cards, nor what an adapter "
        "was trained over",
        "set model.init to files, or train.base to nf4 or plain, train.strategy to single, and leave model.adapter out",
    ),
    Rule(
        "new-tokens-method",
        _new_tokens_untrained,
        "new rows would stay the mean of all others",
        "set train.method to lora or full, or to freeze with train.freeze.embeddings and head",
    ),
    Rule(
        "new-tokens-sharded",
        _new_tokens_in_shards,
        "PEFT copies rows out of a whole matrix",
        "set train.strategy to ddp, zero1 or zero2, or train.method to full",
    ),
    Rule(
        "new-tokens-beside",
        _new_tokens_beside,
        "head and embedding are changed in one way",
        "leave model.adapter out, and head and embedding out of train.lora.targets; train.lora.modules_to_save may have "
        "them",
    ),
)
