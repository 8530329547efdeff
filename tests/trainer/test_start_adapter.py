"""Trainings that start from an adapter. Judges: PEFT's own merge, plain PEFT over the unmerged base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from schemas.errors import RefusedError
from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer.tiny_models import learnable_documents, tiny_run
from trainer.building import load_model
from trainer.evaluation import evaluate
from trainer.job import plan_job
from trainer.model import load_adapter, load_base_model
from trainer.start_adapter import merge_into
from trainer.support import refusals
from trainer.train import train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
IDS = torch.tensor([learnable_documents(1)[0].ids])


def run_of(folder: Path, *, model: dict[str, Any] | None = None, **settings: Any) -> PipelineConfig:
    return tiny_run(folder, model=model, train={"max_steps": 4, **settings}, num_documents=24)


def base_of(config: PipelineConfig) -> Any:
    assert config.model is not None
    return AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)


def foreign_adapter(config: PipelineConfig, folder: Path, **settings: Any) -> Path:
    """As another program leaves one: half of the layers, another rank, its B not zero."""
    wrapped = get_peft_model(
        base_of(config),
        LoraConfig(
            r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings
        ),
    )
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def output_of(config: PipelineConfig) -> tuple[TrainingResult, Path]:
    result = train(config)
    return result, config.run_root / "checkpoints" / result.key / result.output


def test_a_continued_adapter_begins_where_it_was(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    adapter = foreign_adapter(config, tmp_path / "adapter")
    start = run_of(tmp_path, model={"adapter": str(adapter)}, learning_rate=1e-12)
    result, output = output_of(start)
    saved, given = (load_file(folder / "adapter_model.safetensors") for folder in (output, adapter))
    assert set(saved) == set(given)
    assert all(torch.allclose(saved[name], given[name], atol=1e-9) for name in given)
    settings = json.loads((output / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 9)
    assert result.inputs["adapter_continue"] != result.inputs["model"]


def test_a_continued_adapter_learns_on(tmp_path: Path) -> None:
    """Two trainings of four steps, the second from the first one's adapter, fall below what the first one reached."""
    first, output = output_of(run_of(tmp_path, lora={"rank": 4}))
    second, _ = output_of(run_of(tmp_path, model={"adapter": str(output.parent)}))
    assert second.key != first.key
    assert second.first_loss is not None
    assert first.first_loss is not None
    assert second.first_loss < first.first_loss - 0.2


