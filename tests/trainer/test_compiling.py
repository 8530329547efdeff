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


def lora_model(num_layers: int, *, checkpointing: bool = False) -> Any:
    model = tiny_model(num_hidden_layers=num_layers)
    use_packed_attention(model)
    if checkpointing:
        enable_gradient_checkpointing(model)
    wrapped = tiny_lora(model).train()
    kernels = use_fast_kernels(wrapped, TrainConfig(compile=True), device=torch.device("cpu"))
    assert kernels.num_fused_lora_layers == 0
    return wrapped


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_the_uncompiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", QUICK_BACKEND)
    model = lora_model(1)
    expected = losses_and_gradients(model)
    assert compile_layers(model).startswith("1 layers are compiled")
    torch._dynamo.utils.counters.clear()
    found = losses_and_gradients(model)
    for ours, right in zip(found, expected, strict=True):
        assert torch.allclose(ours, right, atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_recomputed_layer_is_not_compiled_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why both together are refused: nothing fails, and nothing is compiled."""
    monkeypatch.setattr(compiling, "BACKEND", QUICK_BACKEND)
    model = lora_model(1, checkpointing=True)
    compile_layers(model)
    torch._dynamo.utils.counters.clear()
    losses_and_gradients(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


@pytest.mark.slow
def test_all_layers_and_lengths_share_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many for six layers as for three: by default torch gives up at eight, and goes on uncompiled."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    num_programs = []
    for num_layers in (3, 6):
        model = lora_model(num_layers)
        compile_layers(model)
        torch._dynamo.utils.counters.clear()
        losses_and_gradients(model)
        counters = torch._dynamo.utils.counters
        assert counters["frames"]["ok"] == counters["frames"]["total"] > 0
        assert all("disable" in reason for reason in counters["graph_break"])
        num_programs.append(counters["stats"]["unique_graphs"])
    assert num_programs[0] == num_programs[1]


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
