"""Linear products of a decoder layer: layers of one input as one product, and their adapters inside of it.

With x [T, in], frozen W [out, in], and for LoRA A [rank, in], B [out, rank] and s = alpha / rank:

    y  = [x | x A'] [W | s B]'          one product; x A' is a thin one
    dx = [dy | dy s B] [W ; A]          one product; dy s B is a thin one
    dA = (dy s B)' x,  dB = s dy' (x A')

Both right sides lie in one matrix, [[W, s B], [A, 0]], which holds the only copy of W: the layers' own weights become
views of it. Layers of one input stand one below the other; their adapters have columns of their own. The adapters
stay PEFT's parameters, and `refresh` copies them in after each update.
Quantised weights are unpacked into such a matrix for each product and never kept; A and B then lie by themselves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLayer

from trainer.fast.pointwise import has_triton
from trainer.frozen_weights import dense_weight_into, is_quantised

WIDE, WIDE_MULTIPLE, NARROW_MULTIPLE = 2048, 64, 8
"""Columns of all adapters together: a whole tile of the tensor cores' inner loop where the input is wide."""


class Adapter(NamedTuple):
    down: torch.nn.Parameter
    """A [rank, in]."""
    up: torch.nn.Parameter
    """B [out, rank]."""
    scaling: float


class Member(NamedTuple):
    """A frozen linear layer, with an adapter or without."""

    base: torch.nn.Linear
    adapter: Adapter | None


class Place(NamedTuple):
    """Of an adapter in its group: rows of its layer's output, columns of its rank."""

    adapter: Adapter
    rows: slice
    columns: slice


@dataclass(slots=True, eq=False)
class Group:
    """Linear layers of one input. in: K, out of all: N, columns for adapters: R, padded with zeros."""

    members: tuple[Member, ...]
    places: tuple[Place, ...]
    matrix: torch.Tensor | None
    """[N + R, K + R]; None over quantised weights."""
    down: torch.Tensor
    """[R, K], A of all."""
    up: torch.Tensor
    """[N, R], s B of all."""
    bias: torch.Tensor | None
    seen: list[tuple[int, int]] = field(default_factory=list)
    """What was copied in: version and address of each adapter's tensors."""

    @property
    def num_in(self) -> int:
        return self.down.shape[1]

    @property
    def num_out(self) -> int:
        return self.up.shape[0]

    @property
    def num_columns(self) -> int:
        return self.down.shape[0]

    def adapters(self) -> list[torch.nn.Parameter]:
        return [weight for place in self.places for weight in (place.adapter.down, place.adapter.up)]


# Passes -----------------------------------------------------------------------------------------------------


def room_for_input(group: Group, num_rows: int) -> torch.Tensor:
    """[T, K + R]: for x, and beside it what `fill_low` writes."""
    return group.down.new_empty(num_rows, group.num_in + group.num_columns)


def room_for_gradient(group: Group, num_rows: int) -> torch.Tensor:
    """[T, N + R]: for dy, and beside it what `gradients` writes."""
    return group.down.new_empty(num_rows, group.num_out + group.num_columns)


def fill_low(group: Group, wide: torch.Tensor) -> torch.Tensor:
    """Write x A' beside x; the same tensor."""
    if group.num_columns:
        torch.mm(wide[:, : group.num_in], group.down.T, out=wide[:, group.num_in :])
    return wide


