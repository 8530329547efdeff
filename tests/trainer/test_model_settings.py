"""What the section model makes of a model's files: stretched positions, drawn weights. Judge: transformers by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from schemas.pipeline_config import PipelineConfig
from schemas.training_config import ModelConfig
from tests.trainer.matrix_rows import read_losses
from tests.trainer.rank_groups import train_with_two_processes
from tests.trainer.tiny_models import tiny_run, tiny_tokenizer, write_model
from trainer.evaluation import evaluate
from trainer.job import plan_job
from trainer.model import load_base_model
from trainer.promotion import promote
from trainer.random_weights import RandomWeights
from trainer.train import train
from trainer.weights import model_without_weights

POSITIONS = 256
LINEAR = {"type": "linear", "factor": 2.0}
TOKENS = {"new_tokens": ["<|tool|>", "zebra", "C"]}
FULL = {"method": "full", "learning_rate": 1e-3}
IDS = (torch.arange(3 * POSITIONS) * 7 % 57 + 3)[None]
BY_HAND: dict[str, dict[str, Any]] = {
    "linear": {},
    "dynamic": {},
    "yarn": {"original_max_position_embeddings": POSITIONS},
    "llama3": {
        "original_max_position_embeddings": POSITIONS,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    logits: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits
    return logits


@pytest.mark.parametrize("kind", BY_HAND)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_positions_are_stretched_as_transformers_says(tmp_path: Path, family: str, kind: str) -> None:
    folder = write_model(tmp_path / "model", family)
    scaling: Any = {"type": kind, "factor": 4}
    ours = load_base_model(ModelConfig(path=str(folder), rope_scaling=scaling), dtype=torch.float32)
    positions = POSITIONS if kind == "dynamic" else 4 * POSITIONS
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, **BY_HAND[kind]}
    config = AutoConfig.from_pretrained(folder, rope_parameters=rope, max_position_embeddings=positions)
    plain = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    assert torch.equal(logits_of(ours), logits_of(plain))
    unscaled = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not torch.allclose(logits_of(ours), logits_of(unscaled), atol=0.1)
    assert ours.config.max_position_embeddings == positions


def test_layers_of_a_sliding_window_keep_their_angles(tmp_path: Path) -> None:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    folder = write_model(tmp_path / "model", "gemma3_text", **layers)
    scaling: Any = {"type": "linear", "factor": 4}
    ours: Any = load_base_model(ModelConfig(path=str(folder), rope_scaling=scaling), dtype=torch.float32)
    plain: Any = load_base_model(ModelConfig(path=str(folder)), dtype=torch.float32)
    found, expected = ours.model.rotary_emb, plain.model.rotary_emb
    assert torch.equal(found.sliding_attention_inv_freq, expected.sliding_attention_inv_freq)
    assert torch.allclose(found.full_attention_inv_freq, expected.full_attention_inv_freq / 4)


def test_the_key_and_the_record_of_a_training_name_what_was_changed(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    scaled = config.model_copy(
        update={"model": ModelConfig.model_validate({**model_of(config), "rope_scaling": LINEAR})}
    )
    assert plan_job(config).key != plan_job(scaled).key
    assert json.loads(plan_job(scaled).inputs["model_rope_scaling"]) == LINEAR
    assert set(plan_job(config).inputs) == {"06_shards", "07_plan", "model"}


def model_of(config: PipelineConfig) -> dict[str, Any]:
    assert config.model is not None
    return config.model.model_dump()


# Drawn weights ----------------------------------------------------------------------------------------------


def empty_folder(folder: Path, **settings: Any) -> Path:
    """A model without its weights."""
    write_model(folder, **settings)
    (folder / "model.safetensors").unlink()
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"base": "nf4"}, {"method": "full"}, {"method": "expand", "expand": {"new_layers": 1}}],
    ids=str,
)
def test_a_training_runs_without_any_weights_and_is_not_promoted(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = empty_folder(tmp_path / "model")
    model = {"path": str(folder), "init": "random"}
    config = tiny_run(tmp_path, model=model, train={"max_steps": 6, "learning_rate": 1e-3} | settings)
    result = train(config)
    assert result.last_loss is not None
    assert result.first_loss is not None
    assert result.last_loss < result.first_loss
    if settings.get("method") != "expand":
        evaluate(config)
        assert "model.init is random" in promote(config).explanation


def test_all_strategies_draw_the_same_weights(tmp_path: Path) -> None:
    """One process draws the whole of a weight; where it is cut, each process draws its part by its name."""
    folder = empty_folder(tmp_path / "model", tie_word_embeddings=True)
    settings = ModelConfig(path=str(folder), init="random")
    loaded = load_base_model(settings, dtype=torch.float32)
    assert model_without_weights(settings, dtype=torch.float32) is not None
    for name, parameter in loaded.named_parameters():
        flat, third = parameter.detach().flatten(), parameter.numel() // 3
        assert torch.equal(RandomWeights().read(name, third, 2 * third), flat[third : 2 * third]), name
    norm, matrix = (
        loaded.get_parameter(f"model.{name}.weight").detach() for name in ("norm", "layers.0.mlp.up_proj")
    )
    assert float(norm.min()) == float(norm.max()) == 1
    assert 0.015 < float(matrix.std()) < 0.025


# Over several processes -------------------------------------------------------------------------------------

OVER_PROCESSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "drawn fsdp2": ({"init": "random"}, {"strategy": "fsdp2", "shard_base": "always"}),
    "drawn zero3": ({"init": "random"}, {"strategy": "zero3"}),
    "drawn nf4 fsdp2": (
        {"init": "random"},
        {"strategy": "fsdp2", "shard_base": "always", "base": "nf4"},
    ),
    "tokens ddp": (TOKENS, {"strategy": "ddp"}),
    "tokens zero2": (TOKENS, {"strategy": "zero2"}),
    "tokens full fsdp2": (TOKENS, {"strategy": "fsdp2", **FULL}),
    "tokens full zero3": (TOKENS, {"strategy": "zero3", **FULL}),
    "stretched fsdp2": ({"rope_scaling": LINEAR}, {"strategy": "fsdp2", "shard_base": "always"}),
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("drawn zero3", "tokens ddp", "tokens full fsdp2"), marks=pytest.mark.stress, id="some"),
        pytest.param(tuple(OVER_PROCESSES), marks=pytest.mark.hard, id="all"),
    ],
)
def test_two_processes_train_what_one_does(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_model(tmp_path / "model", vocab_size=295)
    single: dict[str, PipelineConfig] = {}
    double: dict[str, PipelineConfig] = {}
    for name in names:
        model, settings = OVER_PROCESSES[name]
        common = {"max_steps": 3, "bins_per_step": 3, "lora": {"rank": 4}}
        alone = {key: settings[key] for key in ("method", "base", "learning_rate") if key in settings}
        for configs, changes in ((single, alone), (double, settings | {"num_processes": 2})):
            place = tmp_path / f"{name} {len(changes)}"
            path = {"path": str(tmp_path / "model")}
            configs[name] = tiny_run(place, model=path | model, train=common | changes)
    for config in single.values():
        train(config)
    train_with_two_processes(double, tmp_path / "extensions")
    for name, config in double.items():
        found, expected = read_losses(config), read_losses(single[name])
        assert found == pytest.approx(expected, abs=1e-5), name
