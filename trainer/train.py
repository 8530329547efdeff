"""The training: named steps and a loop.

Everything about a step is decided before it runs (job.py), so a step needs its number and nothing else, and a
run that was killed goes on from its last checkpoint to the same weights, bit for bit on a CPU.
"""

import dataclasses
import math
import os
import signal
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from schemas.pipeline_config import PipelineConfig
from schemas.training_config import ModelConfig
from schemas.training_result import TrainingResult
from trainer import checkpoint, initial_adapter, judging
from trainer.attention import unwrapped, use_packed_attention, use_plain_attention
from trainer.checkpoint import Progress
from trainer.checkpoint_writer import CheckpointWriter
from trainer.compiling import compile_layers
from trainer.draws import use_bin_dropout
from trainer.fast.check import keep_if_right
from trainer.folders import remove_leftovers
from trainer.heartbeat import Heartbeat
from trainer.job import Job, mark_current, plan_job, read_result
from trainer.kernels import use_fast_kernels, use_fast_layers
from trainer.loss import split_loss
from trainer.loss_by_group import SplitLoss
from trainer.loss_scale import after_step, loss_scale
from trainer.meter import StepMeter
from trainer.methods import METHODS, lora
from trainer.metrics import Metrics, NoMetrics, report
from trainer.model import (
    check_dtypes,
    check_model_folder,
    empty_model,
    enable_gradient_checkpointing,
    load_base_model,
    load_tokenizer,
)
from trainer.noise import use_noise
from trainer.optimizers import Optimizer
from trainer.out_of_memory import Stepper, lowered, memory_explained
from trainer.output import num_trainable_weights, write_output, write_result
from trainer.pieces import check_shapes
from trainer.preflight import check_ranks
from trainer.probe import check_packing
from trainer.program_cache import keep_programs
from trainer.random_weights import RandomWeights
from trainer.ranks import CPU, joined_ranks
from trainer.signals import StopSignals, stopped_exit_code
from trainer.start_adapter import adapter_folder, merge_into
from trainer.stepping import StepOutcome
from trainer.steps import Step
from trainer.strategies import STRATEGIES
from trainer.support import check_supported
from trainer.trackers import TrackedRun
from trainer.weights import WeightFiles, model_without_weights


def train(config: PipelineConfig) -> TrainingResult:
    """Train, or go on with, or skip, what the config asks for. The caller holds the run root.

    One of several processes where the environment says so: all compute, the first one writes.
    Raises errors of schemas.errors; SystemExit after a signal, once a checkpoint is written.
    """
    check_supported(config)
    config = lowered(config)
    with joined_ranks(config) as ranks:
        job = plan_job(config, ranks)
        check_ranks(job)
        finished = read_result(job)
        if finished is None:
            return train_job(job)
        tell(job, f"training {job.key} is finished: nothing to do")
        if ranks.is_first:
            mark_current(job)
        return finished


def train_job(job: Job) -> TrainingResult:
    with StopSignals() as signals:
        if job.ranks.is_first:
            remove_leftovers(job.folder)
        make_deterministic(job)
        keep_programs(job.config.train.compile_cache)
        tokenizer = load_tokenizer(job.config)
        check_method(job)
        with memory_explained(job):
            model = apply_method(job, load_model(job))
            use_draws(job, model)
            speed_up(job, model)
            model = fill(job, place(job, model))
            check_layout(job, model)
            compile_rest(job, model, speed_up_layers(job, model))
            optimizer = build_optimizer(job, model)
            progress = restore(job, optimizer)
        announce(job, model, progress)
        progress = run_steps(job, model, optimizer, progress, signals)
        output_step = take_best(job, optimizer, progress)
        with optimizer.averaged():
            return finish(job, model, tokenizer, progress, output_step)


def tell(job: Job, message: str) -> None:
    """A line for people, once for all ranks."""
    if job.ranks.is_first:
        report(message)


