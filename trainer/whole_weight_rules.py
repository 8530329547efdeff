"""Rules about methods that train weights of the model itself, or layers of its kind, and save a whole model."""

from typing import Any

from schemas.pipeline_config import PipelineConfig
from schemas.training_config import FreezeConfig
from trainer.rules import Rule


def _freezes_all(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    if config.train.method != "freeze" or config.train.freeze != FreezeConfig():
        return None
    return "train.method is freeze, train.freeze names nothing to train"


def _saved_from_bits(config: PipelineConfig, architecture: dict[str, Any]) -> str | None:
    train = config.train
    if train.method not in ("freeze", "expand") or train.base == "plain":
        return None
    return f"train.method is {train.method}, train.base {train.base}"


WHOLE_WEIGHT_RULES = (
    Rule(
        "freeze-nothing",
        _freezes_all,
        "there is nothing to train",
        "set train.freeze.last_layers, parameters, head or embeddings",
    ),
    Rule(
        "whole-model-bits",
        _saved_from_bits,
        "the whole model is saved, and would be saved as 8 or 4 bits have rounded it",
        "set train.base to plain, or train.method to lora",
    ),
)
