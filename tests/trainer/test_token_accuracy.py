"""Token accuracy of a step and of a validation, and losses with smoothed labels. Judge: plain transformers' logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.pipeline_config import PipelineConfig
from schemas.training_config import TrainConfig
from tests.trainer.tiny_models import tiny_run
from trainer.checkpoint import Progress
from trainer.data import Plan
from trainer.job import plan_job
from trainer.judging import judged
from trainer.shard_reader import ShardReader
from trainer.train import train


def counted(model: Any, plan: Plan, reader: ShardReader, documents: slice) -> tuple[float, int]:
    """Sum of losses, and tokens predicted right, one document after the other."""
    total, num_right = 0.0, 0
    for row in plan.examples[documents].tolist():
        example = reader.example(row)
        ids = torch.tensor(example.input_ids).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        (start,), (end,) = example.span_starts.tolist(), example.span_ends.tolist()
        targets, logits = ids[start:end], logits[start - 1 : end - 1]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        num_right += int((logits.argmax(-1) == targets).sum())
    return total, num_right


def lines_of(config: PipelineConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (plan_job(config).folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_steps_and_validations_count_the_tokens_that_were_predicted(
    tmp_path: Path, label_smoothing: float
) -> None:
    settings = {"method": "full", "learning_rate": 5e-3, "bins_per_step": 2, "epochs": 3}
    config = tiny_run(tmp_path, train={**settings, "label_smoothing": label_smoothing}, epochs=3)
    result, job = train(config), plan_job(config)
    steps = [line for line in lines_of(config) if "loss" in line]
    plan, first = job.plans[0], job.steps[0]
    base = AutoModelForCausalLM.from_pretrained(job.model.path)
    here = plan.documents(first.first_bin, first.end_bin)
    total, num_right = counted(base, plan, job.reader, here)
    assert steps[0]["token_accuracy"] == pytest.approx(num_right / first.num_trained_tokens)
    is_plain = steps[0]["loss"] == pytest.approx(total / first.num_trained_tokens, rel=1e-5)
    assert is_plain == (label_smoothing == 0.0)
    assert max(step["token_accuracy"] for step in steps) > 0.1

    assert job.validation is not None
    reader, validation = job.validation
    trained = AutoModelForCausalLM.from_pretrained(job.folder / "model")
    total, num_right = counted(trained, validation, reader, slice(None))
    num_trained = int(validation.num_trained_tokens.sum())
    assert result.validation_token_accuracy == pytest.approx(num_right / num_trained)
    assert result.validation_token_accuracy > 0
    assert result.validation_loss == pytest.approx(total / num_trained, rel=1e-5)  # never smoothed


def test_the_best_accuracy_is_the_highest() -> None:
    settings = TrainConfig(best_metric="validation_token_accuracy", evaluate_every_steps=1)
    progress = Progress()
    for step, accuracy in enumerate([0.2, 0.5, 0.4, 0.5], start=1):
        measured = Progress(
            num_steps=step,
            validation_token_accuracy=accuracy,
            best_value=progress.best_value,
            best_step=progress.best_step,
            num_validations_since_best=progress.num_validations_since_best,
        )
        progress = judged(measured, settings)
    assert (progress.best_step, progress.best_value, progress.num_validations_since_best) == (2, 0.5, 2)
