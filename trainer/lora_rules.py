"""Rules about LoRA's variants, what its matrices begin with, and IA3."""

from typing import Any

from schemas.pipeline_config import PipelineConfig
from trainer.optimizer_rules import WHOLE_STATE_STRATEGIES
from trainer.rules import Rule

VARIANT_STRATEGIES = ("single", "ddp")
"""They hold and update each trained weight in its own dtype."""
VARIANT_BASES = ("plain", "nf4")
WHOLE_WEIGHT_STRATEGIES = ("single", "ddp", "zero1", "zero2")
"""Each process loads the whole base on one device."""
TAKEN_FROM_BASE = ("pissa", "olora")


def _dora_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.method != "lora" or not train.lora.dora or train.strategy in VARIANT_STRATEGIES:
        return None
    return f"train.lora.dora is true, train.strategy {train.strategy}"


def _dora_compiled(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.method != "lora" or not train.lora.dora or not train.compile:
        return None
    return "train.lora.dora and train.compile are true"


def _dora_over_int8(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.method != "lora" or not train.lora.dora or train.base in VARIANT_BASES:
        return None
    return f"train.lora.dora is true, train.base {train.base}"


def _dora_over_merged(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    model, train = config.model, config.train
    if train.method != "lora" or not train.lora.dora or model is None or model.adapter is None:
        return None
    return f"train.lora.dora is true, model.adapter {model.adapter}"


def _two_rates_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    ratio = train.lora.learning_rate_ratio
    if train.method != "lora" or ratio == 1 or train.strategy in WHOLE_STATE_STRATEGIES:
        return None
    return f"train.lora.learning_rate_ratio is {ratio:g}, train.strategy {train.strategy}"


def _ia3_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.method != "ia3" or train.strategy in VARIANT_STRATEGIES:
        return None
    return f"train.method is ia3, train.strategy {train.strategy}"


def _ia3_over_int8(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if config.train.method != "ia3" or config.train.base in VARIANT_BASES:
        return None
    return f"train.method is ia3, train.base {config.train.base}"


def _ia3_over_adapter(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    model = config.model
    if config.train.method != "ia3" or model is None or model.adapter is None:
        return None
    return f"train.method is ia3, model.adapter {model.adapter}"


def _init(config: PipelineConfig) -> str | None:
    """train.lora.init where it means something."""
    lora = config.train.lora
    return lora.init if config.train.method == "lora" and lora.init != "default" else None


def _init_in_shards(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    init = _init(config)
    if init is None or config.train.strategy in WHOLE_WEIGHT_STRATEGIES:
        return None
    return f"train.lora.init is {init}, train.strategy {config.train.strategy}"


def _taken_from_bits(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    init = _init(config)
    if init not in TAKEN_FROM_BASE or config.train.base == "plain":
        return None
    return f"train.lora.init is {init}, train.base {config.train.base}"


def _init_over_rows(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    init = _init(config)
    if init not in ("eva", "loftq") or config.train.base != "int8_rows":
        return None
    return f"train.lora.init is {init}, train.base int8_rows"


def _nothing_lost(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if _init(config) != "loftq" or config.train.base != "plain":
        return None
    return "train.lora.init is loftq, train.base plain"


def _loss_unknown(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if _init(config) != "loftq" or config.model is None:
        return None
    if config.model.init == "random":
        return "train.lora.init is loftq, model.init random"
    if "quantization_config" not in architecture:
        return None
    return "train.lora.init is loftq, the model's weights are quantised already"


def _init_beside_new_tokens(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    init = _init(config)
    if init is None or config.model is None or not config.model.new_tokens:
        return None
    return f"train.lora.init is {init}, model.new_tokens {config.model.new_tokens}"


def _init_of_dora(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    init = _init(config)
    if init is None or not config.train.lora.dora:
        return None
    return f"train.lora.init is {init}, train.lora.dora true"


def _init_over_adapter(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    init = _init(config)
    if init is None or config.model is None or config.model.adapter is None:
        return None
    return f"train.lora.init is {init}, model.adapter {config.model.adapter}"


LORA_RULES = (
    Rule(
        "dora-strategy",
        _dora_elsewhere,
        "magnitudes stay fp32 beside matrices of another dtype, and begin at the lengths of whole weights",
        "set train.strategy to ddp or single, or train.lora.dora to false",
        links=("huggingface/trl#7268",),
    ),
    Rule(
        "dora-compile",
        _dora_compiled,
        "lengths that are computed beside the graph were never shown to be right when compiled",
        "set train.compile or train.lora.dora to false",
    ),
    Rule(
        "dora-int8",
        _dora_over_int8,
        "each pass unpacks the weights for their lengths, which bitsandbytes' 8-bit layers don't survive (peft 0.21)",
        "set train.base to nf4 or plain, or train.lora.dora to false",
    ),
    Rule(
        "dora-adapter",
        _dora_over_merged,
        "two adapters with magnitudes are not one with magnitudes, and plain LoRA has none to go on with",
        "set train.lora.dora to false, or merge the adapter with PEFT's merge_and_unload and name the result as model.path",
    ),
    Rule(
        "lora-plus-strategy",
        _two_rates_elsewhere,
        "strategies that cut what is trained update all of it at one rate",
        "set train.strategy to ddp or single, or train.lora.learning_rate_ratio to 1",
    ),
    Rule(
        "ia3-strategy",
        _ia3_elsewhere,
        "its vectors stay fp32, which this strategy would round",
        "set train.strategy to ddp or single, or train.method to lora",
    ),
    Rule(
        "ia3-int8",
        _ia3_over_int8,
        "beside 8-bit layers PEFT computes keys and values in fp32 and the queries stay bf16 (found with peft 0.21)",
        "set train.base to nf4 or plain, or train.method to lora",
    ),
    Rule(
        "ia3-adapter",
        _ia3_over_adapter,
        "vectors and matrices are not saved as one adapter",
        "set train.method to lora, or merge the adapter with PEFT's merge_and_unload and name the result as model.path",
    ),
    Rule(
        "lora-init-strategy",
        _init_in_shards,
        "first matrices are computed from whole weights on one device",
        "set train.strategy to single, ddp, zero1 or zero2, or train.lora.init to default",
    ),
    Rule(
        "lora-init-bits",
        _taken_from_bits,
        "what is left of a quantised weight would have to be quantised anew, and the adapter would fit no other base",
        "set train.lora.init to loftq, or train.base to plain",
    ),
    Rule(
        "lora-init-rows",
        _init_over_rows,
        "first matrices were never shown to be right over this form of a base",
        "set train.base to nf4 or int8, or train.lora.init to default",
    ),
    Rule(
        "loftq-plain",
        _nothing_lost,
        "it makes up for what quantising loses, and nothing is quantised",
        "set train.base to nf4 or int8, or train.lora.init to pissa",
    ),
    Rule(
        "loftq-quantised",
        _loss_unknown,
        "what quantising has lost can't be told without the unquantised weights",
        "name the unquantised model as model.path, or set train.lora.init to default",
    ),
    Rule(
        "lora-init-dora",
        _init_of_dora,
        "magnitudes of a changed base fit no other one",
        "set train.lora.dora to false, or train.lora.init to default",
    ),
    Rule(
        "lora-init-tokens",
        _init_beside_new_tokens,
        "an initial adapter holds matrices and whole modules, no rows of new tokens",
        "set train.lora.init to default, or leave model.new_tokens out",
    ),
    Rule(
        "lora-init-adapter",
        _init_over_adapter,
        "an adapter that is there already says what training begins with",
        "leave model.adapter out, or set train.lora.init to default",
    ),
)
