"""Combinations that are refused, run all the same: each fails, or computes something else, as its rule says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import RefusedError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import TrainConfig
from tests.trainer.tiny_models import example_of, learnable_documents, tiny_lora, tiny_model, tiny_run
from trainer import job, kernels, train
from trainer.attention import use_packed_attention
from trainer.data import collate
from trainer.loss import token_losses
from trainer.model import load_base_model
from trainer.start_adapter import merge_into
from trainer.support import refusals
from trainer.train import train as run_training


def force(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (job, train):
        monkeypatch.setattr(module, "check_supported", lambda config: None)


def run_of(folder: Path, rule: str, **settings: Any) -> PipelineConfig:
    """A config that breaks that rule, and would be refused."""
    config = tiny_run(folder, train={"max_steps": 3, **settings.pop("train", {})}, **settings)
    assert rule in [problem.partition(":")[0] for problem in refusals(config)]
    with pytest.raises(RefusedError, match=rule):
        run_training(config)
    return config


def test_8_bit_weights_have_no_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_of(tmp_path, "int8-full", train={"base": "int8", "method": "full"})
    force(monkeypatch)
    with pytest.raises(RuntimeError, match="only Tensors of floating point dtype can require gradients"):
        run_training(config)


def test_8_bit_weights_that_are_cut_and_put_together_are_others() -> None:
    """FSDP2 and ZeRO 3 gather a parameter's numbers and nothing else: the scales of int8 stand beside it."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    torch.manual_seed(0)
    layer = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=0.0)
    layer.weight = Int8Params(torch.randn(64, 64), requires_grad=False, has_fp16_weights=False).to("cpu")
    x = torch.randn(5, 64)
    expected = layer(x)
    halves = [half.clone() for half in layer.weight.detach().chunk(2)]
    gathered = Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=0.0)
    gathered.weight = torch.nn.Parameter(torch.cat(halves), requires_grad=False)
    try:
        found = gathered(x)
    except (AttributeError, RuntimeError, TypeError):
        return  # louder than wrong numbers
    assert not torch.allclose(found.float(), expected.float(), rtol=0.1)


def test_a_dropout_that_is_fused_away_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why LoRA with dropout is not fused: forced, it computes as if there were none."""
    model = tiny_model()
    use_packed_attention(model)
    wrapped = tiny_lora(model).train()
    batch = collate([example_of(learnable_documents(1)[0])])
    without = token_losses(wrapped, batch)
    for layer in wrapped.modules():
        if isinstance(layer, kernels.LoraLayer):
            layer.lora_dropout["default"] = torch.nn.Dropout(0.5)
    dropped = token_losses(wrapped, batch)
    assert not torch.allclose(dropped, without, atol=1e-2)
    settings = TrainConfig()
    assert kernels.use_fast_kernels(wrapped, settings, device=torch.device("cpu")).num_fused_lora_layers == 0
    monkeypatch.setattr(kernels, "member_of", lambda layer: layer)
    kernels.use_fast_kernels(wrapped, settings, device=torch.device("cpu"))
    assert torch.allclose(token_losses(wrapped, batch), without, atol=1e-4)


def test_fp16_without_a_loss_scale_loses_gradients() -> None:
    """Where sums do not know the loss scale it can't be used: gradients of a small share of a loss come back as 0."""
    model = tiny_model(dtype=torch.float16)
    use_packed_attention(model)
    batch = collate([example_of(learnable_documents(1)[0])])

    def share_of_zeros(scale: float) -> float:
        model.zero_grad()
        (token_losses(model, batch).sum() * 1e-7 * scale).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.model.layers.parameters()])
        return float((gradient == 0).float().mean())

    assert share_of_zeros(1.0) > 0.2
    assert share_of_zeros(2.0**16) < 0.02


def test_adding_an_adapter_to_8_bit_weights_loses_it(tmp_path: Path) -> None:
    source = tiny_run(tmp_path / "source", train={"max_steps": 2})
    result = run_training(source)
    adapter = source.run_root / "checkpoints" / result.key / "adapter"
    config = run_of(
        tmp_path / "merge",
        "adapter-merge-bits",
        model={"adapter": str(adapter), "adapter_use": "merge"},
        train={"base": "int8"},
    )
    assert config.model is not None
    model = load_base_model(config.model, base="int8", dtype=torch.float32)
    layer: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    before = layer.weight.clone()
    merge_into(model, adapter)
    # Its numbers are steps from -127 to 127, of which an adapter adds a hundredth: what is left of it is rounding.
    assert int((layer.weight.int() - before.int()).abs().max()) <= 1
