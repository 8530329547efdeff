"""The state of a training as runs of numbers: what every strategy hands over, and takes back.

A shard of FSDP2, a fragment of ZeRO and a whole tensor are all runs of a tensor's numbers in row-major order. So a
checkpoint made of such runs knows nothing of the strategy that wrote it, and any other one reads the ranges that
it needs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch

from schemas.errors import TrainingError
from trainer.ranks import Ranks

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""fp32 master of a trained weight, and AdamW's two running means of its gradient."""
MOMENTS = KINDS[1:]
FURTHER_KINDS = ("average", "compensation", "momentum", "squares", "exp_avg_codes", "exp_avg_sq_codes")
"""As large as the weight, too: of weights that are averaged the average, and what other optimisers keep."""
SMALL_KINDS = (
    "exp_avg_scales",
    "exp_avg_sq_scales",
    "projection",
    "small_exp_avg",
    "small_exp_avg_sq",
    "update_norm",
    "weight_sum",
)
"""Of another number of numbers, and never cut."""
PIECE_ALIGNMENT = 8
"""Bytes: a multiple of any dtype's size."""

Shapes: TypeAlias = dict[str, torch.Size]


class Piece(NamedTuple):
    """Numbers [start, start + len(values)) of a flattened tensor; `values` is 1-D, on any device, and fp32 unless the
    optimiser keeps it otherwise.
    """

    kind: str
    name: str
    start: int
    values: torch.Tensor


ReadPiece: TypeAlias = Callable[[str, str, int, int], torch.Tensor | None]
"""(kind, name, start, end) -> [end - start] on the CPU, as it was handed over, the caller's own; None where a weight
was never updated and so has no such moment."""


def read_whole(read: ReadPiece, kind: str, name: str, shape: torch.Size) -> torch.Tensor | None:
    """A whole tensor in its shape."""
    found = read(kind, name, 0, shape.numel())
    return found.view(shape) if found is not None else None


def stored_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Room for a copy of each."""
    return sum(-(-tensor.nbytes // PIECE_ALIGNMENT) * PIECE_ALIGNMENT for tensor in tensors)


def own_names(names: Sequence[str], ranks: Ranks) -> Sequence[str]:
    """This rank's share of tensors that every rank holds whole: each is written once."""
    return names[ranks.number :: ranks.count]


def check_shapes(found: Shapes, expected: Shapes) -> None:
    """Raises TrainingError when the weights of a checkpoint are not those that are trained."""
    if odd := sorted(set(found) ^ set(expected)):
        raise TrainingError(
            f"the checkpoint holds {len(found)} trained weights, the model has {len(expected)}; first "
            f"difference {odd[0]}: it belongs to other settings, use a new run_root"
        )
    for name, shape in found.items():
        if shape != expected[name]:
            raise TrainingError(
                f"checkpointed {name} has shape {tuple(shape)}, expected {tuple(expected[name])}; it belongs to "
                "another model, use a new run_root"
            )
