"""Before the first step: does this model, packed or padded, compute what it computes on each document alone?

The judge is transformers' own attention, head and cross entropy on unpacked documents. A family that leaks
across documents, scales its logits in a way that loss.py does not know or drops the borders fails here, in a
second, and not as a quietly worse model a week later.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from schemas.errors import RefusedError, TrainingError
from trainer.attention import unwrapped, use_packed_attention, use_plain_attention
from trainer.data import MicroBatch, collate
from trainer.loss import token_losses
from trainer.model import without_outliers
from trainer.padding import collate_padded
from trainer.ranks import ALONE, Ranks
from trainer.shard_reader import Example
from trainer.virtual_tokens import needs_padded_rows

DOCUMENT_LENGTHS = (29, 18)
MAX_LOSS_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Mean over tokens, in nats. bf16 logits of 16 to 32 are 0.125 apart: two right kernels differ by a third of it."""
MAX_LEAK = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 0.01}
"""The same where nothing may change at all: experts that see other tokens may round otherwise, no more."""
MAX_GRADIENT_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Norm of the difference over the norm; documents that see each other give 0.8 and more."""
NUM_PROBED_PARAMETERS = 4
MAX_PROBED_NUMBERS = 1 << 26


def check_packing(
    model: torch.nn.Module,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    ranks: Ranks = ALONE,
    is_padded: bool = False,
) -> None:
    """Compare together and alone: losses, one gradient, and document 2 when document 1 changes. Together is packed,
    or, with `is_padded`, in padded rows.

    `model` has packed attention, for padded rows plain, before and after; `dtype` is the one that computes, if it
    isn't the model's. Raises RefusedError for a model that can't be trained so and TrainingError when no gradient
    reaches the trained parameters.
    """
    dtype = dtype if dtype is not None else unwrapped(model).dtype
    layout = _PADDED if is_padded else _PACKED
    was_training = model.training
    model.eval()
    try:
        with without_outliers(model):
            _check_losses(model, layout, device, dtype)
            _check_gradient(model, layout, device, dtype, ranks)
    except TrainingError as error:
        raise RefusedError(f"{_name(model)} can't be trained {layout.name}: {error}") from error
    finally:
        layout.use_attention(model)
        model.train(was_training)


@dataclass(frozen=True, slots=True)
class _Layout:
    """A way to compute several documents at once."""

    name: str
    collate: Callable[[Sequence[Example]], MicroBatch]
    use_attention: Callable[[torch.nn.Module], None]


_PACKED = _Layout("packed", collate, use_packed_attention)
_PADDED = _Layout("padded", collate_padded, use_plain_attention)


@torch.no_grad()
def _check_losses(model: torch.nn.Module, layout: _Layout, device: torch.device, dtype: torch.dtype) -> None:
    first, second, other = probe_documents(model)
    together = token_losses(model, layout.collate([first, second]).to(device))
    after_other = token_losses(model, layout.collate([other, second]).to(device))
    use_plain_attention(model)
    alone = torch.cat([_losses_alone(model, first, device), _losses_alone(model, second, device)])
    layout.use_attention(model)
    num_first = len(first.input_ids) - 1
    leak = _mean_difference(together[num_first:], after_other[num_first:])
    _check_limit(model, layout, "losses of a document after two different ones", leak, MAX_LEAK[dtype])
    difference = _mean_difference(together, alone)
    _check_limit(model, layout, f"losses {layout.name} and alone", difference, MAX_LOSS_DIFFERENCE[dtype])


def _mean_difference(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float((ours - expected).abs().mean())


def _check_limit(model: torch.nn.Module, layout: _Layout, what: str, difference: float, limit: float) -> None:
    if not difference <= limit:  # not a number is no pass
        raise RefusedError(
            f"{_name(model)}: {what} differ by {difference:.4f}, expected at most {limit}; this model can't be "
            f"trained {layout.name} by this version, use another model family"
        )


def _check_gradient(
    model: torch.nn.Module, layout: _Layout, device: torch.device, dtype: torch.dtype, ranks: Ranks
) -> None:
    parameters = _probed_parameters(model)
    first, second, _ = probe_documents(model)
    together = _gradient(token_losses(model, layout.collate([first, second]).to(device)).sum(), parameters)
    model.zero_grad(set_to_none=True)
    use_plain_attention(model)
    losses = _losses_alone(model, first, device).sum() + _losses_alone(model, second, device).sum()
    alone = _gradient(losses, parameters)
    model.zero_grad(set_to_none=True)
    layout.use_attention(model)
    # Each rank may have a part of each gradient, and all decide alike.
    squares = ranks.add_up(torch.stack([alone.square().sum(), (together - alone).square().sum()]))
    norm, norm_of_difference = squares.sqrt().tolist()
    if norm == 0.0:
        raise TrainingError("no gradient reaches its trained parameters")
    difference = norm_of_difference / norm
    limit = MAX_GRADIENT_DIFFERENCE[dtype]
    _check_limit(model, layout, f"gradients {layout.name} and alone", difference, limit)


def _probed_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The first few trained ones: what comes back to them went through the whole model. And all vectors: an added
    layer may begin with a gradient in a norm alone.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.numel() <= MAX_PROBED_NUMBERS]
    if not trained:
        raise TrainingError("nothing is trainable")
    vectors = [p for p in trained[NUM_PROBED_PARAMETERS:] if p.dim() == 1]
    return trained[:NUM_PROBED_PARAMETERS] + vectors


def _gradient(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        return torch.cat([gradient.flatten().float() for gradient in gradients])
    # FSDP2 hands out gradients of the parts that a rank keeps, in a whole backward pass alone.
    loss.backward()  # type: ignore[no-untyped-call]
    parts = [p.grad.to_local() for p in parameters if isinstance(p.grad, DTensor)]
    return torch.cat(
        [torch.zeros(1, device=loss.device), *(part.flatten().to(loss.device) for part in parts)]
    )


def _losses_alone(model: torch.nn.Module, example: Example, device: torch.device) -> torch.Tensor:
    ids = collate([example]).input_ids.to(device)
    # PEFT's own forward pass gives virtual tokens, and may give their logits too.
    judge = model if needs_padded_rows(model) else unwrapped(model)
    logits = judge(input_ids=ids, use_cache=False).logits[0, -ids.shape[1] : -1]
    return F.cross_entropy(logits.float(), ids[0, 1:], reduction="none")


def probe_documents(model: torch.nn.Module) -> tuple[Example, Example, Example]:
    """Two documents, and another of the first one's length; ids spread over the vocabulary, all trained."""
    vocabulary = unwrapped(model).config.get_text_config().vocab_size
    draws = np.random.default_rng(0)
    first, second = DOCUMENT_LENGTHS
    lengths = (first, second, first)
    documents = [draws.integers(0, vocabulary, length).astype(np.int32) for length in lengths]
    a, b, c = (
        Example(
            row=row,
            input_ids=ids,
            span_starts=np.array([1], np.int32),
            span_ends=np.array([len(ids)], np.int32),
            span_weights=np.ones(1, np.float32),
        )
        for row, ids in enumerate(documents)
    )
    return a, b, c


def _name(model: torch.nn.Module) -> str:
    return type(unwrapped(model)).__name__