def test_merging_adds_what_peft_adds(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    adapter = foreign_adapter(config, tmp_path / "adapter", use_rslora=True)
    merged = base_of(config)
    merge_into(merged, adapter)
    expected = PeftModel.from_pretrained(base_of(config), adapter).merge_and_unload()
    for name, parameter in expected.named_parameters():
        assert torch.allclose(merged.get_parameter(name), parameter, atol=1e-6), name
    assert not torch.allclose(logits(merged), logits(base_of(config)), atol=1e-3)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"], ["v_proj"]], ids=str)
def test_what_is_saved_after_a_merge_is_both_adapters_over_the_unmerged_base(
    tmp_path: Path, targets: str | list[str]
) -> None:
    """The judge merges by PEFT and lays the new half over it by hand, from the checkpoint's fp32 weights."""
    config = run_of(tmp_path)
    adapter = foreign_adapter(config, tmp_path / "adapter")
    start = run_of(
        tmp_path,
        model={"adapter": str(adapter), "adapter_use": "merge"},
        lora={"rank": 4, "alpha": 4, "targets": targets, "modules_to_save": ["lm_head"]},
    )
    _, output = output_of(start)
    found = logits(PeftModel.from_pretrained(base_of(config), output))
    settings = json.loads((output / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (7, 7)
    expected_model = PeftModel.from_pretrained(base_of(config), adapter).merge_and_unload()
    saved = load_file(output / "adapter_model.safetensors")
    for name, tensor in saved.items():
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            up = saved[name.replace("lora_A", "lora_B")]
            with torch.no_grad():
                expected_model.get_submodule(module).weight += up[:, 3:] @ tensor[3:]
    with torch.no_grad():
        expected_model.lm_head.weight.copy_(saved["base_model.model.lm_head.weight"])
    assert torch.allclose(found, logits(expected_model), atol=1e-4)
    # The library of this package reads it as well, and its held-out loss is that of the trained model.
    assert start.model is not None
    ours = load_adapter(load_base_model(start.model), output)
    assert sum("lora_A" in name for name, _ in ours.named_parameters()) == sum(
        "lora_A" in name for name in saved
    )
    report = {model.label: model.total.loss for model in evaluate(start).models}
    assert report["candidate"] is not None
    assert report["base"] is not None
    assert report["candidate"] < report["base"]


def test_the_fresh_adapter_is_trained_over_the_merged_base(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    adapter = foreign_adapter(config, tmp_path / "adapter")
    start = run_of(tmp_path, model={"adapter": str(adapter), "adapter_use": "merge"}, max_steps=1)
    model = load_model(plan_job(start))
    expected = PeftModel.from_pretrained(base_of(config), adapter).merge_and_unload()
    assert torch.allclose(
        model.get_parameter("model.layers.0.self_attn.q_proj.weight"),
        expected.get_parameter("model.layers.0.self_attn.q_proj.weight"),
        atol=1e-6,
    )


def test_the_adapter_is_part_of_the_key(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    adapter = foreign_adapter(config, tmp_path / "adapter")
    uses = ("continue", "merge")
    keys = [plan_job(config).key]
    starts = [run_of(tmp_path, model={"adapter": str(adapter), "adapter_use": use}) for use in uses]
    keys += [plan_job(start).key for start in starts]
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    keys += [plan_job(start).key for start in starts]
    assert len(set(keys)) == 5


def test_an_adapter_over_another_base_is_refused(tmp_path: Path) -> None:
    _, output = output_of(run_of(tmp_path / "one"))
    other = tiny_run(tmp_path / "two", model_type="qwen2", model={"adapter": str(output)})
    with pytest.raises(RefusedError, match="was trained over another base model"):
        plan_job(other)
    moved = shutil.copytree(output, tmp_path / "moved")
    smaller = tiny_run(tmp_path / "three", model={"adapter": str(moved)})
    tensors = load_file(moved / "adapter_model.safetensors")
    small = {name: tensor[:, :2].contiguous() for name, tensor in tensors.items()}
    save_file(small, moved / "adapter_model.safetensors")
    with pytest.raises(RefusedError, match="it is of another model"):
        train(smaller)
    merge = tiny_run(tmp_path / "four", model={"adapter": str(moved), "adapter_use": "merge"})
    with pytest.raises(RefusedError, match="it is of another model"):
        train(merge)


@pytest.mark.parametrize(
    ("settings", "lora", "expected"),
    [
        ({}, {"rank": 8}, "adapter-contradiction: train.lora.rank is 8, the adapter's 3"),
        ({}, {"targets": ["v_proj"]}, "adapter-contradiction: train.lora.targets is ['v_proj']"),
        ({}, {"rank": 3, "alpha": 9, "targets": ["down_proj", "q_proj"]}, ""),
        ({"use_dora": True}, {}, "adapter-kind: model.adapter"),
        ({"bias": "all"}, {}, "it has bias 'all'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, settings: dict[str, Any], lora: dict[str, Any], expected: str
) -> None:
    config = run_of(tmp_path)
    adapter = foreign_adapter(config, tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    start = run_of(tmp_path, model={"adapter": str(adapter)}, lora=lora)
    problems = refusals(start)
    assert len(problems) == bool(expected)
    assert expected in "".join(problems)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"adapter: model\.adapter is .*: it holds no adapter_config"):
        train(run_of(tmp_path, model={"adapter": str(tmp_path)}))
