"""Before the first step: do layers that are computed as one give what their own modules give, on this machine?"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.attention import unwrapped
from trainer.data import collate
from trainer.fast.taking import Taken, give_back
from trainer.loss import token_losses
from trainer.probe import MAX_GRADIENT_DIFFERENCE, MAX_LOSS_DIFFERENCE, probe_documents
from trainer.ranks import ALONE, Ranks
from trainer.stepping import is_out_of_memory

NOISE = 0.02
"""Adapters begin with B = 0, which hides what is wrong with A: for the comparison they get numbers of this size."""


def keep_if_right(
    model: torch.nn.Module,
    taken: Taken,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> str | None:
    """Compare losses and the gradient of all adapters; give the layers back where they differ, and say why.

    `taken` has no layers then. All ranks decide alike.
    """
    if not taken.layers:
        return None
    with _adapters_that_say_something(model):
        problem = _difference(model, taken, device, dtype)
    if not ranks.largest(int(problem is not None)):
        return None
    give_back(taken, checkpointing=taken.manner.keep != "none")
    taken.layers.clear()
    return problem or "they differ from the layers' own way on another rank"


def _difference(model: torch.nn.Module, taken: Taken, device: torch.device, dtype: torch.dtype) -> str | None:
    with taken.paused():
        expected_losses, expected = _losses_and_gradient(model, device)
    try:
        losses, gradient = _losses_and_gradient(model, device)
    except Exception as error:  # a compiler's, a kernel's: whatever it is, the layers' own way is there
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    loss_difference = float((losses - expected_losses).abs().mean())
    difference = float((gradient - expected).norm() / expected.norm())
    limits = MAX_LOSS_DIFFERENCE[dtype], MAX_GRADIENT_DIFFERENCE[dtype]
    if loss_difference <= limits[0] and difference <= limits[1]:
        return None
    return (
        f"computed as one, losses differ by {loss_difference:.4f} and gradients by {difference:.1%} of their norm, "
        f"expected at most {limits[0]} and {limits[1]:.0%}"
    )


def _losses_and_gradient(model: torch.nn.Module, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    first, second, _ = probe_documents(model)
    losses = token_losses(model, collate([first, second]).to(device))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    trained = [p for p in model.parameters() if p.requires_grad]
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained]
    model.zero_grad(set_to_none=True)
    return losses.detach().float(), torch.cat(parts).float()


@contextmanager
def _adapters_that_say_something(model: torch.nn.Module) -> Iterator[None]:
    named = unwrapped(model).named_parameters()
    weights = [weight for name, weight in named if ".lora_B." in name and weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    draws = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for weight in weights:
                weight.copy_(torch.randn(weight.shape, generator=draws) * NOISE)
        yield
    finally:
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)
