"""The 8-bit base without rounded activations. Judges: fp64 products, and bitsandbytes' own rounding and LLM.int8."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.training_config import ModelConfig
from tests.trainer.tiny_models import write_model
from trainer.attention import use_plain_attention
from trainer.int8_rows import Int8RowsLinear, dequantised, quantise
from trainer.model import load_base_model


def weight_and_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with a few larger columns, below the 6 from which LLM.int8 puts a column aside."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=draws) * 0.05
    x = torch.randn(40, 64, generator=draws)
    x[:, ::13] = (x[:, ::13] * 4).clamp(-5.9, 5.9)
    return weight.bfloat16(), x.bfloat16()


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8RowsLinear:
    return Int8RowsLinear(*quantise(weight), bias=bias, dtype=weight.dtype)


def test_rows_are_rounded_as_bitsandbytes_rounds_them() -> None:
    weight, _ = weight_and_inputs()
    rows, scales = quantise(weight)
    theirs, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    assert (rows - theirs).abs().max() <= 1  # a tie, at most
    assert (rows != theirs).float().mean() < 0.01
    assert torch.allclose(scales.flatten() * 127, largest.flatten(), rtol=1e-3)
    error = (dequantised(rows, scales, torch.float32) - weight.float()).abs()
    assert (error <= scales / 2 * 1.001).all()


def test_a_row_of_zeros_stays_zero() -> None:
    rows, scales = quantise(torch.zeros(2, 8))
    assert not dequantised(rows, scales, torch.bfloat16).any()


@pytest.mark.parametrize("has_bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_rounded_weight(has_bias: bool) -> None:
    weight, x = weight_and_inputs()
    bias = torch.arange(48).bfloat16() if has_bias else None
    layer, leaf = layer_of(weight, bias), x.clone().requires_grad_()
    output = layer(leaf)
    output.square().sum().backward()
    rounded = layer.weight.detach()
    expected_leaf = x.clone().requires_grad_()
    expected = torch.nn.functional.linear(expected_leaf, rounded, bias)
    expected.square().sum().backward()
    assert torch.equal(output, expected)
    assert leaf.grad is not None
    assert expected_leaf.grad is not None
    assert torch.equal(leaf.grad, expected_leaf.grad)


def test_its_outputs_are_closer_than_those_of_llm_int8() -> None:
    weight, x = weight_and_inputs()
    exact = x.double() @ weight.double().T
    theirs: Any = bitsandbytes.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict({"weight": weight.half()})
    theirs = theirs.to("cpu").eval()  # in training it leaves activations as they are on a CPU
    errors = [
        float((output.double() - exact).norm() / exact.norm())
        for output in (layer_of(weight)(x).detach(), theirs(x.half()).detach())
    ]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_is_held_in_rows_but_for_its_head(tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path / "model", family)
    ours = load_base_model(ModelConfig(path=str(folder), device="cpu", dtype="float32"), base="int8_rows")
    use_plain_attention(ours)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linear = {name for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
    held = {name for name, layer in ours.named_modules() if isinstance(layer, Int8RowsLinear)}
    assert held == linear - {"lm_head"}
    for name in held:
        plain.get_submodule(name).weight.data = ours.get_submodule(name).weight
    ids = torch.arange(3, 40)[None]
    assert torch.allclose(ours(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4)
