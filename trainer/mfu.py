"""Model FLOPs utilisation: what a step has to multiply, over what its GPUs could multiply in that time.

Counted are the matrix products that forward and backward really need. For each matrix and token that meets it 2 x
its size forward, as much for the gradient of its input where somebody before it learns, as much for its own
gradient where it is trained; so of a LoRA a frozen matrix counts twice, not three times, and both small ones count
too. Not counted: the input embedding (a look-up), the head but for trained positions, experts that a token does not
meet, padding, and whatever is computed twice to save memory. Attention counts pairs of a token and one before it in
its document: half the sum of the squared lengths, less where a window cuts them.

The peak is the maker's figure for dense bfloat16 (float16 where there is none), accumulated in float32.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.attention import unwrapped
from trainer.experts import NUM_EXPERTS_NAMES

_SAME_INPUT = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "q_a_proj"), "attention"
    ),
    **dict.fromkeys(("kv_a_proj_with_mqa",), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), "mlp"),
}
"""Modules side by side that read one tensor: the first does not stand before the others."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_NOT_RUN = re.compile(r"vision|visual|audio|original_module")
"""Parts that text does not pass through, and what PEFT keeps of a module that it copied."""
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class WorkCounts:
    """FLOPs of forward and backward. `per_pair` holds, layer by layer, the attention window (None: all of the
    document) and the FLOPs of one pair of tokens.
    """

    per_token: float
    per_trained_token: float
    per_pair: tuple[tuple[int | None, float], ...]

    def of(self, lengths: np.ndarray, num_trained_tokens: int) -> float:
        """Of documents that are so many tokens long."""
        attention = sum(
            flops * _num_pairs(lengths, window) for window, flops in _summed(self.per_pair).items()
        )
        return self.per_token * int(lengths.sum()) + self.per_trained_token * num_trained_tokens + attention


def _summed(per_pair: tuple[tuple[int | None, float], ...]) -> dict[int | None, float]:
    sums: dict[int | None, float] = {}
    for window, flops in per_pair:
        sums[window] = sums.get(window, 0.0) + flops
    return sums


def _num_pairs(lengths: np.ndarray, window: int | None) -> float:
    lengths = lengths.astype(np.float64)
    seen = lengths if window is None else np.minimum(lengths, window)
    return float((seen * lengths - seen * seen / 2).sum())


def count_work(model: torch.nn.Module) -> WorkCounts:
    """Of a causal language model, in a PEFT wrapper or not, whose trained weights are marked as such.

    Reads shapes and marks alone: nothing is computed, weights may be sharded, quantised or on no device.
    """
    causal_lm = unwrapped(model)
    config = causal_lm.config.get_text_config()
    head = causal_lm.get_output_embeddings()
    in_head = {id(module) for module in head.modules()} if head is not None else set()
    sums = {"token": 0.0, "trained token": 0.0}
    order = _Order()
    for name, module in causal_lm.named_modules():
        if _NOT_RUN.search(name):
            continue
        input_learns = order.input_learns(name)
        for num_weights, is_trained in _matrices(name, module, config):
            passes = 1 + input_learns + is_trained
            sums["trained token" if id(module) in in_head else "token"] += 2.0 * num_weights * passes
        order.enter(name, any(p.requires_grad for p in module.parameters(recurse=False)))
    return WorkCounts(sums["token"], sums["trained token"], tuple(_attention(config, order)))


class _Order:
    """Walks modules in the order in which they compute, and knows where gradients flow."""

    def __init__(self) -> None:
        self.something_learns = False
        """Something that was passed is trained, so the gradient has to come back to here."""
        self.attention_learns: dict[int, bool] = {}
        """By layer: whether queries, keys or values take a gradient."""
        self._inputs: dict[tuple[str, str], bool] = {}

    def input_learns(self, name: str) -> bool:
        place = _shared_input(name)
        if place is None or ".lora_B" in name:  # the second small matrix reads what the first one gives
            return self.something_learns
        return self._inputs.setdefault(place, self.something_learns)

    def enter(self, name: str, is_trained: bool) -> None:
        self.something_learns |= is_trained
        place, layer = _shared_input(name), _LAYER.search(name)
        if layer is not None and place is not None and place[1] == "attention":
            self.attention_learns[int(layer.group(1))] = self.something_learns


def _shared_input(name: str) -> tuple[str, str] | None:
    parts = name.split(".")
    for number, part in enumerate(parts):
        if part in _SAME_INPUT:
            return ".".join(parts[:number]), _SAME_INPUT[part]
    return None


