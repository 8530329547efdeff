"""The fast ways compute what the libraries' own layers compute. Judge: PEFT and transformers as they come."""

import copy
from typing import Any

import pytest
import torch

from schemas.training_config import LoraConfig, TrainConfig
from tests.trainer.tiny_models import example_of, random_documents, tiny_lora, tiny_model
from trainer.attention import unwrapped, use_packed_attention
from trainer.data import MicroBatch, collate
from trainer.kernels import use_fast_kernels
from trainer.loss import summed_loss
from trainer.methods import lora

CPU = torch.device("cpu")
cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batch(device: torch.device = CPU) -> MicroBatch:
    documents = random_documents((37, 5, 64, 22))
    return collate([example_of(document, row) for row, document in enumerate(documents)]).to(device)


def adapted(dtype: torch.dtype, **settings: Any) -> torch.nn.Module:
    """A model with adapters that do something: PEFT's start, B = 0, hides half of the mistakes."""
    model: torch.nn.Module = tiny_lora(tiny_model(dtype=dtype, **settings))
    use_packed_attention(model)
    return model


def loss_and_gradients(model: torch.nn.Module, device: torch.device = CPU) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = summed_loss(model, batch(device))
    loss.backward()
    gradients = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(gradients)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_fused_lora_layers_give_pefts_loss_and_gradients(bias: bool) -> None:
    model = adapted(torch.float32, attention_bias=bias, mlp_bias=bias)
    expected_loss, expected = loss_and_gradients(copy.deepcopy(model))
    kernels = use_fast_kernels(model, TrainConfig(), device=CPU)
    assert kernels.num_fused_lora_layers == kernels.num_lora_layers == 14
    loss, gradients = loss_and_gradients(model)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert distance(gradients, expected) < 1e-6


def test_in_bf16_the_fused_layers_are_no_further_from_fp32_than_pefts() -> None:
    model = adapted(torch.bfloat16)
    exact = copy.deepcopy(model).float()
    _, expected = loss_and_gradients(exact)
    _, of_peft = loss_and_gradients(copy.deepcopy(model))
    use_fast_kernels(model, TrainConfig(), device=CPU)
    _, fused = loss_and_gradients(model)
    assert distance(fused, expected) < 1.2 * distance(of_peft, expected)


def test_a_disabled_adapter_leaves_the_base_model() -> None:
    model = adapted(torch.float32)
    with model.disable_adapter():  # type: ignore[operator]
        expected = float(summed_loss(model, batch()).detach())
    use_fast_kernels(model, TrainConfig(), device=CPU)
    with model.disable_adapter():  # type: ignore[operator]
        assert float(summed_loss(model, batch()).detach()) == expected
    assert float(summed_loss(model, batch()).detach()) != pytest.approx(expected, rel=1e-3)


def test_dropout_and_plain_leave_pefts_layers() -> None:
    train = TrainConfig(lora=LoraConfig(dropout=0.1))
    assert use_fast_kernels(lora.apply(tiny_model(), train), train, device=CPU).num_fused_lora_layers == 0
    plain = TrainConfig(kernels="plain")
    assert use_fast_kernels(adapted(torch.float32), plain, device=CPU).num_fused_lora_layers == 0


@pytest.mark.gpu
@cuda_only
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_liger_gives_transformers_gradients_and_leaves_models_on_the_cpu_alone(family: str) -> None:
    pytest.importorskip("liger_kernel")
    device = torch.device("cuda")
    model = tiny_lora(tiny_model(family, hidden_size=128, head_dim=32))
    use_packed_attention(model)
    on_cpu = copy.deepcopy(model)
    expected_loss, expected = loss_and_gradients(on_cpu)
    norm_class = type(next(m for m in model.modules() if type(m).__name__.endswith("RMSNorm")))
    assert use_fast_kernels(model.to(device), TrainConfig(), device=device).has_liger
    loss, gradients = loss_and_gradients(model, device)
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert distance(gradients, expected) < 1e-2
    fresh = tiny_model(family)
    assert type(unwrapped(fresh)).__module__ == type(unwrapped(model)).__module__
    assert norm_class in {type(module) for module in fresh.modules()}
    assert loss_and_gradients(on_cpu)[0] == expected_loss
