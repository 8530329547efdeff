"""Norms, rotations and activations of a decoder layer, forwards and backwards: sums of single numbers.

Each writes where it is told to, so that what a product reads lies side by side without a copy. As they stand, torch
runs them operation by operation; compiled, or in triton_pointwise.py, each is one kernel. All compute in fp32 and round
once, at the end.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F

from trainer.metrics import report

Activation = Literal["silu", "gelu_tanh"]
GELU_FACTOR, GELU_CUBE = 0.7978845608028654, 0.044715
"""gelu's tanh form: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""


OLDEST_CAPABILITY = (8, 0)
"""On older cards the kernels were never run."""


class Pointwise(NamedTuple):
    """The functions of this file, as they stand or compiled."""

    norm_into: Callable[..., torch.Tensor]
    norm_backward_into: Callable[..., None]
    rotate_into: Callable[..., None]
    unrotate_into: Callable[..., None]
    gate_into: Callable[..., None]
    gate_backward_into: Callable[..., None]
    copy_into: Callable[..., None]


def norm_into(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, is_offset: bool
) -> torch.Tensor:
    """Write x / rms(x) * weight into `out`; the reciprocal of the root mean square, fp32 [..., 1].

    `is_offset`: the weight is stored less 1, as Gemma does.
    """
    wide = x.float()
    reciprocal = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out.copy_(wide * reciprocal * _wide_weight(weight, is_offset))
    return reciprocal


def norm_backward_into(
    out: torch.Tensor,
    gradient: torch.Tensor,
    x: torch.Tensor,
    reciprocal: torch.Tensor,
    weight: torch.Tensor,
    is_offset: bool,
    beside: torch.Tensor | None = None,
) -> None:
    """Write the gradient of x, with that of what went past the norm (`beside`) added to it."""
    scaled = gradient.float() * _wide_weight(weight, is_offset)
    normed = x.float() * reciprocal
    result = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * reciprocal
    out.copy_(result if beside is None else result + beside.float())


def _wide_weight(weight: torch.Tensor, is_offset: bool) -> torch.Tensor:
    return weight.float() + 1.0 if is_offset else weight.float()


def rotate_into(out: torch.Tensor, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary positions: heads [T, heads, size], cos and sin [T, size], whose halves are equal. `out` may be `heads`."""
    wide = heads.float()
    out.copy_(wide * cos[:, None].float() + _half_turn(wide) * sin[:, None].float())


def unrotate_into(out: torch.Tensor, gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """The gradient of what was rotated: turned back."""
    wide = gradient.float()
    out.copy_(wide * cos[:, None].float() - _half_turn(wide) * sin[:, None].float())


def _half_turn(heads: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def gate_into(out: torch.Tensor, gate_and_up: torch.Tensor, activation: Activation) -> None:
    """Write activation(gate) * up; the two stand side by side."""
    gate, up = gate_and_up.float().chunk(2, dim=-1)
    active = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    out.copy_(active * up)


def gate_backward_into(
    out: torch.Tensor, gate_and_up: torch.Tensor, gradient: torch.Tensor, activation: Activation
) -> None:
    """Write the gradients of gate and up, side by side."""
    gate, up = gate_and_up.float().chunk(2, dim=-1)
    wide = gradient.float()
    active, slope = (_silu if activation == "silu" else _gelu_tanh)(gate)
    size = gate.shape[-1]
    out[:, :size].copy_(wide * up * slope)
    out[:, size:].copy_(wide * active)


def _silu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation and its derivative."""
    share = torch.sigmoid(x)
    return x * share, share * (1.0 + x * (1.0 - share))


def _gelu_tanh(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bend = torch.tanh(GELU_FACTOR * (x + GELU_CUBE * x**3))
    slope = GELU_FACTOR * (1.0 + 3.0 * GELU_CUBE * x**2)
    return 0.5 * x * (1.0 + bend), 0.5 * (1.0 + bend) + 0.5 * x * (1.0 - bend**2) * slope


def copy_into(out: torch.Tensor, x: torch.Tensor) -> None:
    """Of rows that lie apart."""
    out.copy_(x)


PLAIN = Pointwise(
    norm_into, norm_backward_into, rotate_into, unrotate_into, gate_into, gate_backward_into, copy_into
)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels of this folder run there: one is tried, since they need a C compiler, too."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY and _runs(device)


def _runs(device: torch.device) -> bool:
    from trainer.fast.triton_pointwise import copy_into

    x = torch.arange(8.0, device=device)[None]
    out = torch.zeros_like(x)
    try:
        copy_into(out, x)
    except Exception as error:  # noqa: BLE001 - a compiler's or a driver's: torch's own way is there
        report(f"no Triton kernels: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return False
    return torch.equal(out, x)


def compiled(backend: Any) -> Pointwise:
    """Each as one program, made at first use. A new row length makes one more, which then serves all lengths."""
    programs = {
        name: torch.compile(function, fullgraph=True, backend=backend)
        for name, function in PLAIN._asdict().items()
    }
    return Pointwise(**programs)
