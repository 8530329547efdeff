"""float16 with a loss scale: losses beside fp32's, overflows that really happen, a resume that goes on exactly."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer.tiny_models import tiny_run
from trainer import loss_scale
from trainer.checkpoint import Progress
from trainer.dtypes import resolve_dtype
from trainer.job import plan_job
from trainer.loss_scale import INITIAL_SCALE, MAX_SCALE, MIN_SCALE, after_step, is_overflow
from trainer.train import train

STEPS = {"max_steps": 8, "checkpoint_every_steps": 4, "keep_checkpoints": 9}


def run_of(folder: Path, dtype: str, **settings: Any) -> PipelineConfig:
    return tiny_run(folder, epochs=2, model={"dtype": dtype}, train=STEPS | settings)


def lines_of(config: PipelineConfig, result: TrainingResult) -> list[dict[str, Any]]:
    path = config.run_root / "checkpoints" / result.key / "metrics.jsonl"
    return [line for line in map(json.loads, path.read_text().splitlines()) if "loss" in line]


def adapter_of(config: PipelineConfig, result: TrainingResult) -> dict[str, torch.Tensor]:
    return load_file(config.run_root / "checkpoints" / result.key / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("base", ["plain", "int8", "nf4"])
def test_losses_of_lora_are_those_of_fp32(tmp_path: Path, base: str) -> None:
    losses = {}
    for dtype in ("float32", "float16"):
        config = run_of(tmp_path / dtype, dtype, base=base)
        result = train(config)
        assert (result.dtype, result.num_updates, result.num_overflow_steps) == (dtype, 8, 0)
        losses[dtype] = [line["loss"] for line in lines_of(config, result)]
    # Weights that were rounded to fp16 fall on other numbers of 4 or 8 bits here and there.
    limit = {"plain": 5e-3, "int8": 0.02, "nf4": 0.05}[base]
    assert losses["float16"] == pytest.approx(losses["float32"], abs=limit)
    assert losses["float16"] != losses["float32"]
    assert losses["float16"][-1] < losses["float16"][0] - 0.5


def test_what_is_trained_adds_up_in_fp32(tmp_path: Path) -> None:
    """An update of 1e-6 is lost in fp16 beside a weight of 0.1: with masters the weights still move."""
    config = run_of(tmp_path, "float16", learning_rate=1e-6, schedule="constant", warmup_steps=0)
    job = plan_job(config)
    result = train(config)
    first, last = (job.folder / f"step-{number:08d}" for number in (4, 8))
    for before, after in zip(
        sorted(first.glob("*.safetensors")), sorted(last.glob("*.safetensors")), strict=True
    ):
        changed = [n for n, t in load_file(before).items() if not torch.equal(t, load_file(after)[n])]
        assert len(changed) == len(load_file(before))
    assert {tensor.dtype for tensor in adapter_of(config, result).values()} == {torch.float16}


def test_overflows_halve_the_scale_and_are_counted_apart(tmp_path: Path) -> None:
    """Full tuning of this model has gradients whose 65,536-fold is above fp16's largest number, 65,504."""
    settings = {"method": "full", "learning_rate": 1e-4, "max_nonfinite_steps": 0}
    config = run_of(tmp_path, "float16", **settings)
    result = train(config)
    lines = lines_of(config, result)
    skipped = [line for line in lines if line["grad_norm"] is None]
    assert 1 <= len(skipped) == result.num_overflow_steps < 8
    assert result.num_updates == 8 - result.num_overflow_steps
    scales = [line["loss_scale"] for line in lines]
    assert scales == sorted(scales, reverse=True)
    assert (scales[0], scales[-1]) == (INITIAL_SCALE, INITIAL_SCALE / 2 ** len(skipped))
    assert all(line["loss"] is not None for line in lines)


def test_a_resumed_training_goes_on_with_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale has been halved before the checkpoint and is doubled after it."""
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    config = run_of(tmp_path / "whole", "float16", method="full", learning_rate=1e-4)
    result = train(config)
    scales = [line["loss_scale"] for line in lines_of(config, result)]
    assert scales[4] < scales[0]
    assert max(scales[5:]) > scales[4]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    again = config.model_copy(update={"run_root": tmp_path / "again" / "run"})
    folder = again.run_root / "checkpoints" / result.key
    (folder / "training.json").unlink()
    shutil.rmtree(folder / "step-00000008")
    resumed = train(again)
    facts = ("step", "loss", "grad_norm", "learning_rate", "loss_scale")
    of_whole, of_resumed = (
        [[line[name] for name in facts] for line in lines_of(run, found)]
        for run, found in ((config, result), (again, resumed))
    )
    assert of_resumed[4:] == of_whole[4:]
    assert resumed.files == result.files


def test_a_loss_that_is_not_finite_is_no_overflow() -> None:
    assert is_overflow(1.0, math.inf, 2.0)
    assert is_overflow(1.0, math.nan, 2.0)
    assert not is_overflow(math.nan, math.nan, 2.0)
    assert not is_overflow(1.0, math.inf, MIN_SCALE)
    assert not is_overflow(1.0, 3.0, 2.0)


def test_the_scale_grows_after_many_good_steps_and_stays_in_its_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    progress = Progress()
    scales = []
    for overflowed in (False, False, True, False, False, False, False):
        scale = loss_scale.loss_scale(progress, torch.float16)
        scales.append(scale)
        progress = after_step(progress, scale, overflowed=overflowed)
    start = INITIAL_SCALE
    assert scales == [start, start, start, start / 2, start / 2, start / 2, start]
    assert progress.num_overflow_steps == 1
    low = dataclasses.replace(progress, loss_scale=MIN_SCALE)
    assert after_step(low, MIN_SCALE, overflowed=True).loss_scale == MIN_SCALE
    high = dataclasses.replace(progress, num_steps_at_scale=2)
    assert after_step(high, MAX_SCALE, overflowed=False).loss_scale == MAX_SCALE
    assert loss_scale.loss_scale(progress, torch.bfloat16) == 1.0


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float16),
        ((7, 0), torch.float16),
        ((6, 1), torch.float32),
    ],
)
def test_auto_takes_the_precision_that_tensor_cores_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = tiny_run(tmp_path, model={"dtype": "auto"})
    assert config.model is not None
    assert resolve_dtype(config.model, torch.device("cuda", 0)) == expected
