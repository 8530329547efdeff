"""What tests/trainer/test_methods.py trains: a line for each method, and the five families that it is trained on.

A new method adds a line to CASES: its settings, which parameters may and must move, and how plain PEFT or
transformers loads what it saves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
}
"""Settings of the tiny models beside those of tiny_models.py. Head and embedding of gemma3_text are one matrix."""

UNTIED = tuple(family for family in FAMILIES if family != "gemma3_text")

LITTLE = 0.02
"""The head of the tiny gemma3_text says next to nothing, and what only shifts attention can't change that."""

NEW_TOKENS = {"new_tokens": ["<|tool|>", "zebra", "C"]}
"""The last one is in the tokenizer and in the documents; the others get rows behind all."""
EVERY_ROW_IS_TAKEN = {"vocab_size": 295}

Load = Callable[[Path, Path], torch.nn.Module]


def with_peft(base: Path, output: Path) -> torch.nn.Module:
    """The base model's folder and the adapter's, by plain PEFT."""
    return PeftModel.from_pretrained(plain_model(base, base), output)


@torch.no_grad()
def with_peft_over_nf4(base: Path, output: Path) -> torch.nn.Module:
    """The same over weights that bitsandbytes has packed into 4 bits and unpacked."""
    model: Any = plain_model(base, base)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            packed, state = functional.quantize_4bit(layer.weight, blocksize=64, quant_type="nf4")
            layer.weight.copy_(functional.dequantize_4bit(packed, state))
    return PeftModel.from_pretrained(model, output)


def plain_model(base: Path, output: Path) -> torch.nn.Module:
    """The output's folder alone, by plain transformers."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    return model


def with_peft_and_new_rows(base: Path, output: Path) -> torch.nn.Module:
    """As docs/training.md says: the base's embedding made as large as the adapter's tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(output)))
    return PeftModel.from_pretrained(model, output)


@dataclass(frozen=True)
class Case:
    """`train` and `model` are settings of these sections, `sections` whole ones beside them; `shape` are settings of the
    tiny model beside its family's.

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
    shape: Mapping[str, Any] = field(default_factory=dict)
    capacity: int = 64
    min_fall: float = 0.1


LORA_MATRICES = r".*\.lora_[AB]\.default\.weight"

CASES: dict[str, Case] = {
    "lora": Case({"method": "lora", "lora": {"rank": 4}}, LORA_MATRICES, with_peft),
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
    "rslora": Case(
        {
            "method": "lora",
            "lora": {"rank": 4, "alpha": 6, "rslora": True, "targets": r".*\.(mlp|self_attn)\..*"},
        },
        LORA_MATRICES,
        with_peft,
    ),
    "dora": Case(
        {"method": "lora", "lora": {"rank": 4, "dora": True}},
        r".*\.lora_([AB]|magnitude_vector)\.default\.weight",
        with_peft,
    ),
    "pissa": Case({"method": "lora", "lora": {"rank": 4, "init": "pissa"}}, LORA_MATRICES, with_peft),
    "olora": Case(
        {"method": "lora", "lora": {"rank": 4, "init": "olora"}, "learning_rate": 1e-3},
        LORA_MATRICES,
        with_peft,
    ),
    "lora plus": Case(
        {"method": "lora", "lora": {"rank": 4, "learning_rate_ratio": 4}}, LORA_MATRICES, with_peft
    ),
    "eva": Case({"method": "lora", "lora": {"rank": 4, "init": "eva"}}, LORA_MATRICES, with_peft),
    "loftq": Case(
        {"method": "lora", "lora": {"rank": 4, "init": "loftq"}, "base": "nf4"},
        LORA_MATRICES,
        with_peft_over_nf4,
    ),
    "ia3": Case({"method": "ia3", "learning_rate": 0.1}, r".*\.ia3_l\.default", with_peft),
    "prefix": Case(
        {"method": "prefix", "virtual_tokens": {"count": 8}, "learning_rate": 0.3},
        r"prompt_encoder\.default\..*",
        with_peft,
        min_fall=LITTLE,
    ),
    "prefix network": Case(
        {"method": "prefix", "virtual_tokens": {"count": 8, "inner_size": 16}, "learning_rate": 3e-2},
        r"prompt_encoder\.default\..*",
        with_peft,
        min_fall=LITTLE,
    ),
    "prompt": Case(
        {"method": "prompt", "virtual_tokens": {"count": 8}, "learning_rate": 3e-2},
        r"prompt_encoder\.default\..*",
        with_peft,
        min_fall=LITTLE,
    ),
    "p_tuning": Case(
        {"method": "p_tuning", "virtual_tokens": {"count": 8}, "learning_rate": 1e-2},
        r"prompt_encoder\.default\..*",
        with_peft,
        min_fall=LITTLE,
    ),
    "llama_adapter": Case(
        {"method": "llama_adapter", "virtual_tokens": {"count": 8}, "learning_rate": 0.3},
        r".*\.adaption_(prompt|gate)",
        with_peft,
        families=("llama", "mistral"),
    ),
    "lora new tokens": Case(
        {"method": "lora", "lora": {"rank": 4}},
        r".*\.lora_[AB]\.default\.weight|.*\.token_adapter\.trainable_tokens_delta\.default",
        with_peft_and_new_rows,
        model=NEW_TOKENS,
        shape=EVERY_ROW_IS_TAKEN,
    ),
    "full new tokens": Case(
        {"method": "full", "learning_rate": 1e-3},
        r".*",
        plain_model,
        model=NEW_TOKENS,
        shape=EVERY_ROW_IS_TAKEN,
    ),
    "full over longer positions": Case(
        {"method": "full", "learning_rate": 1e-3},
        r".*",
        plain_model,
        model={"rope_scaling": {"type": "linear", "factor": 4}},
        families=tuple(family for family in FAMILIES if family != "phi3"),  # it knows longrope alone
    ),
}
