"""Averaged weights are what is validated, published and consolidated, while training goes on with its own.

And trainings with every optimiser go on after a crash to the same bytes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer.tiny_models import tiny_run, write_model
from trainer.attention import use_packed_attention
from trainer.checkpoint import read_checkpoint
from trainer.consolidate import consolidate
from trainer.job import plan_job
from trainer.loss import split_loss
from trainer.metrics import Metrics
from trainer.model import outdated_names_allowed
from trainer.train import train

AVERAGING: dict[str, dict[str, Any]] = {
    "ema": {"ema_decay": 0.9},
    "schedule_free": {"optimizer": "schedule_free", "schedule": "constant"},
}


def run_of(folder: Path, *, dtype: str = "float32", **settings: Any) -> PipelineConfig:
    """Run roots beside each other share the model."""
    model = folder.parent / "model"
    if not model.exists():
        write_model(model)
    common: dict[str, Any] = {"checkpoint_every_steps": 3, "evaluate_every_steps": 4, "max_steps": 8}
    return tiny_run(folder, train=common | settings, model={"path": str(model), "dtype": dtype})


def lines_of(config: PipelineConfig) -> list[dict[str, Any]]:
    path = plan_job(config).folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", AVERAGING)
def test_what_is_published_and_validated_is_the_average(tmp_path: Path, name: str) -> None:
    config = run_of(tmp_path / "run", **AVERAGING[name])
    result = train(config)
    job = plan_job(config)
    published = load_file(job.folder / "adapter" / "adapter_model.safetensors")
    last = read_checkpoint(job.folder / "step-00000008", facts=None)
    for tensor_name, tensor in published.items():
        in_checkpoint = tensor_name.replace(".weight", ".default.weight")
        average, own = (last.read(kind, in_checkpoint, 0, tensor.numel()) for kind in ("average", "weight"))
        assert average is not None
        assert own is not None
        assert torch.equal(average.view(tensor.shape), tensor)
        assert not torch.equal(average, own)
    consolidated = consolidate(config, out=tmp_path / "consolidated")
    assert (consolidated / "adapter_model.safetensors").read_bytes() == (
        job.folder / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    assert result.validation_loss == pytest.approx(loss_of_published(config), abs=1e-5)


def loss_of_published(config: PipelineConfig) -> float:
    """Plain PEFT loads it."""
    job = plan_job(config)
    base = AutoModelForCausalLM.from_pretrained(job.model.path)
    with outdated_names_allowed():
        model = PeftModel.from_pretrained(base, job.folder / "adapter")
    use_packed_attention(model)
    assert job.validation is not None
    return split_loss(model, *job.validation, device=job.device).loss


@pytest.mark.parametrize("name", AVERAGING)
def test_validating_changes_no_step(tmp_path: Path, name: str) -> None:
    losses = []
    for every in (0, 1):
        config = run_of(tmp_path / str(every), evaluate_every_steps=every, **AVERAGING[name])
        train(config)
        losses.append([line["loss"] for line in lines_of(config) if "loss" in line])
    assert losses[0] == losses[1]


def test_the_best_average_is_published_where_the_best_is_kept(tmp_path: Path) -> None:
    config = run_of(
        tmp_path / "run",
        ema_decay=0.5,
        learning_rate=0.5,
        schedule="constant",
        keep_best=True,
        evaluate_every_steps=1,
        max_steps=7,
    )
    result = train(config)
    assert result.output_step not in (None, result.num_steps)
    values = {line["step"]: line["validation_loss"] for line in lines_of(config) if "validation_loss" in line}
    assert loss_of_published(config) == pytest.approx(values[result.output_step or 0], abs=1e-4)


# Resumed ----------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here, as far as training can see."""


FULL: dict[str, Any] = {"method": "full", "learning_rate": 1e-3, "low_rank": {"rank": 4, "every_updates": 3}}
RESUMED: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_bf16": ("bfloat16", FULL),
    "adamw_8bit": ("float32", FULL),
    "lion": ("bfloat16", {"neftune_alpha": 5.0, "label_smoothing": 0.1, "learning_rate": 1e-3}),
    "schedule_free": ("bfloat16", {"schedule": "constant"}),
    "muon": ("float32", FULL | {"ema_decay": 0.9}),
    "galore": ("float32", FULL),
    "apollo": ("bfloat16", FULL),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("schedule_free", "adamw_8bit") else pytest.mark.stress)
        for name in RESUMED
    ],
)
def test_a_run_that_ended_in_the_middle_goes_on_to_the_same_bytes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, settings = RESUMED[name]
    settings = {"optimizer": name, "evaluate_every_steps": 0, **settings}
    unbroken = run_of(tmp_path / "unbroken", dtype=dtype, **settings)
    expected = train(unbroken)
    assert falls(unbroken)
    broken = run_of(tmp_path / "broken", dtype=dtype, **settings)
    with monkeypatch.context() as patch:
        original = Metrics.log_step

        def crash(self: Metrics, record: dict[str, Any]) -> None:
            original(self, record)
            if record["step"] == 5:
                raise Crash

        patch.setattr(Metrics, "log_step", crash)
        with pytest.raises(Crash):
            train(broken)
    found: TrainingResult = train(broken)
    assert found == expected  # names every output file with its sha256


def falls(config: PipelineConfig) -> bool:
    losses = [line["loss"] for line in lines_of(config) if "loss" in line]
    return bool(losses[-1] < losses[0])
