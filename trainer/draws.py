"""Dropout whose draws belong to a bin: the same whoever computes it, however many bins are computed at once.

torch draws for a whole row at once, so a token's draw hangs on what stands before it in the row. Here each bin's
part of the row is drawn by itself, keyed by (seed, step, bin, layer): cutting a step into other micro-steps, as
running out of memory does, or recomputing a layer in the backward pass, changes nothing. Of padded rows each
document is drawn by itself.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch

Row = Sequence[tuple[int, int]]
"""(seed, number of tokens) of each part of a row that is drawn by itself; padding may follow them."""

_current: tuple[Row, ...] = ()
"""The rows that are being computed; a process computes one batch at a time."""


@contextlib.contextmanager
def drawing_for(*rows: Row) -> Iterator[None]:
    """In here rows are computed that are made of these parts."""
    global _current
    before, _current = _current, rows
    try:
        yield
    finally:
        _current = before


def draw_seed(*key: int) -> int:
    """63 bits that hang on all of the key."""
    text = ":".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class BinDropout(torch.nn.Dropout):
    """In the place of a torch.nn.Dropout over the tokens of rows: [D, T, anything]; other inputs are torch's."""

    def __init__(self, p: float, number: int) -> None:
        super().__init__(p)
        self.number = number

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return input
        longest = max((sum(length for _, length in row) for row in _current), default=0)
        if input.dim() != 3 or len(input) != len(_current) or input.shape[1] < longest:
            return super().forward(input)
        return input * self._factors(input)

    def _factors(self, input: torch.Tensor) -> torch.Tensor:
        """0 or 1 / (1 - p) for each number of the rows; padding is left as it is."""
        factors = torch.ones_like(input)
        for number, row in enumerate(_current):
            start = 0
            for seed, length in row:
                generator = torch.Generator(input.device).manual_seed(draw_seed(seed, self.number))
                factors[number, start : start + length].bernoulli_(1 - self.p, generator=generator)
                start += length
            factors[number, :start] /= 1 - self.p
        return factors


def use_bin_dropout(model: torch.nn.Module) -> None:
    """Replace each torch.nn.Dropout that drops anything. Functions that drop inside attention are not reached."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Dropout and child.p > 0
    ]
    for number, (parent, name, child) in enumerate(found):
        setattr(parent, name, BinDropout(child.p, number).train(child.training))
