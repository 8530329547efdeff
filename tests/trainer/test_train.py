"""A whole training of a tiny model: it learns, only what should is trained, and what it leaves is what it was."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines import storage
from schemas.errors import ConfigError, InputError, IntegrityError, RefusedError, TrainingError
from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer.tiny_models import (
    Document,
    learnable_documents,
    tiny_run,
    write_model,
    write_plans,
    write_shards,
)
from trainer import stepping
from trainer import train as train_module
from trainer.attention import use_plain_attention
from trainer.draws import draw_seed
from trainer.job import plan_job
from trainer.model import load_adapter, load_base_model
from trainer.model_files import model_digest
from trainer.stepping import StepOutcome
from trainer.train import train


def training_folder(config: PipelineConfig, result: TrainingResult) -> Path:
    return config.run_root / "checkpoints" / result.key


def adapter(config: PipelineConfig, result: TrainingResult) -> dict[str, torch.Tensor]:
    return load_file(training_folder(config, result) / "adapter" / "adapter_model.safetensors")


def metrics(config: PipelineConfig, result: TrainingResult) -> list[dict[str, Any]]:
    text = (training_folder(config, result) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def placed_models(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """Grows by the model of each training: the object itself, as it was trained."""
    seen: list[torch.nn.Module] = []
    original = train_module.place

    def place(job: Any, model: torch.nn.Module) -> torch.nn.Module:
        seen.append(original(job, model))
        return seen[-1]

    monkeypatch.setattr(train_module, "place", place)
    return seen


def test_the_loss_falls_on_data_that_can_be_learned(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, epochs=6, train={"learning_rate": 2e-2})
    result = train(config)
    steps = [line for line in metrics(config, result) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, result.num_steps + 1))
    losses = [line["loss"] for line in steps]
    assert losses[0] == result.first_loss
    assert losses[-1] == result.last_loss
    assert sum(losses[-3:]) / 3 < 0.4 * losses[0]
    assert result.validation_loss is not None
    assert result.validation_loss < 0.5 * losses[0]
    assert result.num_tokens == sum(line["num_tokens"] for line in steps)
    assert result.num_trained_tokens == sum(line["num_trained_tokens"] for line in steps)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's, not ours
@pytest.mark.parametrize(
    ("dtype", "kernels", "rounding"),
    [
        ("float32", "plain", 0.0),
        ("bfloat16", "plain", 0.0),
        ("float32", "auto", 1e-5),
        ("bfloat16", "auto", 0.1),
    ],
)
def test_the_saved_adapter_gives_the_trained_models_logits_in_plain_peft(
    tmp_path: Path, dtype: Any, kernels: str, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = placed_models(monkeypatch)
    config = tiny_run(tmp_path, model={"dtype": dtype}, train={"kernels": kernels})
    folder = training_folder(config, train(config)) / "adapter"
    trained = seen[0].eval()
    use_plain_attention(trained)
    assert config.model is not None
    plain = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=getattr(torch, dtype))
    untrained_logits = plain(input_ids=torch.arange(3, 40)[None]).logits
    loaded = PeftModel.from_pretrained(plain, folder, autocast_adapter_dtype=False).eval()
    logits = loaded(input_ids=torch.arange(3, 40)[None]).logits
    of_trained = trained(input_ids=torch.arange(3, 40)[None]).logits
    assert (logits - of_trained).norm() <= rounding * of_trained.norm()
    assert (logits - untrained_logits).abs().max() > 0.1
    ours = load_adapter(load_base_model(config.model), folder).eval()
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    use_plain_attention(ours)
    assert torch.equal(ours(input_ids=torch.arange(3, 40)[None]).logits, logits)


def test_the_adapter_folder_has_what_a_server_needs(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    config = tiny_run(tmp_path, split={"max_tokens": 64, "chat_template": str(tmp_path / "own.jinja")})
    result = train(config)
    folder = training_folder(config, result) / "adapter"
    assert config.model is not None
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == config.model.path
    assert settings["inference_mode"] is True
    assert settings["target_modules"] == sorted(settings["target_modules"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "red cat"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "[user]red cat"
    assert {entry.path.split("/")[0] for entry in result.files} == {"adapter"}
    for entry in result.files:
        storage.check_file(training_folder(config, result), entry)
    assert (config.run_root / "checkpoints" / "current").read_text() == f"{result.key}\n"
    assert not list(training_folder(config, result).glob(".tmp-*"))


def test_only_adapters_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = placed_models(monkeypatch)
    config = tiny_run(tmp_path)
    assert config.model is not None
    result = train(config)
    before = AutoModelForCausalLM.from_pretrained(config.model.path).state_dict()
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in seen[0].named_parameters()
    }
    for name, weight in before.items():
        assert torch.equal(weight, after[name]), name
    trained = {name for name, parameter in after.items() if parameter.requires_grad}
    assert trained == set(after) - set(before)
    assert result.num_trainable_weights == sum(after[name].numel() for name in trained)
    for name, tensor in adapter(config, result).items():
        assert tensor.abs().max() > 0, name


def test_full_tuning_leaves_a_model_that_plain_transformers_loads(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"method": "full", "learning_rate": 3e-3, "max_steps": 4})
    assert config.model is not None
    generation = Path(config.model.path) / "generation_config.json"
    odd = json.loads(generation.read_text()) | {"do_sample": False, "temperature": 0.6}
    generation.write_text(json.dumps(odd))  # some published models have this; saving it is an error in places
    result = train(config)
    folder = training_folder(config, result) / "model"
    assert (folder / "generation_config.json").read_bytes() == generation.read_bytes()
    before = AutoModelForCausalLM.from_pretrained(config.model.path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    after, report = loaded
    assert not report["missing_keys"]
    changed = [
        name
        for name, weight in after.state_dict().items()
        if not torch.equal(weight, before.state_dict()[name])
    ]
    assert len(changed) == len(before.state_dict())
    assert after.config.to_dict() | {"_name_or_path": ""} == before.config.to_dict() | {"_name_or_path": ""}
    assert AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize("train_settings", [{}, {"method": "full", "learning_rate": 1e-3}])
def test_the_result_does_not_depend_on_how_a_step_is_cut_into_micro_steps(
    tmp_path: Path, train_settings: dict[str, Any]
) -> None:
    found = []
    for bins in (1, 8):
        config = tiny_run(
            tmp_path / str(bins),
            train={**train_settings, "bins_per_step": 8, "bins_per_micro_step": bins, "max_steps": 2},
            model={"path": str(write_model(tmp_path / "model"))},
        )
        result = train(config)
        found.append((result, metrics(config, result)))
    (one, one_metrics), (eight, eight_metrics) = found
    assert one.key == eight.key
    for ours, theirs in zip(one_metrics, eight_metrics, strict=True):
        for name in ("loss", "grad_norm", "validation_loss"):
            if name in ours:
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_two_trainings_of_the_same_work_have_the_same_bytes(tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        config = tiny_run(
            tmp_path / name,
            train={"lora": {"dropout": 0.2}, "max_steps": 6},
            model={"path": str(write_model(tmp_path / "model"))},
        )
        results.append(train(config))
    assert results[0] == results[1]


def test_dropout_draws_hang_on_seed_step_and_bin_alone() -> None:
    seeds = {draw_seed(seed, step, bin) for seed in range(3) for step in range(20) for bin in range(8)}
    assert len(seeds) == 3 * 20 * 8
    assert draw_seed(1, 2, 3) == draw_seed(1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_finished_training_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(tmp_path)
    result = train(config)
    before = {path: path.stat().st_mtime_ns for path in config.run_root.rglob("*") if path.is_file()}
    assert train(config) == result
    assert "nothing to do" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in config.run_root.rglob("*") if path.is_file()} == before


def test_a_finished_training_whose_adapter_was_changed_is_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"max_steps": 2})
    result = train(config)
    path = training_folder(config, result) / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        train(config)


def test_the_key_is_of_what_shapes_the_weights(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    key = plan_job(config).key

    def with_train(**values: Any) -> str:
        return plan_job(config.model_copy(update={"train": config.train.model_copy(update=values)})).key

    assert with_train(checkpoint_every_steps=7, keep_checkpoints=9, evaluate_every_steps=3) == key
    assert with_train(learning_rate=0.5) != key
    assert with_train(seed=1) != key
    chats = {"train": learnable_documents(40, seed=9), "validation": learnable_documents(6, seed=1)}
    write_shards(config.run_root, chats)
    write_plans(config.run_root, chats)
    assert plan_job(config).key != key


def test_caps_are_announced_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_steps = train(tiny_run(tmp_path, train={"max_steps": 3}))
    assert by_steps.num_steps == 3
    assert "3 steps, capped from" in capsys.readouterr().err
    by_tokens = train(tiny_run(tmp_path, train={"max_tokens": by_steps.num_tokens}))
    assert by_tokens.num_steps == 3
    with pytest.raises(TrainingError, match=r"train\.max_tokens 3"):
        train(tiny_run(tmp_path, train={"max_tokens": 3}))


def test_validation_is_logged_on_its_steps_and_at_the_end(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"evaluate_every_steps": 4, "max_steps": 10})
    result = train(config)
    lines = [line for line in metrics(config, result) if "validation_loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert lines[-1]["validation_loss"] == result.validation_loss
    assert lines[-1]["validation_bits_per_byte"] == result.validation_bits_per_byte
    # Three bytes a trained token, all weights 1: nats a token and bits a byte are one number in two units.
    assert result.validation_loss == pytest.approx(3 * math.log(2) * (result.validation_bits_per_byte or 0))


def test_without_a_validation_side_there_is_no_validation_loss(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"max_steps": 1})
    chats: dict[str, list[Document]] = {"train": learnable_documents(10), "validation": []}
    write_shards(config.run_root, chats)
    write_plans(config.run_root, chats)
    assert train(config).validation_loss is None


def test_steps_that_are_not_finite_are_skipped_counted_and_in_the_end_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = stepping.summed_loss
    poisoned = {3, 5}

    def poison(model: torch.nn.Module, batch: Any, **options: Any) -> torch.Tensor:
        loss = original(model, batch, **options)
        return loss * math.nan if torch.initial_seed() in bad_seeds else loss

    config = tiny_run(tmp_path, train={"max_steps": 8, "max_nonfinite_steps": 2})
    steps = plan_job(config).steps
    bad_seeds = {draw_seed(0, number, steps[number].first_bin) for number in poisoned}
    monkeypatch.setattr(stepping, "summed_loss", poison)
    result = train(config)
    assert result.num_steps == 8
    assert result.num_updates == 6
    lines = [line for line in metrics(config, result) if "loss" in line]
    assert [line["step"] - 1 for line in lines if line["loss"] is None] == [3, 5]
    assert all(tensor.isfinite().all() for tensor in adapter(config, result).values())
    strict = tiny_run(tmp_path, train={"max_steps": 7, "max_nonfinite_steps": 1, "checkpoint_every_steps": 2})
    with pytest.raises(TrainingError, match="not finite in 2 of 6 steps, allowed are 1"):
        train(strict)
    # What was good before the fault is kept.
    assert (plan_job(strict).folder / "latest").read_text() == "step-00000004\n"


def test_an_outcome_is_finite_only_when_both_numbers_are() -> None:
    assert StepOutcome(loss=1.0, grad_norm=1.0, learning_rate=0.1).is_finite
    assert not StepOutcome(loss=math.nan, grad_norm=1.0, learning_rate=0.1).is_finite
    assert not StepOutcome(loss=1.0, grad_norm=math.inf, learning_rate=0.1).is_finite


def test_a_step_without_trained_tokens_changes_nothing(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"bins_per_step": 1})
    untrained = Document(list(range(5, 55)), [])
    some: dict[str, list[Document]] = {"train": [untrained, *learnable_documents(3)], "validation": []}
    write_shards(config.run_root, some)
    write_plans(config.run_root, some)
    result = train(config)
    assert result.num_updates == result.num_steps - 1
    nothing: dict[str, list[Document]] = {"train": [untrained], "validation": []}
    write_shards(config.run_root, nothing)
    write_plans(config.run_root, nothing)
    with pytest.raises(TrainingError, match="none of the 50 tokens is trained"):
        train(config)


# Refused before work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["q_prj"], "nearest: q_proj"), (["q_proj", "gate"], "'gate'"), (".*nothing", "known:")],
)
def test_a_target_that_matches_nothing_is_refused_with_the_nearest_names(
    tmp_path: Path, targets: Any, message: str
) -> None:
    with pytest.raises(RefusedError, match=message):
        train(tiny_run(tmp_path, train={"lora": {"targets": targets}}))


def test_named_targets_are_the_only_ones_trained(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"lora": {"targets": ["q_proj", "down_proj"]}, "max_steps": 1})
    names = adapter(config, train(config))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "down_proj"}


def test_a_missing_chat_template_is_found_before_training(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, split={"max_tokens": 64, "chat_template": str(tmp_path / "absent.jinja")})
    with pytest.raises(ConfigError, match=r"absent\.jinja is not a readable UTF-8 file"):
        train(config)
    assert not list(config.run_root.glob("checkpoints/*/metrics.jsonl"))


def test_models_that_can_run_code_or_lack_weights_are_refused(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    assert config.model is not None
    folder = Path(config.model.path)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(InputError, match="auto_map"):
        train(config)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin, a pickle"):
        train(config)


def test_a_missing_weight_is_an_error_and_not_a_random_one(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = tiny_run(tmp_path)
    assert config.model is not None
    path = Path(config.model.path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"first model\.layers\.1\.mlp\.up_proj\.weight"):
        train(config)


def test_a_model_is_known_by_its_config_and_weights(tmp_path: Path) -> None:
    digest = model_digest(write_model(tmp_path / "a"))
    assert model_digest(write_model(tmp_path / "b")) == digest
    assert model_digest(write_model(tmp_path / "c", seed=1)) != digest
    assert model_digest(write_model(tmp_path / "d", max_position_embeddings=512)) != digest


def test_cuda_is_refused_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RefusedError, match="no CUDA device"):
        train(tiny_run(tmp_path, model={"device": "cuda"}))
