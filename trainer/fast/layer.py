"""A decoder layer's forward and backward passes, written out, and what is kept in between.

    mid = x + o(attention(rotate(qkv(norm(x)))))          Gemma norms o's and down's outputs too
    y   = mid + down(activation(gate) * up),  gate and up of norm(mid)

`none` keeps all that is computed. `selective` keeps x, what attention returns, and gate and up: the rest is norms,
rotations and activations, and the products of qkv and o, 16 % of a layer's work over Llama's 8B shape.
`full` keeps x alone. Products come from products.py, sums of single numbers from pointwise.py; attention is a function
of transformers' kind with a gradient of its own.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from trainer.fast.offload import CheckpointOffload
from trainer.fast.pointwise import Activation, Pointwise
from trainer.fast.products import (
    Group,
    fill_low,
    gradients,
    halves,
    product,
    refresh,
    room_for_gradient,
    room_for_input,
)

Keep = Literal["none", "selective", "full"]
"""What is not kept, as train.gradient_checkpointing names it."""


class Norm(NamedTuple):
    weight: torch.Tensor
    eps: float
    is_offset: bool


class Heads(NamedTuple):
    queries: int
    keys: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class FastLayer:
    """All that a layer's passes need. `number` is its place in the model, from 0."""

    number: int
    attention: torch.nn.Module
    """The module that the attention function is told of."""
    heads: Heads
    scaling: float
    window: int | None
    activation: Activation
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    before_attention: Norm
    before_mlp: Norm
    after_attention: Norm | None = None
    after_mlp: Norm | None = None
    of_queries: Norm | None = None
    of_keys: Norm | None = None
    also_refreshed: list[Group] = field(default_factory=list)
    """Of the first layer: the groups of all others, so that their adapters are copied in at once."""

    @property
    def groups(self) -> tuple[Group, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def adapters(self) -> list[torch.nn.Parameter]:
        return [weight for group in self.groups for weight in group.adapters()]


@dataclass(frozen=True, slots=True, eq=False)
class Manner:
    """How all layers of a model are computed."""

    pointwise: Pointwise
    keep: Keep = "none"
    mlp_tokens: int | None = None
    """The MLP runs over so many tokens at a time, and keeps none of it."""
    offload: CheckpointOffload | None = None


class Row(NamedTuple):
    """What the layers of one forward pass share."""

    cos: torch.Tensor
    sin: torch.Tensor
    attend: Callable[..., tuple[torch.Tensor, Any]]
    borders: dict[str, Any]


def run_layer(layer: FastLayer, manner: Manner, hidden: torch.Tensor, row: Row) -> torch.Tensor:
    """[T, K] -> [T, K], differentiable in `hidden` and in the layer's adapters."""
    refresh((*layer.groups, *layer.also_refreshed))
    if not torch.is_grad_enabled():
        mid, _ = attention_half(layer, manner, hidden, row, "full")
        return mlp_half(layer, manner, mid, "full")[0]
    output: torch.Tensor = _Layer.apply(hidden, layer, manner, row, *layer.adapters())
    return output


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        layer: FastLayer,
        manner: Manner,
        row: Row,
        *adapters: torch.Tensor,
    ) -> torch.Tensor:
        mid, attended = attention_half(layer, manner, hidden, row, manner.keep)
        output, mlp = mlp_half(layer, manner, mid, manner.keep)
        ctx.layer, ctx.manner, ctx.row, ctx.attended, ctx.mlp = layer, manner, row, attended, mlp
        _save(ctx, hidden, mid if manner.keep == "none" else None)
        return output

    @staticmethod
    def backward(ctx: Any, *output_gradients: torch.Tensor) -> tuple[Any, ...]:
        layer, manner, row = ctx.layer, ctx.manner, ctx.row
        hidden, mid = _saved(ctx)
        attended, mlp = ctx.attended, ctx.mlp
        ctx.attended = ctx.mlp = None
        if attended is None:
            mid, attended = attention_half(layer, manner, hidden, row, "none")
        elif mid is None:
            mid = _mid(layer, manner, hidden, attended)
        mid_gradient, of_mlp = mlp_backward(layer, manner, mid, mlp, output_gradients[0])
        del mid, mlp
        of_hidden, of_attention = attention_backward(
            layer, manner, hidden, row, attended, mid_gradient, needs_input=ctx.needs_input_grad[0]
        )
        return of_hidden, None, None, None, *of_attention, *of_mlp


