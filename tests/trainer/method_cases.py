"""What tests/trainer/test_methods.py trains: a line for each method, and the five families that it is trained on.

A new method adds a line to CASES: its settings, which parameters may and must move, and how plain PEFT or
transformers loads what it saves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
}
"""Settings of the tiny models beside those of tiny_models.py. Head and embedding of gemma3_text are one matrix."""

UNTIED = tuple(family for family in FAMILIES if family != "gemma3_text")

Load = Callable[[Path, Path], torch.nn.Module]


def with_peft(base: Path, output: Path) -> torch.nn.Module:
    """The base model's folder and the adapter's, by plain PEFT."""
    return PeftModel.from_pretrained(plain_model(base, base), output)


def plain_model(base: Path, output: Path) -> torch.nn.Module:
    """The output's folder alone, by plain transformers."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    return model


@dataclass(frozen=True)
class Case:
    """`train` and `model` are settings of these sections, `sections` whole ones beside them.

    `moves` is a pattern for whole names of parameters, as they are in the model that trains: these move in 20 steps,
    and no others. `load` gets the folders of the base model and of the output. `capacity` 1: a bin for each document.
    `min_fall` is how far the loss has to fall, in nats a token.
    """

    train: Mapping[str, Any]
    moves: str
    load: Load
    model: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    families: tuple[str, ...] = tuple(FAMILIES)
    capacity: int = 64
    min_fall: float = 0.1


CASES: dict[str, Case] = {
    "lora": Case({"method": "lora", "lora": {"rank": 4}}, r".*\.lora_[AB]\.default\.weight", with_peft),
    "full": Case({"method": "full", "learning_rate": 1e-3}, r".*", plain_model),
    "freeze layers": Case(
        {"method": "freeze", "freeze": {"last_layers": 1}, "learning_rate": 3e-3},
        r"model\.layers\.1\..*",
        plain_model,
    ),
    "freeze pattern": Case(
        {"method": "freeze", "freeze": {"parameters": [r".*\.layers\.0\.mlp\..*", r".*norm\.weight"]}},
        r"model\.layers\.0\.mlp\..*|.*norm\.weight",
        plain_model,
    ),
    "freeze head": Case(
        {"method": "freeze", "freeze": {"head": True}}, r"lm_head\.weight", plain_model, families=UNTIED
    ),
    "freeze tied head": Case(
        {"method": "freeze", "freeze": {"head": True}},
        r"model\.embed_tokens\.weight",
        plain_model,
        families=("gemma3_text",),
    ),
    "freeze embeddings": Case(
        {"method": "freeze", "freeze": {"embeddings": True}}, r"model\.embed_tokens\.weight", plain_model
    ),
    "expand": Case(
        {"method": "expand", "expand": {"new_layers": 2}, "learning_rate": 2e-2},
        r"model\.layers\.[13]\..*",
        plain_model,
    ),
}