def make_deterministic(job: Job) -> None:
    """On CUDA by wish, since it costs speed. cuBLAS reads its variable when its first handle is made."""
    if job.config.train.deterministic and job.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def check_method(job: Job) -> None:
    """Targets, ranks and the like against names and shapes, before weights are read."""
    check = getattr(METHODS[job.config.train.method], "check", None)
    is_given = job.model.adapter is not None and job.model.adapter_use == "continue"
    if check is not None and not is_given:
        check(empty_model(job.model), job.config.train)


def load_model(job: Job) -> torch.nn.Module:
    """The model with its weights, or with stand-ins for them where the strategy fills them in later."""
    model: PreTrainedModel | None = None
    device = job.device
    if STRATEGIES[job.config.train.strategy].fill is not None:
        if not needs_weights(job):
            model = model_without_weights(job.model, base=job.config.train.base, dtype=job.dtype)
        if model is None:
            tell(job, "each process loads the whole model first: it can't be read in parts")
            device = CPU  # where there is more room; place() takes from it what this rank keeps
    if model is None:
        model = load_base_model(
            job.model,
            base=job.config.train.base,
            device=device,
            dtype=job.dtype,
            lay_out=STRATEGIES[job.config.train.strategy].lay_out,
        )
    if job.model.adapter is not None and job.model.adapter_use == "merge":
        merge_into(model, adapter_folder(job.model))
    if job.config.train.attention == "by_document":
        use_packed_attention(model, by_document=True)
    if job.config.train.gradient_checkpointing != "none":
        enable_gradient_checkpointing(model)
    return model


def needs_weights(job: Job) -> bool:
    """Whether something reads the model's weights before they are laid over the processes."""
    return getattr(METHODS[job.config.train.method], "NEEDS_WEIGHTS", False) or bool(job.model.new_tokens)


def apply_method(job: Job, model: torch.nn.Module) -> torch.nn.Module:
    trained: torch.nn.Module
    if job.model.adapter is not None and job.model.adapter_use == "continue":
        trained = lora.apply_existing(unwrapped(model), job.config.train, adapter_folder(job.model))
    elif initial_adapter.is_needed(job.config.train):
        trained = initial_adapter.apply(job, model)
    else:
        trained = METHODS[job.config.train.method].apply(model, job.config.train)
    check_dtypes(trained, job.dtype)
    if job.padded_tokens_per_bin is not None:
        use_plain_attention(trained)
    return trained


def use_draws(job: Job, model: torch.nn.Module) -> None:
    use_bin_dropout(model)
    if job.config.train.neftune_alpha:
        use_noise(model, job.config.train.neftune_alpha)


def place(job: Job, model: torch.nn.Module) -> torch.nn.Module:
    return STRATEGIES[job.config.train.strategy].place(model, job.device, job.ranks, job.config.train)


def fill(job: Job, model: torch.nn.Module) -> torch.nn.Module:
    fill_in = STRATEGIES[job.config.train.strategy].fill
    if fill_in is not None:
        with weight_source(job.model) as files:
            fill_in(model, files, job.ranks)
    return model


def weight_source(model: ModelConfig) -> WeightFiles | RandomWeights:
    return RandomWeights() if model.init == "random" else WeightFiles(check_model_folder(model))


def speed_up(job: Job, model: torch.nn.Module) -> None:
    tell(job, f"computing with {use_fast_kernels(model, job.config.train, device=job.device)}")


def speed_up_layers(job: Job, model: torch.nn.Module) -> bool:
    """Compute decoder layers as one where that is right; whether all of them are."""
    taken = use_fast_layers(model, job.config.train, device=job.device)
    if taken is None:
        return False
    tell(job, str(taken))
    problem = keep_if_right(model, taken, device=job.device, dtype=job.dtype, ranks=job.ranks)
    if problem is not None:
        tell(job, f"decoder layers compute their own way: {problem}")
    return len(taken.layers) == taken.num_layers


