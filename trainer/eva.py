"""EVA: the first matrices of LoRA are the leading directions of what flows into the layers, seen on training data.

The directions in which a layer's inputs vary most are found by subspace iteration: the rows are seen anew in each
pass, and a layer keeps a few vectors, never its inputs or their products. A layer whose inputs vary in few directions
gets a low rank and leaves the rest to others. Source: Paischer et al., Parameter Efficient Fine-tuning via Explained
Variance Adaptation (2024).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from schemas.errors import TrainingError

NUM_PASSES = 4
OVERSAMPLING = 8


@dataclass(slots=True)
class _Seen:
    """Of one layer: [in, width] orthonormal vectors, and sums over the rows of a pass."""

    basis: torch.Tensor
    product: torch.Tensor = field(init=False)
    total: torch.Tensor = field(init=False)
    squares: torch.Tensor = field(init=False)
    num_rows: int = 0

    def begin_pass(self) -> None:
        self.product = torch.zeros_like(self.basis)
        self.total = self.basis.new_zeros(len(self.basis))
        self.squares = self.basis.new_zeros(())
        self.num_rows = 0

    def add(self, rows: torch.Tensor) -> None:
        self.product += rows.T @ (rows @ self.basis)
        self.total += rows.sum(dim=0)
        self.squares += rows.square().sum()
        self.num_rows += len(rows)

    def spread(self) -> torch.Tensor:
        """Covariance of the rows, times their number, times the basis: [in, width]."""
        return self.product - torch.outer(self.total, self.total @ self.basis) / self.num_rows

    def variance(self) -> torch.Tensor:
        """Of all numbers of a row together, times the number of rows."""
        return self.squares - self.total.square().sum() / self.num_rows


@dataclass(frozen=True, slots=True)
class Directions:
    """Of one layer's inputs: [k, in] orthonormal, and what share of their variance each explains, falling."""

    vectors: torch.Tensor
    shares: torch.Tensor


@torch.no_grad()
def leading_directions(
    layers: Mapping[str, torch.nn.Linear], passes: Callable[[], Iterable[object]], *, num: int
) -> dict[str, Directions]:
    """Up to `num` of each layer, while each item of `passes()` stands for a forward pass that it has just run.

    Raises TrainingError when fewer rows than that flow through.
    """
    seen = {name: _Seen(_random_basis(layer, num + OVERSAMPLING)) for name, layer in layers.items()}
    for last in range(NUM_PASSES - 1, -1, -1):
        for one in seen.values():
            one.begin_pass()
        with _looking(layers, seen):
            for _ in passes():
                pass
        for name, one in seen.items():
            if one.num_rows <= num:
                raise TrainingError(
                    f"{one.num_rows} tokens flow through {name}, which can't show {num} directions; raise "
                    "train.lora.eva_bins"
                )
            if last:
                one.basis = torch.linalg.qr(one.spread()).Q
    return {name: _directions(one, num) for name, one in seen.items()}


def shared_ranks(shares: Mapping[str, torch.Tensor], rank: int) -> dict[str, int]:
    """As many directions as there would be if all layers had `rank`: those that explain most, wherever they are."""
    all_shares = [
        (-share, name, place) for name, layer in shares.items() for place, share in enumerate(layer.tolist())
    ]
    ranks = dict.fromkeys(shares, 0)
    for _, name, _ in sorted(all_shares)[: rank * len(shares)]:
        ranks[name] += 1
    return ranks


def _random_basis(layer: torch.nn.Linear, width: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    columns = torch.randn(layer.in_features, min(width, layer.in_features), generator=draws)
    return torch.linalg.qr(columns.to(layer.weight.device)).Q


def _directions(seen: _Seen, num: int) -> Directions:
    # The variance inside of the subspace, by its own axes.
    values, axes = torch.linalg.eigh(seen.basis.T @ seen.spread())
    vectors = (seen.basis @ axes).T.flip(0)[:num]
    return Directions(vectors, (values.flip(0)[:num] / seen.variance()).clamp(min=0.0).cpu())


@contextmanager
def _looking(layers: Mapping[str, torch.nn.Linear], seen: Mapping[str, _Seen]) -> Iterator[None]:
    def look_at(one: _Seen) -> Callable[..., None]:
        def look(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            one.add(inputs[0].flatten(0, -2).float())

        return look

    handles = [layer.register_forward_pre_hook(look_at(seen[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