def _matrices(name: str, module: Any, config: Any) -> Iterator[tuple[float, bool]]:
    """(numbers that one token meets, whether they are trained) of the matrices that a module itself holds."""
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, torch.nn.Embedding):
        return
    # By its own attributes: PEFT's wrappers answer for the layers that they hold.
    if "in_features" in vars(module) and "base_layer" not in module._modules:
        share = _active_share(config, _num_experts(config)) if _EXPERT.search(name) else 1.0
        yield share * module.in_features * module.out_features, _learns(own.get("weight"))
        return
    for parameter_name, parameter in own.items():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 leaves an empty tensor in its place
        if len(shape) == 3:
            yield _active_share(config, shape[0]) * float(np.prod(shape)), parameter.requires_grad
        elif len(shape) == 2 and parameter_name == "weight" and _is_product(module):
            yield float(np.prod(shape)), parameter.requires_grad


def _learns(weight: torch.nn.Parameter | None) -> bool:
    return weight is not None and weight.requires_grad


def _is_product(module: torch.nn.Module) -> bool:
    """Modules that multiply by a matrix without being a linear layer: GPT-2's, and routers of experts."""
    kind = type(module).__name__
    return kind == "Conv1D" or "Router" in kind or kind.endswith("Gate")


def _num_experts(config: Any) -> int:
    values = (getattr(config, name, None) for name in NUM_EXPERTS_NAMES)
    return next((int(value) for value in values if value), 1)


def _active_share(config: Any, num_experts: int) -> float:
    names = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_top_k", "experts_per_token")
    num_active = next((int(value) for name in names if (value := getattr(config, name, None))), num_experts)
    return min(num_active / num_experts, 1.0)


def _attention(config: Any, order: _Order) -> Iterator[tuple[int | None, float]]:
    """Scores and values: 2 x heads x size each forward, twice that backward."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    scored = getattr(config, "qk_head_dim", None) or size
    valued = getattr(config, "v_head_dim", None) or size
    for layer in range(config.num_hidden_layers):
        passes = 3 if order.attention_learns.get(layer, order.something_learns) else 1
        yield _window(config, layer), 2.0 * heads * (scored + valued) * passes


def _window(config: Any, layer: int) -> int | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return window if "sliding" in kinds[layer] else None
    return window if getattr(config, "use_sliding_window", True) else None


# Peaks ------------------------------------------------------------------------------------------------------

_TERA = 1e12

PEAK_TERAFLOPS: tuple[tuple[str, float], ...] = (
    (r"(H200|GH200)( \d+GB)?( HBM3e)?", 989.4),
    (r"H200 NVL", 835.5),
    (r"(H100|H800)( SXM5)?( \d+GB)?( HBM[23]e?)?", 989.4),
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.5),
    (r"B200( \d+GB)?( HBM3e)?", 2250.0),
    (r"GB200( \d+GB)?( HBM3e)?", 2500.0),
    (r"(A100|A800)([ -](SXM4|PCIE|PCIe|SXM))?([ -]\d+GB)?( PCIe)?", 312.0),
    (r"A30", 165.0),
    (r"A40", 149.7),
    (r"A10", 125.0),
    (r"A10G", 70.0),
    (r"RTX A6000", 154.8),
    (r"L4", 121.0),
    (r"L40", 181.0),
    (r"L40S", 362.0),
    (r"RTX 6000 Ada Generation", 364.2),
    (r"RTX 3090", 71.0),
    (r"RTX 3090 Ti", 80.0),
    (r"RTX 4080", 97.5),
    (r"RTX 4090", 165.2),
    (r"RTX 5080", 112.6),
    (r"RTX 5090", 209.5),
    (r"V100-SXM[23]-\d+GB.*", 125.0),
    (r"V100-PCIE-\d+GB", 112.0),
    (r"V100S-PCIE-\d+GB", 130.0),
    (r"T4", 65.0),
)
"""Whole names as the driver gives them, without the maker's: laptops' variants and slices of a GPU match none."""


def peak_flops(gpu_name: str) -> float | None:
    """FLOPs a second of one GPU by its name; None where the table does not know it."""
    name = re.sub(r"^(NVIDIA |Tesla |GeForce |Quadro )+", "", gpu_name.strip())
    return next((peak * _TERA for pattern, peak in PEAK_TERAFLOPS if re.fullmatch(pattern, name)), None)
