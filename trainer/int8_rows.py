"""A frozen linear layer in 8 bits: each row of the weight as int8 and one scale, activations left as they are.

LLM.int8 rounds weights the same way, but it rounds the activations too, for the sake of an 8-bit product, and puts
large columns aside; that product is slower than one in 16 bits and its error several times larger. Here the weight is
turned back into 16 bits just before each product, and not kept.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from trainer.stand_ins import is_stand_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 127


class Int8RowsLinear(torch.nn.Linear):
    """A torch.nn.Linear to PEFT and transformers, computing in the dtype of its inputs.

    rows int8 [out, in]; scales float32 [out, 1]: the weight is rows * scales.
    """

    rows: torch.nn.Parameter
    scales: torch.nn.Parameter

    def __init__(
        self, rows: torch.Tensor, scales: torch.Tensor, *, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        torch.nn.Module.__init__(self)  # Linear's own would make a weight
        self.out_features, self.in_features = rows.shape
        self.dtype = dtype
        self.rows = torch.nn.Parameter(rows, requires_grad=False)
        self.scales = torch.nn.Parameter(scales, requires_grad=False)
        frozen = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Computed anew each time, for those who ask a linear layer for its device, dtype or numbers."""
        if is_stand_in(self.rows):
            return torch.empty((), dtype=self.dtype).expand(self.out_features, self.in_features)
        return dequantised(self.rows, self.scales, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _Product.apply(x, self.rows, self.scales, self.bias)
        return output


class _Product(torch.autograd.Function):
    """x W', the weight computed here and once more for the gradient: it is never kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, scales)
        return F.linear(x, dequantised(rows, scales, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, scales = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return gradients[0] @ dequantised(rows, scales, gradients[0].dtype), None, None, None


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` and `scales` of a weight [out, in]: the largest number of a row becomes 127."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (wide / scales).round().to(torch.int8), scales


def dequantised(
    rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """rows * scales, rounded once."""
    out = torch.empty(rows.shape, dtype=dtype, device=rows.device) if out is None else out
    return torch.mul(rows, scales, out=out)  # one kernel: no fp32 copy of the weight is made


def take_over(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Put an Int8RowsLinear in the place of each 8-bit layer of bitsandbytes, whose rows are rounded the same way."""
    from bitsandbytes.nn import Linear8bitLt

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear8bitLt):
            model.set_submodule(name, _from_bitsandbytes(layer, dtype))
    # To transformers and PEFT it is no model of bitsandbytes any more.
    for attribute in ("is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(attribute, None)
    vars(model.config).pop("quantization_config", None)


def _from_bitsandbytes(layer: Any, dtype: torch.dtype) -> Int8RowsLinear:
    scales = layer.weight.SCB.float().view(-1, 1) / LARGEST
    return Int8RowsLinear(layer.weight.data, scales, bias=layer.bias, dtype=dtype)
