"""Skipped, given up, best, enough: decisions on made-up numbers, and a whole training that keeps them over a kill."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from schemas.errors import RefusedError, TrainingError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import TrainConfig
from tests.trainer.tiny_models import tiny_run, write_model
from trainer import judging, loop, stepping
from trainer import train as train_module
from trainer.checkpoint import Progress, read_checkpoint
from trainer.job import plan_job
from trainer.judging import FEWEST_STEPS, WINDOW_STEPS, advance, check_progress, judged, limits
from trainer.loss import SplitLoss
from trainer.stepping import StepOutcome
from trainer.steps import Step
from trainer.train import train

STEP = Step(0, 0, 0, 1, 10, 5, 5.0)
SPIKES = TrainConfig(max_loss_spike=3.0, max_grad_spike=5.0, max_spike_steps=2)


def after(*losses: float, train: TrainConfig = SPIKES) -> Progress:
    """Steps with these losses, gradient norm 2, each skipped or not as the limits say."""
    progress = Progress()
    for loss in losses:
        allowed = limits(progress, train).allow(loss, 2.0)
        outcome = StepOutcome(loss, 2.0, 1e-3, is_spike=math.isfinite(loss) and not allowed)
        progress = advance(progress, STEP, outcome)
    return progress


def test_a_loss_far_above_the_last_ones_is_skipped_counted_and_not_learnt_from() -> None:
    usual = after(*[1.0] * FEWEST_STEPS)
    assert limits(usual, SPIKES) == (3.0, 10.0)
    found = after(*[1.0] * FEWEST_STEPS, 2.9, 3.1, 1.0)
    assert (found.num_steps, found.num_updates, found.num_spike_steps) == (19, 18, 1)
    assert 3.1 not in found.recent_losses
    check_progress(found, SPIKES)
    with pytest.raises(TrainingError, match="far above the last steps' in 3 of 19 steps, allowed are 2"):
        check_progress(after(*[1.0] * FEWEST_STEPS, 9.0, 9.0, 9.0), SPIKES)


def test_before_anything_is_usual_and_by_default_nothing_is_a_spike() -> None:
    assert after(*[1.0] * (FEWEST_STEPS - 1), 99.0).num_spike_steps == 0
    assert after(*[1.0] * FEWEST_STEPS, 99.0, train=TrainConfig()).num_spike_steps == 0


def test_the_window_is_short_and_survives_json() -> None:
    found = after(*[1 / (n + 1) for n in range(200)])
    assert len(found.recent_losses) == WINDOW_STEPS
    record = json.loads(json.dumps(dataclasses.asdict(found)))
    again = Progress(**{name: tuple(v) if isinstance(v, list) else v for name, v in record.items()})
    assert again == found


@pytest.mark.parametrize(
    ("values", "best_step", "stopped_after"),
    [([3, 2, 1, 2, 1, 1], 3, 6), ([3, 2, 1, 0.5], 4, None), ([math.nan, 2, None, 3, 4], 2, 5)],
)
def test_the_best_validation_is_remembered_and_enough_worse_ones_end_it(
    values: list[Any], best_step: int, stopped_after: int | None
) -> None:
    settings = TrainConfig(early_stopping_evaluations=3, best_metric="validation_loss")
    progress, stopped = Progress(), None
    for step, value in enumerate(values, 1):
        finite = value if value is not None and math.isfinite(value) else None
        progress = dataclasses.replace(progress, num_steps=step, validation_loss=finite)
        progress = judged(progress, settings)
        if stopped is None and judging.has_stopped_early(progress, settings):
            stopped = step
    assert progress.best_step == best_step
    assert stopped == stopped_after


# Whole trainings --------------------------------------------------------------------------------------------


def run_of(folder: Path, **settings: Any) -> PipelineConfig:
    model = folder.parent / "model"
    if not model.exists():
        write_model(model)
    common: dict[str, Any] = {"evaluate_every_steps": 2, "checkpoint_every_steps": 3, "keep_checkpoints": 1}
    return tiny_run(folder, train=common | settings, model={"path": str(model)}, epochs=2)


def made_up_validations(monkeypatch: pytest.MonkeyPatch, by_step: list[float]) -> None:
    """In place of losses on held-out text: a tiny model gets better for ever. One is heard every two steps."""
    original = loop.split_loss
    heard: list[Any] = []

    def made_up(*arguments: Any, **named: Any) -> SplitLoss:
        heard.append(1)
        value = by_step[min(len(heard), len(by_step)) - 1]
        return dataclasses.replace(original(*arguments, **named), loss=value, bits_per_byte=value)

    monkeypatch.setattr(loop, "split_loss", made_up)


class Crash(BaseException):
    """The process ends here, as far as training can see."""


def test_the_weights_of_the_best_validation_are_published_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up_validations(monkeypatch, [3.0, 1.0, 2.0, 2.0, 2.0])
    config = run_of(tmp_path / "run", keep_best=True, early_stopping_evaluations=3)
    folder = plan_job(config).folder
    with monkeypatch.context() as patch:

        def crash(*_: Any) -> None:
            raise Crash

        patch.setattr(train_module, "write_output", crash)
        with pytest.raises(Crash):
            train(config)
    result = train(config)
    assert (result.num_steps, result.output_step) == (10, 4)
    assert "stopped early after step 10 of" in capsys.readouterr().err
    assert (folder / "best").read_text() == "step-00000004\n"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000004", "step-00000010"]
    best = read_checkpoint(folder / "step-00000004", facts=None)
    for name, tensor in load_file(folder / "adapter" / "adapter_model.safetensors").items():
        shape = tensor.shape
        kept = best.read("weight", name.replace(".weight", ".default.weight"), 0, shape.numel())
        assert kept is not None
        assert torch.equal(kept.view(shape), tensor)


def test_a_spike_is_skipped_in_a_training_and_again_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "FEWEST_STEPS", 4)
    config = run_of(tmp_path / "unbroken", max_loss_spike=3.0, max_steps=12)
    plant_spikes(config, monkeypatch, at=(6, 9))
    expected = train(config)
    assert (expected.num_steps, expected.num_updates) == (12, 10)
    broken = run_of(tmp_path / "broken", max_loss_spike=3.0, max_steps=12)
    with monkeypatch.context() as patch:
        original = loop.validate

        def crash(job: Any, model: Any, metrics: Any, progress: Progress) -> Progress:
            if progress.num_steps == 8:
                raise Crash
            return original(job, model, metrics, progress)

        patch.setattr(loop, "validate", crash)
        with pytest.raises(Crash):
            train(broken)
    assert train(broken) == expected


def plant_spikes(config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, at: tuple[int, ...]) -> None:
    steps = plan_job(config).steps
    seeds = {stepping.draw_seed(0, number, steps[number].first_bin) for number in at}
    original = stepping.summed_loss

    def spiky(model: Any, batch: Any, **options: Any) -> torch.Tensor:
        return original(model, batch, **options) * (100 if torch.initial_seed() in seeds else 1)

    monkeypatch.setattr(stepping, "summed_loss", spiky)


def test_settings_that_need_validations_are_refused_without_them(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"early-stopping: .*; set train.evaluate_every_steps"):
        plan_job(run_of(tmp_path / "a", early_stopping_evaluations=2, evaluate_every_steps=0))
    with pytest.raises(RefusedError, match=r"spikes-zero: train\.max_loss_spike is 2"):
        plan_job(run_of(tmp_path / "b", max_loss_spike=2, strategy="zero2"))


def test_what_decides_about_the_best_is_part_of_the_key(tmp_path: Path) -> None:
    def key(**settings: Any) -> str:
        return plan_job(run_of(tmp_path / "run", **settings)).key

    assert key(evaluate_every_steps=4) == key() == key(best_metric="validation_loss")
    assert key(keep_best=True, evaluate_every_steps=4) != key(keep_best=True) != key()
