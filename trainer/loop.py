"""The loop over the steps: what is computed, written, validated and saved after each, and how a signal ends it.

Everything about a step is decided before it runs (job.py), so a step needs its number and nothing else.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from trainer import checkpoint, judging
from trainer.checkpoint import Progress
from trainer.checkpoint_writer import CheckpointWriter
from trainer.heartbeat import Heartbeat
from trainer.job import Job, facts, tell
from trainer.loss import split_loss
from trainer.loss_by_group import SplitLoss
from trainer.loss_scale import after_step, loss_scale
from trainer.meter import StepMeter
from trainer.metrics import Metrics, NoMetrics
from trainer.optimizers import Optimizer
from trainer.out_of_memory import Stepper
from trainer.signals import StopSignals, stopped_exit_code
from trainer.stepping import StepOutcome
from trainer.steps import Step
from trainer.trackers import TrackedRun


def run_steps(
    job: Job, model: torch.nn.Module, optimizer: Optimizer, progress: Progress, signals: StopSignals
) -> Progress:
    """Every step that is left. SystemExit after a signal, once a checkpoint is written."""
    train = job.config.train
    meter, stepper = StepMeter(job, model), Stepper(job, model, optimizer)
    with (
        open_metrics(job, progress) as metrics,
        open_writer(job, optimizer) as writer,
        Heartbeat(job.ranks, timeout_seconds=train.rank_timeout_seconds),
    ):
        signals.begin()
        for step in job.steps[progress.num_steps :]:
            if judging.has_stopped_early(progress, train):
                break
            progress, record = take_step(job, step, stepper, meter, progress)
            metrics.log_step(record)
            judging.check_progress(progress, train)
            writer.check()
            if is_due(job, step, train.evaluate_every_steps):
                with optimizer.averaged():
                    progress = validate(job, model, metrics, progress)
            job.ranks.pulse.mark(f"at the end of step {step.number + 1}")
            received = job.ranks.largest(signals.received or 0)
            if received or is_checkpoint_due(job, step, progress):
                save(optimizer, writer, metrics, progress)
            if received:
                writer.wait()
                stop(job, progress, received)
    return progress


def take_step(
    job: Job, step: Step, stepper: Stepper, meter: StepMeter, progress: Progress
) -> tuple[Progress, dict[str, Any]]:
    """One step, and its line in metrics.jsonl."""
    started_at = time.monotonic()
    job.ranks.pulse.mark(f"computing step {step.number + 1}")
    scale = loss_scale(progress, job.dtype)
    outcome = stepper.run(step, judging.limits(progress, job.config.train), loss_scale=scale)
    progress = judging.advance(progress, step, outcome)
    seconds = time.monotonic() - started_at
    record = step_record(step, outcome, seconds) | meter.read(step, seconds)
    record |= {"unix_time": time.time(), "bins_at_once": stepper.bins_at_once}
    if job.dtype == torch.float16:
        progress = after_step(progress, scale, overflowed=outcome.is_overflow)
        record["loss_scale"] = scale
    return progress, record


def open_metrics(job: Job, progress: Progress) -> AbstractContextManager[Metrics | NoMetrics]:
    if not job.ranks.is_first:
        return NoMetrics()
    num_tokens_left = sum(step.num_tokens for step in job.steps[progress.num_steps :])
    return Metrics(
        TrackedRun(job.folder, job.key, progress.num_steps, job.settings),
        num_steps=len(job.steps),
        num_tokens_left=num_tokens_left,
        trackers=job.config.train.trackers,
    )


def open_writer(job: Job, optimizer: Optimizer) -> CheckpointWriter:
    train = job.config.train
    writer = CheckpointWriter(
        job.folder, job.ranks, facts=facts(job), keep=train.keep_checkpoints, keep_best=train.keep_best
    )
    writer.reserve(optimizer)
    return writer


def step_record(step: Step, outcome: StepOutcome, seconds: float) -> dict[str, Any]:
    return {
        "step": step.number + 1,
        "epoch": step.epoch,
        "loss": outcome.loss if math.isfinite(outcome.loss) else None,
        "token_accuracy": outcome.token_accuracy,
        "learning_rate": outcome.learning_rate,
        "grad_norm": outcome.grad_norm if math.isfinite(outcome.grad_norm) else None,
        "num_tokens": step.num_tokens,
        "num_trained_tokens": step.num_trained_tokens,
        "seconds": seconds,
    }


def is_due(job: Job, step: Step, every_steps: int) -> bool:
    """Every so many steps (0: never) and after the last one."""
    done = step.number + 1
    return done == len(job.steps) or (every_steps > 0 and done % every_steps == 0)


def is_checkpoint_due(job: Job, step: Step, progress: Progress) -> bool:
    train = job.config.train
    is_last = judging.has_stopped_early(progress, train)
    return is_last or judging.is_new_best(progress, train) or is_due(job, step, train.checkpoint_every_steps)


def validate(job: Job, model: torch.nn.Module, metrics: Metrics | NoMetrics, progress: Progress) -> Progress:
    if job.validation is None:
        return progress
    reader, plan = job.validation
    job.ranks.pulse.mark(f"validating after step {progress.num_steps}")
    found = split_loss(
        model, reader, plan, device=job.device, tokens_per_bin=job.padded_tokens_per_bin, ranks=job.ranks
    )
    metrics.log_validation(validation_record(progress, found))
    measured = dataclasses.replace(
        progress,
        validation_loss=_finite(found.loss),
        validation_bits_per_byte=_finite(found.bits_per_byte),
        validation_token_accuracy=_finite(found.token_accuracy),
    )
    return judging.judged(measured, job.config.train)


def validation_record(progress: Progress, found: SplitLoss) -> dict[str, Any]:
    return {
        "step": progress.num_steps,
        "validation_loss": _finite(found.loss),
        "validation_bits_per_byte": _finite(found.bits_per_byte),
        "validation_token_accuracy": _finite(found.token_accuracy),
        "validation_by_source": _by_name(found.by_source),
        "validation_by_language": _by_name(found.by_language),
    }


def _by_name(losses: Mapping[str, SplitLoss]) -> dict[str, dict[str, float | None]]:
    return {
        name: {
            "loss": _finite(found.loss),
            "bits_per_byte": _finite(found.bits_per_byte),
            "token_accuracy": _finite(found.token_accuracy),
        }
        for name, found in losses.items()
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def save(
    optimizer: Optimizer, writer: CheckpointWriter, metrics: Metrics | NoMetrics, progress: Progress
) -> None:
    """Training goes on while it is written; the seconds that it could not are told."""

    def tell_seconds(seconds: float) -> None:
        metrics.log_checkpoint({"step": progress.num_steps, "checkpoint_seconds": seconds})

    writer.save(optimizer, progress, when_copied=tell_seconds, before_publishing=metrics.sync)


def stop(job: Job, progress: Progress, signal_number: int) -> None:
    tell(
        job,
        f"stopped by {signal.Signals(signal_number).name} after step {progress.num_steps} of {len(job.steps)}; checkpoint in "
        f"{job.folder / checkpoint.step_name(progress.num_steps)}; run the same command to go on",
    )
    raise SystemExit(stopped_exit_code(signal_number))
