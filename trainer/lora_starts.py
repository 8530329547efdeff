"""First values of LoRA's two matrices out of a weight: PiSSA, OLoRA, and LoftQ's for what quantising has lost.

Each takes a matrix [out, in] in fp32, the rank, and by what the product will be scaled, and returns A [rank, in] and
B [out, rank]. Sources: Meng et al., PiSSA (2024); Buyukakyuz, OLoRA (2024); Li et al., LoftQ (2023), its step without
requantising.
"""

from collections.abc import Callable

import torch

Matrices = tuple[torch.Tensor, torch.Tensor]
MAX_EXACT_SIZE = 1024
"""Up to so many rows or columns the singular values are computed all: 0.4 s of a CPU core, and eight times that for
each doubling. By iteration 4,096 x 4,096 takes as long as that."""
OVERSAMPLING = 16
NUM_ITERATIONS = 8


def leading(matrix: torch.Tensor, rank: int, scaling: float) -> Matrices:
    """The best approximation of that rank, cut evenly between the two."""
    left, values, right = _leading_singular(matrix, rank)
    roots = (values / scaling).sqrt()
    return roots[:, None] * right, left * roots


def orthogonal(matrix: torch.Tensor, rank: int, scaling: float) -> Matrices:
    """The first columns of Q and rows of R of the matrix. OLoRA scales them as they are."""
    columns, rows = torch.linalg.qr(matrix)
    return rows[:rank], columns[:, :rank]


STARTS: dict[str, Callable[[torch.Tensor, int, float], Matrices]] = {
    "pissa": leading,
    "olora": orthogonal,
    "loftq": leading,
}


def _leading_singular(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left vectors [out, rank], values [rank], right vectors [rank, in]."""
    if min(matrix.shape) <= MAX_EXACT_SIZE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    # Subspace iteration. torch.svd_lowrank does the same, but draws from the random state of the process.
    draws = torch.Generator().manual_seed(0)
    width = min(rank + OVERSAMPLING, *matrix.shape)
    basis = _orthonormal(matrix @ torch.randn(matrix.shape[1], width, generator=draws).to(matrix))
    for _ in range(NUM_ITERATIONS):
        basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(matrix).Q
