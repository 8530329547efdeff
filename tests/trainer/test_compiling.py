"""train.compile: the losses of the uncompiled training, and programs that are really compiled."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.pipeline_config import PipelineConfig
from schemas.training_config import TrainConfig
from tests.trainer.matrix_rows import QUICK_BACKEND
from tests.trainer.tiny_models import example_of, learnable_documents, tiny_lora, tiny_model, tiny_run
from trainer import compiling
from trainer.attention import use_packed_attention
from trainer.compiling import compile_layers
from trainer.data import collate
from trainer.job import plan_job
from trainer.kernels import use_fast_kernels
from trainer.loss import token_losses
from trainer.model import enable_gradient_checkpointing
from trainer.train import train

DOCUMENTS = [example_of(document) for document in learnable_documents(8)]
ROWS = [DOCUMENTS[:3], DOCUMENTS[3:5], DOCUMENTS[5:]]
"""Of three lengths, with borders in other places."""


def losses_and_gradients(model: Any) -> list[torch.Tensor]:
    found = []
    for row in ROWS:
        model.zero_grad()
        losses = token_losses(model, collate(row))
        losses.sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found += [losses.detach(), torch.cat(gradients)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_rows_of_other_lengths_and_borders_share_programs(
    monkeypatch: pytest.MonkeyPatch, kernels: str, checkpointing: bool
) -> None:
    monkeypatch.setattr(compiling, "BACKEND", QUICK_BACKEND)
    model = tiny_model(num_hidden_layers=3)
    use_packed_attention(model)
    if checkpointing:
        enable_gradient_checkpointing(model)
    wrapped = tiny_lora(model).train()
    settings = TrainConfig.model_validate({"kernels": kernels})
    use_fast_kernels(wrapped, settings, device=torch.device("cpu"))
    expected = losses_and_gradients(wrapped)
    assert compile_layers(wrapped).startswith("3 layers are compiled")
    torch._dynamo.utils.counters.clear()
    found = losses_and_gradients(wrapped)
    for ours, right in zip(found, expected, strict=True):
        assert torch.allclose(ours, right, atol=1e-4, rtol=1e-4)
    counters = torch._dynamo.utils.counters
    assert counters["frames"]["ok"] == counters["frames"]["total"] > 0
    # Before and after the attention, for a first length and for any: not one for each layer and row.
    assert counters["stats"]["unique_graphs"] <= 6
    assert all("disable" in reason for reason in counters["graph_break"])


def run_of(folder: Path, **settings: Any) -> PipelineConfig:
    return tiny_run(folder, train={"max_steps": 3, **settings}, num_documents=20)


def losses_of(config: PipelineConfig) -> list[float]:
    result = train(config)
    path = config.run_root / "checkpoints" / result.key / "metrics.jsonl"
    return [line["loss"] for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]


@pytest.mark.stress
def test_the_default_compiler_gives_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole training, g++ included."""
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    expected = losses_of(run_of(tmp_path / "plain"))
    assert losses_of(run_of(tmp_path / "compiled", compile=True)) == pytest.approx(expected, abs=1e-5)
    assert any((tmp_path / "cache").rglob("*.so"))


def test_a_training_may_go_on_compiled(tmp_path: Path) -> None:
    plain, compiled = (run_of(tmp_path, compile=compile) for compile in (False, True))
    assert plan_job(plain).key == plan_job(compiled).key
