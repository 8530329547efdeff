"""Models that the benchmark knows by name: published shapes, with weights that are drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

_LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
_LLAMA_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 8192,
}
_QWEN_32B = {
    "vocab_size": 152064,
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
}
_TOY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """`model_type` and `settings` are those of transformers' config."""

    title: str
    model_type: str
    settings: Mapping[str, Any]

    @property
    def vocabulary_size(self) -> int:
        return int(self.settings["vocab_size"])


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "8b": Shape("Llama-3.1-8B", "llama", _LLAMA_8B),
        "7b": Shape("Llama-2-7B", "llama", _LLAMA_7B),
        "32b": Shape("Qwen2.5-32B", "qwen2", _QWEN_32B),
        "toy": Shape("two layers of 64", "llama", _TOY),
    }
)
