"""What products.py needs beside products, as Triton kernels: copies of adapters, and weights out of their bits.

Each writes rows that lie apart, so that a weight and its adapters stand side by side in one matrix.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernels are typed by what they are called with.

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

COLUMNS = 2048
NUMBERS = 4096
NF4_BLOCK = 64


# Adapters ---------------------------------------------------------------------------------------------------


class Copy(NamedTuple):
    """target = source x factor: addresses, form, and how far the target's rows lie apart."""

    source: int
    target: int
    num_rows: int
    num_columns: int
    target_row: int
    factor: float


def copy_of(source: torch.Tensor, target: torch.Tensor, factor: float) -> Copy:
    assert source.is_contiguous()
    assert target.stride(1) == 1
    num_rows, num_columns = target.shape
    return Copy(source.data_ptr(), target.data_ptr(), num_rows, num_columns, target.stride(0), factor)


def copy_all(copies: tuple[Copy, ...], like: torch.Tensor) -> None:
    """All of one dtype and on one device, those of `like`."""
    table, factors, most = _table(copies, like.device)
    _copy_all[(len(copies), triton.cdiv(most, NUMBERS))](table, factors, like, block=NUMBERS, num_warps=4)


@functools.lru_cache(maxsize=4)
def _table(copies: tuple[Copy, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
    """They are the same in each step."""
    table = torch.tensor([copy[:-1] for copy in copies], dtype=torch.int64, device=device)
    factors = torch.tensor([copy.factor for copy in copies], dtype=torch.float32, device=device)
    return table, factors, max(copy.num_rows * copy.num_columns for copy in copies)


@triton.jit
def _copy_all(table, factors, like, block: tl.constexpr):
    entry = table + tl.program_id(0) * 5
    source = tl.load(entry).to(like.dtype)
    target = tl.load(entry + 1).to(like.dtype)
    num_rows, num_columns, target_row = tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)
    places = tl.program_id(1) * block + tl.arange(0, block)
    mask = places < num_rows * num_columns
    values = tl.load(source + places, mask=mask).to(tl.float32) * tl.load(factors + tl.program_id(0))
    tl.store(target + (places // num_columns) * target_row + places % num_columns, values, mask=mask)


# Bits -------------------------------------------------------------------------------------------------------


def unpack_rows_into(out: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor) -> None:
    """rows int8 [out, in] x scales float32 [out, 1], rounded once."""
    num_rows, size = rows.shape
    _unpack_rows[(num_rows, triton.cdiv(size, COLUMNS))](
        out, rows, scales, out.stride(0), size, block=COLUMNS, num_warps=4
    )


@triton.jit
def _unpack_rows(out, rows, scales, out_row, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * block + tl.arange(0, block)
    mask = places < size
    values = tl.load(rows + row * size + places, mask=mask, other=0).to(tl.float32) * tl.load(scales + row)
    tl.store(out + row * out_row + places, values, mask=mask)


def unpack_nf4_into(
    out: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor
) -> None:
    """packed: two weights a byte, the first in its upper half, row after row; absmax: of each 64 of them; code [16].

    A row holds a multiple of 64 weights.
    """
    num_rows, size = out.shape
    _unpack_nf4[(num_rows, triton.cdiv(size, COLUMNS))](
        out, packed.view(torch.uint8), absmax, code, out.stride(0), size, block=COLUMNS, num_warps=4
    )


@triton.jit
def _unpack_nf4(out, packed, absmax, code, out_row, size, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * block
    pairs = start // 2 + tl.arange(0, block // 2)
    mask = pairs < size // 2
    bits = tl.load(packed + row * (size // 2) + pairs, mask=mask, other=0).to(tl.int32)
    scale = tl.load(absmax + (row * size + pairs * 2) // 64, mask=mask, other=0.0)
    first = tl.load(code + (bits >> 4)) * scale
    second = tl.load(code + (bits & 15)) * scale
    places = start + tl.arange(0, block)
    tl.store(out + row * out_row + places, tl.interleave(first, second), mask=places < size)