def halves(group: Group, wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and x A'."""
    return wide[:, : group.num_in], wide[:, group.num_in :]


def product(group: Group, wide: torch.Tensor, *, residual: torch.Tensor | None = None) -> torch.Tensor:
    """y [T, N] of [x | x A'], with `residual` added."""
    matrix = _beside_up(group, wide.dtype) if group.matrix is None else group.matrix
    right = matrix[: group.num_out].T
    beside = group.bias if residual is None else residual
    output = torch.mm(wide, right) if beside is None else torch.addmm(beside, wide, right)
    return output.add_(group.bias) if residual is not None and group.bias is not None else output


def gradients(
    group: Group, gradient: torch.Tensor, x: torch.Tensor, low: torch.Tensor, *, needs_input: bool = True
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """dx, and the gradients of `group.adapters()`. `gradient` [T, N + R] holds dy and has room beside it."""
    of_output, of_low = gradient[:, : group.num_out], gradient[:, group.num_out :]
    found: list[torch.Tensor] = []
    if group.places:
        torch.mm(of_output, group.up, out=of_low)
        of_down = of_low.T @ x
        for place in group.places:
            found.append(of_down[place.columns])
            found.append(_gradient_of_up(place, of_output, low))
    return (_gradient_of_input(group, gradient) if needs_input else None), found


def _gradient_of_up(place: Place, of_output: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    left, right = of_output[:, place.rows].T, low[:, place.columns]
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=place.adapter.scaling)


def _gradient_of_input(group: Group, gradient: torch.Tensor) -> torch.Tensor:
    matrix = _over_down(group, gradient.dtype) if group.matrix is None else group.matrix
    return gradient @ matrix[:, : group.num_in]


def _beside_up(group: Group, dtype: torch.dtype) -> torch.Tensor:
    """[W | s B] out of quantised weights."""
    matrix = group.down.new_empty(group.num_out, group.num_in + group.num_columns, dtype=dtype)
    _unpack_into(group, matrix[:, : group.num_in])
    matrix[:, group.num_in :].copy_(group.up)
    return matrix


def _over_down(group: Group, dtype: torch.dtype) -> torch.Tensor:
    """[W ; A] out of quantised weights."""
    matrix = group.down.new_empty(group.num_out + group.num_columns, group.num_in, dtype=dtype)
    _unpack_into(group, matrix[: group.num_out])
    matrix[group.num_out :].copy_(group.down)
    return matrix


def _unpack_into(group: Group, whole: torch.Tensor) -> None:
    """W of all members [N, K]."""
    start = 0
    for member in group.members:
        end = start + member.base.out_features
        dense_weight_into(whole[start:end], member.base)
        start = end


@torch.no_grad()
def refresh(groups: Iterable[Group]) -> None:
    """Copy the adapters in that have changed since. At once: two kernels an adapter kept a GPU waiting for Python."""
    copies: list[tuple[torch.Tensor, torch.Tensor, float]] = []
    for group in groups:
        now = [(weight._version, weight.data_ptr()) for weight in group.adapters()]
        if now == group.seen:
            continue
        for adapter, rows, columns in group.places:
            copies.append((adapter.down, group.down[columns], 1.0))
            copies.append((adapter.up, group.up[rows, columns], adapter.scaling))
        group.seen = now
    if not copies:
        return
    if has_triton(copies[0][0].device):
        from trainer.fast.triton_products import copy_all, copy_of

        copy_all(tuple(copy_of(*copy) for copy in copies), copies[0][0])
        return
    for source, target, factor in copies:
        torch.mul(source, factor, out=target)


# Building ---------------------------------------------------------------------------------------------------


def member_of(layer: torch.nn.Module) -> Member | None:
    """A frozen linear layer with plain LoRA, or with none; None for what `product` does not compute.

    Not computed: DoRA and other variants, several adapters, dropout, a bias of the adapter's own, adapters of another
    dtype than the base, and other kinds of linear layers.
    """
    if not isinstance(layer, LoraLayer):
        return (
            Member(layer, None) if isinstance(layer, torch.nn.Linear) and _is_frozen_linear(layer) else None
        )
    base: Any = layer.base_layer
    if len(layer.active_adapters) != 1 or layer.lora_variant or layer.merged or not _is_frozen_linear(base):
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A or not isinstance(layer.lora_dropout[name], torch.nn.Identity):
        return None
    down, up = layer.lora_A[name], layer.lora_B[name]
    dtype = base.dtype if is_quantised(base) else base.weight.dtype
    if down.bias is not None or up.bias is not None or not dtype == down.weight.dtype == up.weight.dtype:
        return None
    return Member(base, Adapter(down.weight, up.weight, float(layer.scaling[name])))


def _is_frozen_linear(layer: torch.nn.Module) -> bool:
    if type(layer) is not torch.nn.Linear and not is_quantised(layer):
        return False
    return not any(weight.requires_grad for weight in layer.parameters())


def can_group(members: Sequence[Member]) -> bool:
    """Of one form and one dtype."""
    return len({(type(member.base), _dtype(member)) for member in members}) == 1


def _dtype(member: Member) -> torch.dtype:
    found: torch.dtype = member.base.dtype if is_quantised(member.base) else member.base.weight.dtype  # type: ignore[assignment]
    return found


@torch.no_grad()
def build(members: Sequence[Member]) -> Group:
    """Move the members' weights into one matrix. One group of them is there twice while it is built, no more."""
    first = members[0]
    device = next(first.base.parameters()).device
    num_in, num_out = first.base.in_features, sum(member.base.out_features for member in members)
    places, num_ranks = _places(members)
    multiple = WIDE_MULTIPLE if num_in >= WIDE else NARROW_MULTIPLE
    num_columns = -(-num_ranks // multiple) * multiple
    options = {"dtype": _dtype(first), "device": device}
    if is_quantised(first.base):
        matrix = None
        down = torch.zeros(num_columns, num_in, **options)  # type: ignore[call-overload]
        up = torch.zeros(num_out, num_columns, **options)  # type: ignore[call-overload]
    else:
        matrix = torch.empty(num_out + num_columns, num_in + num_columns, **options)  # type: ignore[call-overload]
        matrix[num_out:].zero_()
        matrix[:, num_in:].zero_()
        down, up = matrix[num_out:, :num_in], matrix[:num_out, num_in:]
        _move_weights(members, matrix[:num_out, :num_in])
    group = Group(tuple(members), places, matrix, down, up, _bias(members, device))
    refresh([group])
    return group


def _places(members: Sequence[Member]) -> tuple[tuple[Place, ...], int]:
    places, row, column = [], 0, 0
    for member in members:
        end = row + member.base.out_features
        if member.adapter is not None:
            rank = member.adapter.down.shape[0]
            places.append(Place(member.adapter, slice(row, end), slice(column, column + rank)))
            column += rank
        row = end
    return tuple(places), column


def _move_weights(members: Sequence[Member], whole: torch.Tensor) -> None:
    start = 0
    for member in members:
        part = whole[start : start + member.base.out_features]
        part.copy_(member.base.weight)
        member.base.weight.data = part
        start += len(part)


def _bias(members: Sequence[Member], device: torch.device) -> torch.Tensor | None:
    if all(member.base.bias is None for member in members):
        return None
    none = [torch.zeros(member.base.out_features, dtype=_dtype(member), device=device) for member in members]
    parts = [
        zeros if member.base.bias is None else member.base.bias.detach()
        for member, zeros in zip(members, none, strict=True)
    ]
    return torch.cat(parts)
