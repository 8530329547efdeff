"""Attention over packed documents, exact: a token sees the earlier tokens of its own document and nothing else.

One row holds many documents; `cu_seqlens` says where each begins. The borders travel as keyword arguments of
the model's forward, which transformers hands through to the attention function. The library's other ways
to pack are silently wrong in places: position ids alone need use_cache=False, and any 2-D mask turns them off.
"""

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from schemas.errors import RefusedError, TrainingError
from trainer.data import MicroBatch

PACKED_ATTENTION = "sft_packed"
PACKED_BY_DOCUMENT = "sft_packed_by_document"


def use_packed_attention(model: torch.nn.Module, *, by_document: bool | None = None) -> None:
    """Switch a model (or the model inside a PEFT wrapper) to packed attention. Raises RefusedError.

    `by_document` leaves the variable-length kernel out, for this model and from now on; None: as it was said before.
    """
    causal_lm: Any = unwrapped(model)
    if by_document is not None:
        causal_lm.packs_by_document = by_document
    is_so = getattr(causal_lm, "packs_by_document", False)
    _set_attention(model, PACKED_BY_DOCUMENT if is_so else PACKED_ATTENTION)


def use_plain_attention(model: torch.nn.Module) -> None:
    """Switch back to the library's own attention: for generation, caches and padded batches."""
    causal_lm = unwrapped(model)
    _set_attention(model, "sdpa" if causal_lm._supports_sdpa else "eager")


def packing_arguments(micro_batch: MicroBatch) -> dict[str, Any]:
    """Keyword arguments of the model's forward that carry the documents' borders."""
    return {
        "cu_seq_lens_q": micro_batch.cu_seqlens,
        "cu_seq_lens_k": micro_batch.cu_seqlens,
        "max_length_q": micro_batch.max_seqlen,
        "max_length_k": micro_batch.max_seqlen,
    }


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    by_document: bool = False,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function in transformers' shape.

    `query` is [1, heads, tokens, head size], `key` and `value` may have fewer heads (grouped queries);
    `cu_seq_lens_q` is int32 [documents + 1]. Returns [1, tokens, heads, head size]. `sliding_window` counts
    the tokens seen, the current one included. Raises TrainingError without borders, RefusedError for
    attention that this function does not compute.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise TrainingError(
            "packed attention was called without document borders; call use_plain_attention(model) before "
            "a forward pass that is not packed"
        )
    _refuse_unknown(module, attention_mask, others)
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    if not by_document and softcap is None and dropout == 0.0 and _varlen_fits(query, value):
        output = _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling=scaling, window=window)
        return output, None
    pieces = [
        _one_document(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            scaling=scaling,
            dropout=dropout,
            window=window,
            softcap=softcap,
        )
        for start, end in _borders(cu_seq_lens_q)
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def unwrapped(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of a PEFT wrapper."""
    inner: Any = model
    if hasattr(model, "get_base_model"):
        inner = inner.get_base_model()
    assert isinstance(inner, PreTrainedModel), type(inner)
    return inner


def _set_attention(model: torch.nn.Module, name: str) -> None:
    causal_lm = unwrapped(model)
    causal_lm.set_attn_implementation(name)
    if causal_lm.config._attn_implementation != name:
        raise RefusedError(
            f"{type(causal_lm).__name__} does not let its attention be replaced, so packed training would mix "
            "documents; use a model whose attention goes through transformers' AttentionInterface"
        )


def _refuse_unknown(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, others: dict[str, Any]
) -> None:
    extra = sorted(name for name in ("s_aux", "position_bias", "head_mask") if others.get(name) is not None)
    if attention_mask is not None:
        extra.append("attention_mask")
    if not (others.get("is_causal", True) and getattr(module, "is_causal", True)):
        extra.append("not causal")
    if extra:
        raise RefusedError(
            f"{type(module).__name__} asks for {', '.join(extra)}, which packed attention does not compute; "
            "use a causal model without it"
        )


def _borders(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    borders = cu_seqlens.tolist()
    return [(start, end) for start, end in itertools.pairwise(borders) if end > start]


# One document at a time: CPUs, fp32 and GPUs before compute capability 8.0 ------------------------------------


def _one_document(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    length = query.shape[2]
    if softcap is not None:
        return _softcapped(query, key, value, scaling=scaling, dropout=dropout, window=window, cap=softcap)
    mask = _window_mask(length, window, query.device) if window is not None and length > window else None
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
    )


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [length, length], True where position i may look at position j."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    dropout: float,
    window: int | None,
    cap: float,
) -> torch.Tensor:
    # Gemma 2 caps scores by cap * tanh(score / cap), which no fused kernel of torch computes.
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * scale / cap) * cap
    mask = _window_mask(query.shape[2], window, query.device)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


# The variable-length kernel: compute capability 8.0 and newer ---------------------------------------------------


@functools.cache
def _varlen_kernel() -> tuple[Callable[..., Any], frozenset[str]] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@functools.cache
def _has_tensor_cores_of_sm80(device_index: int) -> bool:
    return torch.cuda.get_device_capability(device_index) >= (8, 0)


@functools.cache
def _takes_fewer_key_heads(device: torch.device) -> bool:
    """torch 2.11's kernel has no flag for grouped queries. Where it computes them all the same, keys and values
    need not be copied: tried once, gradients too.
    """
    kernel = _varlen_kernel()
    assert kernel is not None
    draws = torch.Generator(device).manual_seed(0)
    shapes = ((16, 4, 64), (16, 2, 64), (16, 2, 64))
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "generator": draws}
    inputs = [torch.randn(*shape, **options).requires_grad_() for shape in shapes]
    borders = torch.tensor([0, 7, 16], dtype=torch.int32, device=device)

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
        output = kernel[0](query, key, value, borders, borders, 9, 9)
        return [output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)]

    try:
        with torch.enable_grad():
            found = run(*inputs)
            expected = run(inputs[0], *(tensor.repeat_interleave(2, dim=1) for tensor in inputs[1:]))
    except (RuntimeError, ValueError):  # refused, by the kernel or before it
        return False
    return all(
        float((ours - right).float().norm()) <= 0.02 * float(right.float().norm())
        for ours, right in zip(found, expected, strict=True)
    )


def _varlen_fits(query: torch.Tensor, value: torch.Tensor) -> bool:
    head_size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_size == value.shape[-1]
        and head_size % 8 == 0
        and head_size <= 256
        and _varlen_kernel() is not None
        and _has_tensor_cores_of_sm80(query.device.index or 0)
    )


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    kernel = _varlen_kernel()
    assert kernel is not None
    varlen_attn, parameters = kernel
    # Rows may lie apart, as parts of one product's output do: the kernel asks for adjacent numbers in a head alone.
    query, key, value = (
        tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        for tensor in (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    )
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in parameters:  # torch 2.13
            options["enable_gqa"] = True
        elif not _takes_fewer_key_heads(query.device):
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if "window_size" in parameters:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        options["is_causal"] = True  # torch 2.10
    else:
        raise RefusedError("sliding windows need torch 2.11 or newer; update torch")
    if "scale" in parameters:
        options["scale"] = scaling
    elif scaling is not None:
        query = query * (scaling * query.shape[-1] ** 0.5)  # the kernel divides by sqrt(head size)
    output = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return output.unsqueeze(0)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionInterface.register(PACKED_BY_DOCUMENT, functools.partial(packed_attention, by_document=True))
# Nothing is registered for masks, on purpose: for a name without a mask function the models build no mask, and
# don't search the positions for borders either, which would wait for the GPU in each forward pass.
