"""The weight of a frozen linear layer as a product needs it, in whatever form it is held."""

import functools
from typing import Any

import torch

from trainer.fast.pointwise import has_triton
from trainer.int8_rows import Int8RowsLinear, dequantised
from trainer.nf4 import BLOCK_SIZE, NF4Linear, unpacked


def is_quantised(layer: torch.nn.Module) -> bool:
    """Whether it is one of our layers that hold bits in place of a weight."""
    return isinstance(layer, (NF4Linear, Int8RowsLinear))


def dense_weight_into(out: torch.Tensor, layer: Any) -> None:
    """Write the weight [out, in]; the rows of `out` may lie apart."""
    if isinstance(layer, Int8RowsLinear):
        _rows_into(out, layer)
    elif isinstance(layer, NF4Linear):
        _nf4_into(out, layer)
    else:
        out.copy_(layer.weight)


def _rows_into(out: torch.Tensor, layer: Int8RowsLinear) -> None:
    if not has_triton(out.device):
        dequantised(layer.rows, layer.scales, out.dtype, out=out)
        return
    from trainer.fast.triton_products import unpack_rows_into

    unpack_rows_into(out, layer.rows, layer.scales)


def _nf4_into(out: torch.Tensor, layer: NF4Linear) -> None:
    if not has_triton(out.device) or layer.in_features % BLOCK_SIZE:
        out.copy_(unpacked(layer.packed, layer.absmax, layer.shape, out.dtype))
        return
    from trainer.fast.triton_products import unpack_nf4_into

    unpack_nf4_into(out, layer.packed, layer.absmax, _nf4_code(out.device))


@functools.cache
def _nf4_code(device: torch.device) -> torch.Tensor:
    """The 16 values, as bitsandbytes has them."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device=device).float()