def _save(ctx: Any, hidden: torch.Tensor, mid: torch.Tensor | None) -> None:
    offload = ctx.manner.offload
    ctx.ticket = offload.put(ctx.layer.number, hidden) if offload is not None else None
    ctx.save_for_backward(hidden if offload is None else None, mid)


def _saved(ctx: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    hidden, mid = ctx.saved_tensors
    return (hidden if ctx.ticket is None else ctx.manner.offload.take(ctx.ticket)), mid


# Attention --------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Attended:
    """What is kept of the first half. Without `wide` and `raw`, they are computed again from the layer's input."""

    output: torch.Tensor
    """[T, heads x size], with the graph of the attention function behind it."""
    inlet: "Inlet"
    wide: torch.Tensor | None = None
    """[norm(x) | low], the input of q, k and v."""
    reciprocal: torch.Tensor | None = None
    raw: torch.Tensor | None = None
    """q, k and v before their norms; of families that have these."""


def attention_half(
    layer: FastLayer, manner: Manner, hidden: torch.Tensor, row: Row, keep: Keep
) -> tuple[torch.Tensor, Attended | None]:
    wide, reciprocal = _normed(manner, layer.qkv, layer.before_attention, hidden)
    raw = product(layer.qkv, wide)
    heads = _rotated_heads(layer, manner, raw, row)
    has_raw = layer.of_queries is not None
    if keep == "full":
        output, _ = _attend(layer, row, heads)
        attended = Attended(output, Inlet())
    elif keep == "selective":
        attended = _attend_with_graph(layer, row, heads, drop_inputs=True)
    else:
        attended = _attend_with_graph(layer, row, heads, drop_inputs=False)
        attended.wide, attended.reciprocal = wide, reciprocal
        attended.raw = raw if has_raw else None
    del wide, raw, heads
    mid = _mid(layer, manner, hidden, attended)
    return mid, None if keep == "full" else attended


def _normed(
    manner: Manner, group: Group, norm: Norm, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[norm(x) | low], and the reciprocal of the norm."""
    wide = room_for_input(group, len(hidden))
    reciprocal = manner.pointwise.norm_into(wide[:, : group.num_in], hidden, *norm)
    return fill_low(group, wide), reciprocal


def _mid(layer: FastLayer, manner: Manner, hidden: torch.Tensor, attended: Attended) -> torch.Tensor:
    wide = _wide_of_output(layer, manner, attended)
    if layer.after_attention is None:
        return product(layer.o, wide, residual=hidden)
    return _normed_sum(manner, product(layer.o, wide), layer.after_attention, hidden)


def _wide_of_output(layer: FastLayer, manner: Manner, attended: Attended) -> torch.Tensor:
    wide = room_for_input(layer.o, len(attended.output))
    manner.pointwise.copy_into(wide[:, : layer.o.num_in], attended.output.detach())
    return fill_low(layer.o, wide)


def _normed_sum(manner: Manner, output: torch.Tensor, norm: Norm, residual: torch.Tensor) -> torch.Tensor:
    normed = torch.empty_like(output)
    manner.pointwise.norm_into(normed, output, *norm)
    return normed.add_(residual)


def _rotated_heads(
    layer: FastLayer, manner: Manner, raw: torch.Tensor, row: Row
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [T, heads, size]. Where nothing else reads `raw`, they are turned in their places in it."""
    queries, keys, values = _split_heads(layer.heads, raw)
    turned = [_heads_of(raw, 0, layer.heads.queries + layer.heads.keys, layer.heads.size)]
    if layer.of_queries is not None and layer.of_keys is not None:
        queries = _normed_heads(manner, queries, layer.of_queries)
        keys = _normed_heads(manner, keys, layer.of_keys)
        turned = [queries, keys]
    for heads in turned:
        manner.pointwise.rotate_into(heads, heads, row.cos, row.sin)
    return queries, keys, values


def _split_heads(heads: Heads, raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
    counts = (heads.queries, heads.keys, heads.keys)
    starts = (0, heads.queries, heads.queries + heads.keys)
    return tuple(
        _heads_of(raw, start, count, heads.size) for start, count in zip(starts, counts, strict=True)
    )


def _heads_of(raw: torch.Tensor, start: int, count: int, size: int) -> torch.Tensor:
    return raw[:, start * size : (start + count) * size].unflatten(1, (count, size))


def _normed_heads(manner: Manner, heads: torch.Tensor, norm: Norm) -> torch.Tensor:
    normed = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    manner.pointwise.norm_into(normed, heads, *norm)
    return normed


def _attend(layer: FastLayer, row: Row, heads: Iterable[torch.Tensor]) -> tuple[torch.Tensor, Any]:
    output, others = row.attend(
        layer.attention,
        *(part.transpose(0, 1)[None] for part in heads),
        None,
        scaling=layer.scaling,
        sliding_window=layer.window,
        **row.borders,
    )
    return output[0].flatten(1), others


def attention_backward(
    layer: FastLayer,
    manner: Manner,
    hidden: torch.Tensor,
    row: Row,
    attended: Attended,
    mid_gradient: torch.Tensor,
    *,
    needs_input: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Gradient of the layer's input, and of the adapters of q, k, v and o."""
    of_output, of_o = _output_backward(layer, manner, attended, mid_gradient)
    wide, reciprocal, raw = attended.wide, attended.reciprocal, attended.raw
    if wide is None or reciprocal is None:
        wide, reciprocal = _normed(manner, layer.qkv, layer.before_attention, hidden)
        raw = product(layer.qkv, wide)
        attended.inlet.heads = _rotated_heads(layer, manner, raw, row)
    with torch.enable_grad():
        torch.autograd.backward(attended.output, of_output)
    room = _unrotated(layer, manner, attended.inlet.take_gradients(), raw, row)
    of_normed, of_qkv = gradients(layer.qkv, room, *halves(layer.qkv, wide), needs_input=needs_input)
    if of_normed is None:
        return None, [*of_qkv, *of_o]
    norm = layer.before_attention
    # The layer before this one, most likely of the same form, needs it with room for its `down`.
    of_hidden = room_for_gradient(layer.down, len(hidden))[:, : layer.down.num_out]
    manner.pointwise.norm_backward_into(
        of_hidden, of_normed, hidden, reciprocal, norm.weight, norm.is_offset, mid_gradient
    )
    return of_hidden, [*of_qkv, *of_o]


def _output_backward(
    layer: FastLayer, manner: Manner, attended: Attended, mid_gradient: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    gradient, x = mid_gradient, attended.output.detach()
    if layer.after_attention is not None:
        output = product(layer.o, _wide_of_output(layer, manner, attended))
        gradient = _normed_sum_backward(manner, output, layer.after_attention, mid_gradient)
    room = _with_room(manner, layer.o, gradient)
    of_output, of_adapters = gradients(layer.o, room, x, x @ layer.o.down.T)
    assert of_output is not None
    return of_output, of_adapters


def _normed_sum_backward(
    manner: Manner, output: torch.Tensor, norm: Norm, gradient: torch.Tensor
) -> torch.Tensor:
    reciprocal = manner.pointwise.norm_into(torch.empty_like(output), output, *norm)
    found = torch.empty_like(output)
    manner.pointwise.norm_backward_into(found, gradient, output, reciprocal, norm.weight, norm.is_offset)
    return found


def _with_room(manner: Manner, group: Group, gradient: torch.Tensor) -> torch.Tensor:
    """`gradient` with room beside it: the room that it was written into, or a copy."""
    whole = gradient._base
    shape = (len(gradient), group.num_out + group.num_columns)
    if whole is not None and whole.shape == shape and gradient.data_ptr() == whole.data_ptr():
        return whole
    room = room_for_gradient(group, len(gradient))
    manner.pointwise.copy_into(room[:, : group.num_out], gradient)
    return room


def _unrotated(
    layer: FastLayer,
    manner: Manner,
    of_heads: tuple[torch.Tensor, ...],
    raw: torch.Tensor | None,
    row: Row,
) -> torch.Tensor:
    """Gradients of q, k and v as the product gave them, with room beside them."""
    room = room_for_gradient(layer.qkv, len(of_heads[0]))
    places = _split_heads(layer.heads, room[:, : layer.qkv.num_out])
    before = (None,) * 2 if raw is None else _split_heads(layer.heads, raw)[:2]
    norms = (layer.of_queries, layer.of_keys)
    for place, gradient, heads, norm in zip(places, of_heads[:2], before, norms, strict=False):
        if norm is None:
            manner.pointwise.unrotate_into(place, gradient, row.cos, row.sin)
        else:
            assert heads is not None
            manner.pointwise.unrotate_into(gradient, gradient, row.cos, row.sin)
            _normed_heads_backward(manner, place, gradient, heads, norm)
    manner.pointwise.copy_into(places[2].flatten(1), of_heads[2].flatten(1))
    return room


def _normed_heads_backward(
    manner: Manner, out: torch.Tensor, gradient: torch.Tensor, heads: torch.Tensor, norm: Norm
) -> None:
    normed = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    reciprocal = manner.pointwise.norm_into(normed, heads, *norm)
    manner.pointwise.norm_backward_into(out, gradient, heads, reciprocal, norm.weight, norm.is_offset)


# The attention function with a graph of its own ---------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Inlet:
    """Where q, k and v enter the attention function: their gradients arrive here.

    With `heads` the function's saved tensors are rebuilt from them: they were dropped.
    """

    heads: tuple[torch.Tensor, ...] | None = None
    gradients: tuple[torch.Tensor, ...] | None = None

    def take_gradients(self) -> tuple[torch.Tensor, ...]:
        found, self.gradients, self.heads = self.gradients, None, None
        assert found is not None, "attention has given no gradient"
        return found


class _Enter(torch.autograd.Function):
    """q, k and v as they are; their gradients go to the inlet, so the graph holds none of them itself."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, inlet: Inlet, *heads: torch.Tensor) -> tuple[Any, ...]:
        ctx.inlet = inlet
        return tuple(part.view_as(part) for part in heads)

    @staticmethod
    def backward(ctx: Any, *found: torch.Tensor) -> tuple[None, ...]:
        ctx.inlet.gradients = found
        return (None,) * (2 + len(found))


def _attend_with_graph(
    layer: FastLayer, row: Row, heads: tuple[torch.Tensor, ...], *, drop_inputs: bool
) -> Attended:
    inlet = Inlet()
    anchor = torch.empty(0, device=heads[0].device, requires_grad=True)
    hooks = _dropping(heads, inlet) if drop_inputs else nullcontext()
    with torch.enable_grad(), hooks:
        output, _ = _attend(layer, row, _Enter.apply(anchor, inlet, *heads))
    return Attended(output, inlet)


class _Dropped(NamedTuple):
    """A saved tensor that is a part of q, k or v."""

    number: int
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


def _dropping(heads: tuple[torch.Tensor, ...], inlet: Inlet) -> AbstractContextManager[Any]:
    """Saved tensors that lie in q, k or v are not kept; they are found again in `inlet.heads`."""
    numbers = {part.untyped_storage().data_ptr(): number for number, part in enumerate(heads)}

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Dropped:
        number = numbers.get(tensor.untyped_storage().data_ptr())
        if number is None:
            return tensor
        return _Dropped(number, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def unpack(packed: torch.Tensor | _Dropped) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        assert inlet.heads is not None, "q, k and v are computed again first"
        return inlet.heads[packed.number].as_strided(packed.shape, packed.strides, packed.offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


# MLP --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Mlp:
    """What is kept of the second half; what is None is computed again."""

    gate_up: torch.Tensor
    wide: torch.Tensor | None = None
    """[norm(mid) | low]"""
    reciprocal: torch.Tensor | None = None
    wide_of_down: torch.Tensor | None = None
    """[activation(gate) * up | low]"""


@dataclass(slots=True, eq=False)
class _Sums:
    """Gradients of adapters, added up over tiles of a row."""

    tensors: list[torch.Tensor] = field(default_factory=list)

    def add(self, found: list[torch.Tensor]) -> None:
        if not self.tensors:
            self.tensors = found
            return
        for total, part in zip(self.tensors, found, strict=True):
            total += part


def mlp_half(
    layer: FastLayer, manner: Manner, mid: torch.Tensor, keep: Keep
) -> tuple[torch.Tensor, Mlp | None]:
    if manner.mlp_tokens is not None and len(mid) > manner.mlp_tokens:
        tiles = [_mlp_tile(layer, manner, part)[0] for part in mid.split(manner.mlp_tokens)]
        return torch.cat(tiles), None
    output, mlp = _mlp_tile(layer, manner, mid)
    if keep == "full":
        return output, None
    return output, mlp if keep == "none" else Mlp(mlp.gate_up)


def _mlp_tile(layer: FastLayer, manner: Manner, mid: torch.Tensor) -> tuple[torch.Tensor, Mlp]:
    mlp = _gate_and_up(layer, manner, mid)
    wide = _activated(layer, manner, mlp.gate_up)
    mlp.wide_of_down = wide
    if layer.after_mlp is None:
        return product(layer.down, wide, residual=mid), mlp
    return _normed_sum(manner, product(layer.down, wide), layer.after_mlp, mid), mlp


def _gate_and_up(layer: FastLayer, manner: Manner, mid: torch.Tensor) -> Mlp:
    wide, reciprocal = _normed(manner, layer.gate_up, layer.before_mlp, mid)
    return Mlp(product(layer.gate_up, wide), wide, reciprocal)


def _activated(layer: FastLayer, manner: Manner, gate_up: torch.Tensor) -> torch.Tensor:
    wide = room_for_input(layer.down, len(gate_up))
    manner.pointwise.gate_into(wide[:, : layer.down.num_in], gate_up, layer.activation)
    return fill_low(layer.down, wide)


def mlp_backward(
    layer: FastLayer, manner: Manner, mid: torch.Tensor, mlp: Mlp | None, gradient: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradient of `mid`, with room beside it for `o`; and of the adapters of gate, up and down."""
    of_mid = room_for_gradient(layer.o, len(mid))[:, : layer.o.num_out]
    if mlp is not None or manner.mlp_tokens is None:
        return of_mid, _mlp_tile_backward(layer, manner, of_mid, mid, mlp, gradient)
    sums = _Sums()
    tiles = (tensor.split(manner.mlp_tokens) for tensor in (of_mid, mid, gradient))
    for of_part, part, gradient_of_part in zip(*tiles, strict=True):
        sums.add(_mlp_tile_backward(layer, manner, of_part, part, None, gradient_of_part))
    return of_mid, sums.tensors


def _mlp_tile_backward(
    layer: FastLayer,
    manner: Manner,
    of_mid: torch.Tensor,
    mid: torch.Tensor,
    mlp: Mlp | None,
    gradient: torch.Tensor,
) -> list[torch.Tensor]:
    """Writes the gradient of `mid` into `of_mid`; the gradients of the adapters."""
    mlp = _gate_and_up(layer, manner, mid) if mlp is None else mlp
    of_active, of_down = _down_backward(layer, manner, mlp, gradient)
    room = room_for_gradient(layer.gate_up, len(mid))
    manner.pointwise.gate_backward_into(
        room[:, : layer.gate_up.num_out], mlp.gate_up, of_active, layer.activation
    )
    del of_active
    wide, reciprocal = mlp.wide, mlp.reciprocal
    if wide is None or reciprocal is None:
        wide, reciprocal = _normed(manner, layer.gate_up, layer.before_mlp, mid)
    of_normed, of_gate_up = gradients(layer.gate_up, room, *halves(layer.gate_up, wide))
    norm = layer.before_mlp
    manner.pointwise.norm_backward_into(
        of_mid, of_normed, mid, reciprocal, norm.weight, norm.is_offset, gradient
    )
    return [*of_gate_up, *of_down]


def _down_backward(
    layer: FastLayer, manner: Manner, mlp: Mlp, gradient: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    wide = mlp.wide_of_down if mlp.wide_of_down is not None else _activated(layer, manner, mlp.gate_up)
    if layer.after_mlp is not None:
        gradient = _normed_sum_backward(manner, product(layer.down, wide), layer.after_mlp, gradient)
    of_active, of_adapters = gradients(
        layer.down, _with_room(manner, layer.down, gradient), *halves(layer.down, wide)
    )
    assert of_active is not None
    return of_active, of_adapters
