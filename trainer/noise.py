"""NEFTune: noise on the embeddings while training, smaller the longer a document is.

Uniform in +- alpha / sqrt(L d), L the length of the token's own document and not of the row that it is packed into, d
the hidden size. Drawn bin by bin as dropout is (trainer/draws.py), so that neither the cut of a step nor a resume
changes it. Source: Jain et al., NEFTune: Noisy Embeddings Improve Instruction Finetuning (2023).
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence

import torch

from trainer.attention import unwrapped
from trainer.draws import draw_seed

NOISE_NUMBER = -1
"""In the key of its draws, where dropout has the number of its layer."""

NoisyBin = tuple[int, Sequence[int]]
"""Seed of a bin, and the lengths of its documents in their order."""

_current: tuple[Sequence[NoisyBin], ...] = ()
"""Bins of each row that is being computed; a process computes one batch at a time."""


@contextlib.contextmanager
def noise_for(*rows: Sequence[NoisyBin]) -> Iterator[None]:
    """In here rows are computed that are made of these bins; padding may follow them. Elsewhere there is no noise."""
    global _current
    before, _current = _current, rows
    try:
        yield
    finally:
        _current = before


def use_noise(model: torch.nn.Module, alpha: float) -> None:
    """From now on, in training mode."""
    embeddings = unwrapped(model).get_input_embeddings()
    embeddings.register_forward_hook(functools.partial(_with_noise, alpha))


def _with_noise(alpha: float, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    if not module.training or not _current:
        return output
    noise = torch.zeros_like(output)
    for row, bins in zip(noise, _current, strict=True):
        start = 0
        for seed, lengths in bins:
            part = row[start : start + sum(lengths)]
            generator = torch.Generator(part.device).manual_seed(draw_seed(seed, NOISE_NUMBER))
            part.uniform_(-1, 1, generator=generator)
            for length, document in zip(lengths, part.split(list(lengths)), strict=True):
                document *= alpha / math.sqrt(max(length, 1) * output.shape[-1])
            start += len(part)
    return output + noise