def compile_rest(job: Job, model: torch.nn.Module, are_all_taken: bool) -> None:
    """Layers that are computed as one compile their pieces themselves."""
    train = job.config.train
    if not train.compile or are_all_taken:
        return
    if train.base != "plain" or train.gradient_checkpointing != "none":
        tell(job, "nothing is compiled: over bits, or recomputed, layers can't be but as one")
        return
    tell(job, compile_layers(model))


def check_layout(job: Job, model: torch.nn.Module) -> None:
    is_padded = job.padded_tokens_per_bin is not None
    check_packing(model, device=job.device, dtype=job.dtype, ranks=job.ranks, is_padded=is_padded)


def build_optimizer(job: Job, model: torch.nn.Module) -> Optimizer:
    return STRATEGIES[job.config.train.strategy].build_optimizer(model, job.config.train, job.ranks)


def restore(job: Job, optimizer: Optimizer) -> Progress:
    """Take over the newest usable checkpoint, if there is one."""
    found = checkpoint.read_newest(
        job.folder, facts=facts(job), report=lambda line: tell(job, line), ranks=job.ranks
    )
    if found is None:
        return Progress()
    check_shapes(found.shapes, optimizer.shapes())
    optimizer.restore(found.read, num_updates=found.progress.num_updates)
    tell(job, f"going on after step {found.progress.num_steps}")
    if job.ranks.is_first:
        train = job.config.train
        best_step = found.progress.best_step if train.keep_best else None
        checkpoint.settle(job.folder, newest=found.folder, keep=train.keep_checkpoints, best_step=best_step)
    return found.progress


