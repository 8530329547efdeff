"""Triton kernels against the plain functions that they stand for, and torch's own cross entropy.

On a GPU, or on a CPU through Triton's interpreter: `pip install triton; TRITON_INTERPRET=1 pytest tests/trainer/fast`.
"""

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

from trainer import nf4
from trainer.fast import pointwise
from trainer.frozen_weights import _nf4_code
from trainer.int8_rows import dequantised, quantise

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or IS_INTERPRETED):
    pytest.skip("needs Triton, and a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from trainer.fast import triton_loss, triton_pointwise, triton_products  # noqa: E402

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""The interpreter cuts bfloat16 off where a GPU rounds it."""
NUM_ROWS = 7


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    found: torch.dtype = request.param
    return found


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def beside_others(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that lie apart, and all of what they are a part of."""
    whole = torch.zeros(NUM_ROWS, size + 8, device=DEVICE, dtype=dtype)
    return whole[:, :size], whole


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    difference = float((ours.float() - expected.float()).norm() / expected.float().norm())
    assert difference <= DTYPES[ours.dtype], difference


@pytest.mark.parametrize("is_offset", [False, True])
@pytest.mark.parametrize("has_beside", [False, True])
def test_norms_and_their_gradients(dtype: torch.dtype, is_offset: bool, has_beside: bool) -> None:
    size = 96
    x, gradient, other = (drawn(NUM_ROWS, size, dtype=dtype) for _ in range(3))
    weight, beside = drawn(size, dtype=dtype), other if has_beside else None
    ours, whole = beside_others(size, dtype)
    expected, _ = beside_others(size, dtype)
    reciprocals = [
        module.norm_into(out, x, weight, 1e-5, is_offset)
        for module, out in ((triton_pointwise, ours), (pointwise, expected))
    ]
    assert_close(ours, expected)
    assert_close(*reciprocals)
    for module, out in ((triton_pointwise, ours), (pointwise, expected)):
        module.norm_backward_into(out, gradient, x, reciprocals[1], weight, is_offset, beside)
    assert_close(ours, expected)
    assert not whole[:, size:].any()


def test_norms_of_heads(dtype: torch.dtype) -> None:
    heads = drawn(NUM_ROWS, 40 * 16, dtype=dtype)[:, 16 : 37 * 16].unflatten(1, (36, 16))
    weight, gradient = drawn(16, dtype=dtype), drawn(NUM_ROWS, 36, 16, dtype=dtype)
    ours, expected = torch.empty_like(gradient), torch.empty_like(gradient)
    reciprocal = triton_pointwise.norm_into(ours, heads, weight, 1e-5, False)
    pointwise.norm_into(expected, heads, weight, 1e-5, False)
    assert_close(ours, expected)
    for module, out in ((triton_pointwise, ours), (pointwise, expected)):
        module.norm_backward_into(out, gradient, heads, reciprocal, weight, False)
    assert_close(ours, expected)


@pytest.mark.parametrize("name", ["rotate_into", "unrotate_into"])
def test_rotations_elsewhere_and_in_place(dtype: torch.dtype, name: str) -> None:
    heads = drawn(NUM_ROWS, 40 * 16, dtype=dtype)[:, 16 : 37 * 16].unflatten(1, (36, 16))
    angles = drawn(NUM_ROWS, 8, dtype=torch.float32)
    cos, sin = (torch.cat([turn(angles)] * 2, dim=-1).to(dtype) for turn in (torch.cos, torch.sin))
    ours, expected = (torch.empty(NUM_ROWS, 36, 16, device=DEVICE, dtype=dtype) for _ in range(2))
    getattr(triton_pointwise, name)(ours, heads, cos, sin)
    getattr(pointwise, name)(expected, heads, cos, sin)
    assert_close(ours, expected)
    getattr(triton_pointwise, name)(heads, heads, cos, sin)
    assert_close(heads, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_and_their_gradients(dtype: torch.dtype, activation: pointwise.Activation) -> None:
    size = 2100
    gate_and_up, gradient = drawn(NUM_ROWS, 2 * size, dtype=dtype), drawn(NUM_ROWS, size, dtype=dtype)
    ours, expected = beside_others(size, dtype)[0], beside_others(size, dtype)[0]
    triton_pointwise.gate_into(ours, gate_and_up, activation)
    pointwise.gate_into(expected, gate_and_up, activation)
    assert_close(ours, expected)
    ours, expected = beside_others(2 * size, dtype)[0], beside_others(2 * size, dtype)[0]
    triton_pointwise.gate_backward_into(ours, gate_and_up, gradient, activation)
    pointwise.gate_backward_into(expected, gate_and_up, gradient, activation)
    assert_close(ours, expected)


def test_copies_touch_nothing_beside_them(dtype: torch.dtype) -> None:
    x = drawn(NUM_ROWS, 2100, dtype=dtype)
    ours, whole = beside_others(2100, dtype)
    triton_pointwise.copy_into(ours, x)
    assert torch.equal(ours, x)
    assert not whole[:, 2100:].any()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_and_its_gradient_are_torchs(dtype: torch.dtype, label_smoothing: float) -> None:
    logits = drawn(NUM_ROWS, 9001, dtype=dtype) * 3
    targets = torch.randint(0, 9001, (NUM_ROWS,), device=DEVICE)
    logits[0, 5] = logits[0, 8000] = 40.0  # of equal ones the first
    targets[0], targets[1] = 5, logits[1].argmax()
    wide = logits.clone().float().requires_grad_()
    expected = F.cross_entropy(wide, targets, reduction="none", label_smoothing=label_smoothing)
    expected.sum().backward()
    is_right = (logits.float().argmax(-1) == targets).float()
    losses, found = triton_loss.cross_entropy(logits, targets, label_smoothing)
    assert_close(losses, expected.detach())
    assert wide.grad is not None
    assert_close(logits, wide.grad)
    assert torch.equal(found, is_right)


def test_adapters_are_copied_and_scaled_where_they_belong() -> None:
    down, up = drawn(16, 5000, dtype=torch.float32), drawn(300, 16, dtype=torch.float32)
    ours, expected = (torch.zeros(400, 6000, device=DEVICE) for _ in range(2))
    copies = [(down, (slice(8, 24), slice(0, 5000)), 1.0), (up, (slice(50, 350), slice(5100, 5116)), 2.5)]
    triton_products.copy_all(tuple(triton_products.copy_of(x, ours[at], f) for x, at, f in copies), down)
    for x, at, factor in copies:
        expected[at] = x * factor
    assert torch.equal(ours, expected)


def test_weights_out_of_bits(dtype: torch.dtype) -> None:
    shape = (NUM_ROWS, 192)
    weight = drawn(*shape, dtype=dtype)
    rows, scales = quantise(weight)
    ours, whole = beside_others(shape[1], dtype)
    triton_products.unpack_rows_into(ours, rows, scales)
    assert_close(ours, dequantised(rows, scales, dtype))
    bits = nf4.quantise(weight)
    triton_products.unpack_nf4_into(ours, bits["packed"], bits["absmax"], _nf4_code(DEVICE))
    assert_close(ours, nf4.unpacked(bits["packed"], bits["absmax"], shape, dtype))
    assert not whole[:, shape[1] :].any()
