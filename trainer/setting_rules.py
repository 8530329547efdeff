"""Rules about precision, compiling, and adapters that are trained on: settings that meet strategies and bases."""

from typing import Any

from schemas.pipeline_config import PipelineConfig
from trainer.rules import Rule

FLOAT16_STRATEGIES = ("single", "ddp")
"""They sum whole gradients in fp32, and divide those by the loss scale."""


def _float16_elsewhere(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    is_float16 = config.model is not None and config.model.dtype == "float16"
    if not is_float16 or config.train.strategy in FLOAT16_STRATEGIES:
        return None
    return f"model.dtype is float16, train.strategy {config.train.strategy}"


SETTING_RULES = (
    Rule(
        "float16-strategy",
        _float16_elsewhere,
        "this strategy sums gradients in its own place, which does not know the loss scale",
        "set train.strategy to ddp or single, or model.dtype to bfloat16 or float32",
    ),
)
