"""The weight of a frozen linear layer as a product needs it, in whatever form it is held."""

from typing import Any

import torch

from trainer.int8_rows import Int8RowsLinear, dequantised
from trainer.nf4 import NF4Linear, unpacked


def is_quantised(layer: torch.nn.Module) -> bool:
    """Whether it is one of our layers that hold bits in place of a weight."""
    return isinstance(layer, (NF4Linear, Int8RowsLinear))


def dense_weight(layer: Any, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """[out, in] in this dtype; of a quantised layer computed anew, into `out` where it is given."""
    if isinstance(layer, NF4Linear):
        return unpacked(layer.packed, layer.absmax, layer.shape, dtype, out=out)
    if isinstance(layer, Int8RowsLinear):
        return dequantised(layer.rows, layer.scales, dtype, out=out)
    weight: torch.Tensor = layer.weight
    return weight if out is None else out.copy_(weight)