def announce(job: Job, model: torch.nn.Module, progress: Progress) -> None:
    """What will happen, and where a cap ends it."""
    train_config = job.config.train
    num_bins = sum(plan.num_bins for plan in job.plans)
    all_steps = sum(math.ceil(plan.num_bins / train_config.bins_per_step) for plan in job.plans)
    cap = f", capped from {all_steps} by max_steps or max_tokens" if len(job.steps) < all_steps else ""
    several = f", {train_config.strategy} over {job.ranks.count} processes" if job.ranks.count > 1 else ""
    tell(
        job,
        f"training {job.key}: {len(job.steps)} steps{cap}, {job.num_tokens:,} tokens in {num_bins} bins, "
        f"{num_trainable_weights(model):,} trained weights, {train_config.method}, base {train_config.base}, "
        f"{job.dtype}, {job.device}{several}",
    )
    num_micro_steps = -(-train_config.bins_per_step // train_config.bins_per_micro_step)
    if num_micro_steps % job.ranks.count:
        tell(
            job,
            f"some processes wait: {num_micro_steps} micro-steps in a step for {job.ranks.count} of them; "
            "train.bins_per_step over train.bins_per_micro_step is best a multiple of their number",
        )


# The loop ---------------------------------------------------------------------------------------------------


def run_steps(
    job: Job, model: torch.nn.Module, optimizer: Optimizer, progress: Progress, signals: StopSignals
) -> Progress:
    steps = job.steps[progress.num_steps :]
    meter = StepMeter(job, model)
    train = job.config.train
    stepper = Stepper(job, model, optimizer)
    with (
        open_metrics(job, progress) as metrics,
        open_writer(job, optimizer) as writer,
        Heartbeat(job.ranks, timeout_seconds=train.rank_timeout_seconds),
    ):
        signals.begin()
        for step in steps:
            if judging.has_stopped_early(progress, train):
                break
            started_at = time.monotonic()
            job.ranks.pulse.mark(f"computing step {step.number + 1}")
            scale = loss_scale(progress, job.dtype)
            outcome = stepper.run(step, judging.limits(progress, train), loss_scale=scale)
            progress = judging.advance(progress, step, outcome)
            seconds = time.monotonic() - started_at
            record = step_record(step, outcome, seconds) | meter.read(step, seconds)
            record |= {"unix_time": time.time(), "bins_at_once": stepper.bins_at_once}
            if job.dtype == torch.float16:
                progress = after_step(progress, scale, overflowed=outcome.is_overflow)
                record["loss_scale"] = scale
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
    loss, bits_per_byte, accuracy = map(_finite, (found.loss, found.bits_per_byte, found.token_accuracy))
    metrics.log_validation(
        {
            "step": progress.num_steps,
            "validation_loss": loss,
            "validation_bits_per_byte": bits_per_byte,
            "validation_token_accuracy": accuracy,
            "validation_by_source": _by_name(found.by_source),
            "validation_by_language": _by_name(found.by_language),
        }
    )
    measured = dataclasses.replace(
        progress,
        validation_loss=loss,
        validation_bits_per_byte=bits_per_byte,
        validation_token_accuracy=accuracy,
    )
    return judging.judged(measured, job.config.train)


def open_writer(job: Job, optimizer: Optimizer) -> CheckpointWriter:
    train = job.config.train
    writer = CheckpointWriter(
        job.folder, job.ranks, facts=facts(job), keep=train.keep_checkpoints, keep_best=train.keep_best
    )
    writer.reserve(optimizer)
    return writer


def save(
    optimizer: Optimizer, writer: CheckpointWriter, metrics: Metrics | NoMetrics, progress: Progress
) -> None:
    """Training goes on while it is written; the seconds that it could not are told."""

    def tell_seconds(seconds: float) -> None:
        metrics.log_checkpoint({"step": progress.num_steps, "checkpoint_seconds": seconds})

    writer.save(optimizer, progress, when_copied=tell_seconds, before_publishing=metrics.sync)


def facts(job: Job) -> dict[str, Any]:
    """What must be equal for a checkpoint to be ours."""
    dtype = str(job.dtype).removeprefix("torch.")
    return {"key": job.key, "num_steps": len(job.steps), "seed": job.config.train.seed, "dtype": dtype}


def stop(job: Job, progress: Progress, signal_number: int) -> None:
    tell(
        job,
        f"stopped by {signal.Signals(signal_number).name} after step {progress.num_steps} of {len(job.steps)}; checkpoint in "
        f"{job.folder / checkpoint.step_name(progress.num_steps)}; run the same command to go on",
    )
    raise SystemExit(stopped_exit_code(signal_number))


def take_best(job: Job, optimizer: Optimizer, progress: Progress) -> int:
    """With train.keep_best put the weights of the best validation in the place of the last ones; their step."""
    if progress.num_steps < len(job.steps):
        tell(
            job,
            f"stopped early after step {progress.num_steps} of {len(job.steps)}: {job.config.train.best_metric} was "
            f"best after step {progress.best_step}, {progress.num_validations_since_best} validations ago",
        )
    if not job.config.train.keep_best or progress.best_step in (None, progress.num_steps):
        return progress.num_steps
    assert progress.best_step is not None, "asked above"
    folder = job.folder / checkpoint.step_name(progress.best_step)
    found = checkpoint.read_agreed(folder, facts=facts(job), ranks=job.ranks)
    optimizer.restore(found.read, num_updates=found.progress.num_updates)
    tell(
        job,
        f"taking the weights of step {progress.best_step}: {job.config.train.best_metric} {progress.best_value:.4f}",
    )
    return progress.best_step


def finish(
    job: Job,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    output_step: int,
) -> TrainingResult:
    output = write_output(job, model, tokenizer)
    written = None
    if job.ranks.is_first:
        written = write_result(job, model, progress, output, output_step=output_step)
        mark_current(job)
        report(f"trained weights in {output}")
    job.ranks.wait_for_all()
    result = written if written is not None else read_result(job)
    assert result is not None, "the first rank has just written it"
    return result


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
