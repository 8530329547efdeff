"""Packed against alone on a GPU: losses and gradients of the same weights over twenty steps.

    python benchmarks/packed_alone.py

Small models of seven families with random weights, six documents of 12 to 1,500 tokens in one row of 4,096. In each
step the loss and the gradient of all weights are taken twice with the same weights: once with the documents packed in
one row, as this program trains them, and once with each document in a forward pass of its own, by transformers' own
attention; then the weights take a step. In fp32 the packed documents go one by one through scaled_dot_product_attention,
in bf16 through torch's kernel for variable lengths. bf16 rounds: its noise is what lies between two of transformers' own
kernels, alone both times.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.attention import use_packed_attention
from trainer.data import collate
from trainer.loss import token_losses
from trainer.shard_reader import Example

LENGTHS = (700, 90, 1500, 333, 12, 1461)
VOCABULARY = 1024
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 256},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "gemma2": {"sliding_window": 256, "head_dim": 64},
    "gemma3_text": {"sliding_window": 256, "head_dim": 64},
    "phi3": {},
}


@dataclass(frozen=True)
class Step:
    """Mean loss and gradient of all weights, flat."""

    loss: float
    gradient: torch.Tensor


def main() -> None:
    options = _arguments()
    torch.backends.cuda.matmul.allow_tf32 = False
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print(
        "| family | dtype | loss, first and last step | loss differs by | gradient differs by | noise of the gradient |"
    )
    print("|---|---|---|---|---|---|")
    for family in options.families:
        for dtype in (torch.float32, torch.bfloat16):
            print(compared(family, dtype, options.device, options.steps), flush=True)


def compared(family: str, dtype: torch.dtype, device: str, num_steps: int) -> str:
    """A line of the table: the largest differences over all steps, those of gradients relative."""
    model = small_model(family).to(device, dtype).train()
    first, second = ("eager", "eager") if family == "gemma2" else ("sdpa", "eager")
    losses, loss_gaps, gaps, noises = [], [0.0], [0.0], [0.0]
    for number in range(num_steps):
        documents = random_documents(number)
        alone = step_alone(model, documents, first)
        packed = step_packed(model, documents)
        other = step_alone(model, documents, second)
        losses.append(alone.loss)
        loss_gaps.append(abs(packed.loss - alone.loss))
        gaps.append(relative(packed.gradient, alone.gradient))
        noises.append(relative(other.gradient, alone.gradient))
        descend(model, alone.gradient)
    return (
        f"| {family} | {str(dtype).removeprefix('torch.')} | {losses[0]:.4f}, {losses[-1]:.4f} | {max(loss_gaps):.1e} "
        f"| {max(gaps):.1e} | {max(noises):.1e} |"
    )


def step_packed(model: Any, documents: list[Example]) -> Step:
    use_packed_attention(model)
    batch = collate(documents).to(next(model.parameters()).device)
    weights = batch.weights
    loss = (token_losses(model, batch) * weights).sum() / weights.sum()
    return taken(model, loss)


def step_alone(model: Any, documents: list[Example], attention: str) -> Step:
    model.set_attn_implementation(attention)
    device = next(model.parameters()).device
    losses = []
    for document in documents:
        ids = torch.tensor(np.asarray(document.input_ids), device=device, dtype=torch.long)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits.float(), ids[1:], reduction="none"))
    return taken(model, torch.cat(losses).mean())


def taken(model: Any, loss: torch.Tensor) -> Step:
    loss.backward()
    gradient = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return Step(loss.item(), gradient)


def descend(model: Any, gradient: torch.Tensor, rate: float = 0.5) -> None:
    """A step of gradient descent with the norm clipped to 1."""
    gradient = gradient * min(1.0, 1.0 / float(gradient.norm()))
    place = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                part = gradient[place : place + parameter.numel()].view_as(parameter)
                parameter -= (rate * part).to(parameter.dtype)
                place += parameter.numel()


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def random_documents(seed: int) -> list[Example]:
    """Every token is followed by one of two, so that there is something to learn; all but the first are trained."""
    draws = np.random.default_rng(seed)
    return [_document(draws, length, row) for row, length in enumerate(LENGTHS)]


def _document(draws: np.random.Generator, length: int, row: int) -> Example:
    ids = [int(draws.integers(3, VOCABULARY))]
    for step in draws.integers(0, 2, length - 1).tolist():
        ids.append((ids[-1] * 5 + 7 + step) % (VOCABULARY - 3) + 3)
    return Example(
        row=row,
        input_ids=np.array(ids, np.int32),
        span_starts=np.array([1], np.int32),
        span_ends=np.array([length], np.int32),
        span_weights=np.ones(1, np.float32),
    )


def small_model(family: str) -> Any:
    """Four layers of 512, head size 64, grouped queries; weights large enough that attention matters."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        **FAMILIES[family],
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    main()
