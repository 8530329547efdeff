"""First matrices of LoRA. Judges: PEFT's own initialisations, numpy's singular values."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer

from tests.trainer.tiny_models import tiny_model
from trainer import lora_starts
from trainer.lora_starts import STARTS, leading, orthogonal

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
RANK, ALPHA = 4, 12


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_product_is_what_peft_begins_with(init: str) -> None:
    weights = {name: p.detach().clone() for name, p in tiny_model().named_parameters()}
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=init)
    layers = {
        n: m for n, m in get_peft_model(tiny_model(), settings).named_modules() if isinstance(m, LoraLayer)
    }
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = weights[f"{name.removeprefix('base_model.model.')}.weight"]
        down, up = STARTS[init](weight, RANK, ALPHA / RANK)
        expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert torch.allclose(up @ down, expected, atol=1e-5)
        assert torch.allclose(weight - ALPHA / RANK * up @ down, layer.get_base_layer().weight, atol=1e-5)


def test_leading_matrices_approximate_as_well_as_any_of_their_rank() -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    down, up = leading(matrix, 5, 0.5)
    values = np.linalg.svd(matrix.numpy(), compute_uv=False)
    rest = (matrix - 0.5 * up @ down).norm().item()
    assert rest == pytest.approx(np.sqrt((values[5:] ** 2).sum()), rel=1e-5)
    assert torch.allclose(down.norm(dim=1), up.norm(dim=0), rtol=1e-4)  # cut evenly


def test_large_matrices_are_approximated_as_small_ones_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values that fall as those of trained weights do, slowly."""
    draws = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 96, generator=draws)).Q for n in (128, 160))
    matrix = left * torch.arange(1, 97).float().pow(-0.5) @ right.T
    exact = leading(matrix, 8, 2.0)
    monkeypatch.setattr(lora_starts, "MAX_EXACT_SIZE", 64)
    found = leading(matrix, 8, 2.0)
    again = leading(matrix, 8, 2.0)
    assert torch.allclose(found[1] @ found[0], exact[1] @ exact[0], atol=1e-3)
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1], again[1])


def test_orthogonal_matrices_are_the_begin_of_q_and_r() -> None:
    matrix = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    down, up = orthogonal(matrix, 3, 7.0)
    assert torch.allclose(up.T @ up, torch.eye(3), atol=1e-5)
    assert torch.allclose((up @ down)[:, :3], matrix[:, :3], atol=1e-5)
