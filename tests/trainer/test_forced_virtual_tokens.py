"""Trainings with virtual tokens that are refused, run all the same: each fails, or leaves something else behind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from schemas.errors import RefusedError
from schemas.pipeline_config import PipelineConfig
from tests.trainer.padded_judge import judged_loss
from tests.trainer.tiny_models import learnable_documents, tiny_run, write_model
from trainer import job, train
from trainer.job import plan_job
from trainer.model import outdated_names_allowed
from trainer.padding import computed_batches
from trainer.steps import micro_steps
from trainer.support import refusals
from trainer.train import train as run_training

LATENT: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
FAILING: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "virtual-tokens-packed": ("llama", {}, {"method": "prefix", "batches": "packed"}, "packed and alone"),
    "virtual-tokens-layer-inputs": (
        "gemma4_text",
        {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16},
        {"method": "p_tuning"},
        "without providing `input_ids`",
    ),
    "virtual-positions": (
        "opt",
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        {"method": "prompt"},
        "index out of range",
    ),
    "prefix-checkpointing": (
        "llama",
        {},
        {"method": "prefix", "gradient_checkpointing": True},
        "does not work with gradient checkpointing",
    ),
    "prefix-latent": ("deepseek_v3", LATENT, {"method": "prefix"}, "Sizes of tensors must match"),
    "llama-adapter-family": ("qwen3", {}, {"method": "llama_adapter"}, "Unsupported model type"),
    "llama-adapter-heads": ("llama", {"head_dim": 16}, {"method": "llama_adapter"}, "is invalid for input"),
    "llama-adapter-layers": (
        "llama",
        {},
        {"method": "llama_adapter", "virtual_tokens": {"layers": 3}},
        "more adapter layers '3' than the model has '2'",
    ),
}
"""Family, settings of the model, section train, and the end of it."""


def force(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (job, train):
        monkeypatch.setattr(module, "check_supported", lambda config: None)


def refused_by(rule: str, config: PipelineConfig) -> PipelineConfig:
    assert rule in [problem.partition(":")[0] for problem in refusals(config)]
    with pytest.raises(RefusedError, match=rule):
        run_training(config)
    return config


@pytest.mark.parametrize("rule", FAILING)
def test_it_fails(tmp_path: Path, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, architecture, settings, problem = FAILING[rule]
    base = write_model(tmp_path / "base", family, **architecture)
    config = tiny_run(tmp_path, model={"path": str(base)}, train={"max_steps": 5, **settings})
    refused_by(rule, config)
    force(monkeypatch)
    with pytest.raises((RefusedError, IndexError, RuntimeError, ValueError), match=problem):
        run_training(config)


def test_over_a_merged_adapter_it_is_saved_for_another_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_run(tmp_path / "source", train={"max_steps": 8})
    adapter = source.run_root / "checkpoints" / run_training(source).key / "adapter"
    config = tiny_run(
        tmp_path,
        model={"adapter": str(adapter), "adapter_use": "merge"},
        train={"method": "prompt", "max_steps": 1, "virtual_tokens": {"count": 4}},
    )
    refused_by("virtual-tokens-merge", config)
    force(monkeypatch)
    result = run_training(config)
    assert config.model is not None
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    with outdated_names_allowed(), torch.no_grad():
        loaded = PeftModel.from_pretrained(base, plan_job(config).folder / "adapter").eval()
        documents = learnable_documents(6, seed=1)  # what tiny_run validates on
        total = sum(float(judged_loss(loaded, [document])) for document in documents)
    num_tokens = sum(end - start for document in documents for start, end, _ in document.spans)
    assert result.validation_loss is not None
    assert total / num_tokens - result.validation_loss > 0.1


def test_processes_would_run_the_model_unequally_often(tmp_path: Path) -> None:
    """Why strategies that exchange something in each pass are refused: one process would wait for another for ever."""
    refused_by("unpacked-strategy", tiny_run(tmp_path, train={"batches": "unpacked", "strategy": "zero2"}))
    found = plan_job(tiny_run(tmp_path, train={"batches": "unpacked", "strategy": "ddp", "bins_per_step": 4}))
    plan = found.plans[0]

    def num_passes(step: Any, rank: int) -> int:
        own = micro_steps(plan, step, bins_per_micro_step=1, rank=rank, num_ranks=2)
        return sum(
            len(
                list(
                    computed_batches(
                        plan,
                        found.reader,
                        part.first_bin,
                        part.end_bin,
                        tokens_per_bin=found.padded_tokens_per_bin,
                    )
                )
            )
            for part in own
        )

    passes = np.array([[num_passes(step, rank) for rank in (0, 1)] for step in found.steps])
    assert (passes[:, 0] != passes[:, 1]).any()
