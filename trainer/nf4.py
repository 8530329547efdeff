"""A frozen linear layer in 4 bits: bitsandbytes' NF4 as two plain parameters, so that any strategy can cut it.

bitsandbytes keeps the scales of a weight in a QuantState beside its parameter, where no strategy sees them: 1.1 GB
that each GPU of a 70 B model would hold whole. Here `packed` (two weights a byte) and `absmax` (a scale for each 64)
are parameters like others. bitsandbytes packs and unpacks; LM head, embeddings and norms stay as they are.
Source: Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs (2023).
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from schemas.errors import InputError
from trainer.stand_ins import is_stand_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK_SIZE = 64
PACKED_MULTIPLE = 4
"""`packed` ends on a whole float32, so that it can be stored as such."""
MAX_FUSED_ROWS = 8
"""Generation, a token at a time: bitsandbytes multiplies so few rows without unpacking the whole weight."""


class NF4Linear(torch.nn.Linear):
    """A torch.nn.Linear to PEFT and transformers, computing in the dtype of its inputs.

    packed [about out x in / 2] uint8, or the same bytes as another dtype; absmax [out x in / 64] float32. Both are
    flat: wherever they are cut, the parts are equal but for a few bytes.
    """

    packed: torch.nn.Parameter
    absmax: torch.nn.Parameter

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        shape: tuple[int, int],
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        torch.nn.Module.__init__(self)  # Linear's own would make a weight
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.packed = torch.nn.Parameter(tensors["packed"], requires_grad=False)
        self.absmax = torch.nn.Parameter(tensors["absmax"], requires_grad=False)
        frozen = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """Unpacked anew each time, for those who ask a linear layer for its device, dtype or numbers.

        What is written into it is lost. PEFT's merging does so without an error: merge into the unquantised model.
        """
        if is_stand_in(self.packed):
            return torch.empty((), dtype=self.dtype).expand(self.shape)
        return unpacked(self.packed, self.absmax, self.shape, self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and x.is_cuda and x.numel() <= MAX_FUSED_ROWS * self.in_features:
            return _few_rows(self, x)
        output: torch.Tensor = _Product.apply(x, self.packed, self.absmax, self.bias, self.shape)
        return output


class _Product(torch.autograd.Function):
    """x W', the weight unpacked here and once more for the gradient: it is never kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        bias: torch.Tensor | None,
        shape: tuple[int, int],
    ) -> torch.Tensor:
        # The parameters themselves: a strategy that gathers them anew for the backward pass fills these.
        ctx.save_for_backward(packed, absmax)
        ctx.shape = shape
        return F.linear(x, unpacked(packed, absmax, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed, absmax = ctx.saved_tensors
        gradient = gradients[0]
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return gradient @ unpacked(packed, absmax, ctx.shape, gradient.dtype), None, None, None, None


def quantise(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """`packed` and `absmax` of a weight [out, in], on its device."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK_SIZE, quant_type="nf4")
    return {"packed": _flat(packed), "absmax": state.absmax}


def quantised_part(
    read: Callable[[int, int], torch.Tensor],
    shape: tuple[int, int],
    kept_bytes: tuple[int, int],
    kept_blocks: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """These bytes of `packed` and these elements of `absmax`; `read` gives a range of the flattened weight."""
    (first_byte, end_byte), (first_block, end_block) = kept_bytes, kept_blocks
    # All blocks of which the bytes or the scale are kept.
    start = min(first_byte * 2 // BLOCK_SIZE, first_block) * BLOCK_SIZE
    end = min(max(-(-end_byte * 2 // BLOCK_SIZE), end_block) * BLOCK_SIZE, math.prod(shape))
    weight = read(min(start, end), end)
    packed = torch.zeros(end_byte - first_byte, dtype=torch.uint8, device=weight.device)
    if not len(weight):
        return packed, torch.empty(0, device=weight.device)
    quantised = quantise(weight.view(1, -1))
    found = quantised["packed"][first_byte - start // 2 :][: len(packed)]
    packed[: len(found)] = found
    return packed, quantised["absmax"][first_block - start // BLOCK_SIZE :][: end_block - first_block]


def unpacked(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight [out, in] that the 4 bits stand for; in `out`, which lies in one piece, where it is given."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(_column(packed, shape), _state(absmax, shape, dtype), out=out)


def store_as(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """The same bytes under another name, for strategies that only cut some dtypes.

    Take float32: float kernels copy it bit by bit, while those for 16 bits may rewrite what is no number.
    """
    for layer in model.modules():
        if isinstance(layer, NF4Linear):
            layer.packed = torch.nn.Parameter(layer.packed.data.view(dtype), requires_grad=False)


def _few_rows(layer: NF4Linear, x: torch.Tensor) -> torch.Tensor:
    import bitsandbytes

    state = _state(layer.absmax, layer.shape, x.dtype)
    output: torch.Tensor = bitsandbytes.matmul_4bit(
        x, _column(layer.packed, layer.shape), bias=layer.bias, quant_state=state
    )
    return output


def _flat(packed: torch.Tensor) -> torch.Tensor:
    column = packed.view(torch.uint8).flatten()
    num_missing = -len(column) % PACKED_MULTIPLE
    # F.pad copies even where it adds nothing: a second copy of all the model's bytes, 3 GiB of a 7 B model.
    return F.pad(column, (0, num_missing)) if num_missing else column


def _column(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return packed.view(torch.uint8)[: math.ceil(math.prod(shape) / 2)].view(-1, 1)


def _state(absmax: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState

    return QuantState(
        absmax=absmax, shape=torch.Size(shape), blocksize=BLOCK_SIZE, quant_type="nf4", dtype=dtype
    )


# Whole models -----------------------------------------------------------------------------------------------


def take_over(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Put an NF4Linear in the place of each 4-bit layer of bitsandbytes; bytes stay where they are.

    Raises InputError for another kind of 4 bits, which a model folder may bring along.
    """
    from bitsandbytes.nn import Linear4bit

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            model.set_submodule(name, _from_bitsandbytes(name, layer, dtype))
    # To transformers and PEFT it is no model of bitsandbytes any more.
    for attribute in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(attribute, None)
    vars(model.config).pop("quantization_config", None)


def _from_bitsandbytes(name: str, layer: Any, dtype: torch.dtype) -> NF4Linear:
    state = layer.weight.quant_state
    if (state.quant_type, state.blocksize) != ("nf4", BLOCK_SIZE):
        raise InputError(
            f"{name} is held as {state.quant_type} in blocks of {state.blocksize}, expected nf4 in blocks of "
            f"{BLOCK_SIZE}: use the model's unquantised weights"
        )
    out_features, in_features = state.shape
    return NF4Linear(
        {"packed": _flat(layer.weight.data), "absmax": _absmax(state)},
        shape=(out_features, in_features),
        bias=layer.bias,
        dtype=dtype,
    )


def _absmax(state: Any) -> torch.Tensor:
    """Scales that are quantised themselves ("double quantisation") are unpacked, as bitsandbytes does it."""
    from bitsandbytes import functional

    if not state.nested:
        scales: torch.Tensor = state.absmax
        return scales
    return functional.dequantize_blockwise(state.absmax, state.state2).add_(state.offset).float()


def replace_linear_layers(model: "PreTrainedModel") -> None:
    """Empty NF4Linear layers in the place of those that bitsandbytes would quantise, to be filled piece by piece.

    For models on the meta device, whose weights are read tensor by tensor: `quantise` what belongs to one of them.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and is_quantised(model, name):
            model.set_submodule(name, _empty(layer))


def is_quantised(model: "PreTrainedModel", name: str) -> bool:
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return bool(should_convert_module(name, kept))


def _empty(layer: torch.nn.Linear) -> NF4Linear:
    num_weights, device = layer.weight.numel(), layer.weight.device
    num_bytes = math.ceil(num_weights / 2 / PACKED_MULTIPLE) * PACKED_MULTIPLE
    tensors = {
        "packed": torch.empty(num_bytes, dtype=torch.uint8, device=device),
        "absmax": torch.empty(math.ceil(num_weights / BLOCK_SIZE), dtype=torch.float32, device=device),
    }
    shape = (layer.out_features, layer.in_features)
    return NF4Linear(tensors, shape=shape, bias=layer.bias, dtype=layer.weight.dtype)
