"""The training: named steps.

What they make stands in building.py, the loop over the steps in loop.py. Everything about a step is decided before
it runs (job.py): a run that was killed goes on from its last checkpoint to the same weights, bit for bit on a CPU.
"""

import math

import torch
from transformers import PreTrainedTokenizerBase

from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from trainer import checkpoint
from trainer.building import (
    apply_method,
    build_optimizer,
    check_layout,
    check_method,
    compile_rest,
    fill,
    load_model,
    make_deterministic,
    place,
    speed_up,
    speed_up_layers,
    use_draws,
)
from trainer.checkpoint import Progress
from trainer.folders import remove_leftovers
from trainer.heap import frozen_heap
from trainer.job import Job, facts, mark_current, plan_job, read_result, tell
from trainer.loop import run_steps
from trainer.model import load_tokenizer
from trainer.optimizers import Optimizer
from trainer.out_of_memory import lowered, memory_explained
from trainer.output import num_trainable_weights, write_output, write_result
from trainer.pieces import check_shapes
from trainer.preflight import check_ranks
from trainer.program_cache import keep_programs
from trainer.ranks import joined_ranks
from trainer.signals import StopSignals
from trainer.support import check_supported


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
        with frozen_heap():
            progress = run_steps(job, model, optimizer, progress, signals)
        output_step = take_best(job, optimizer, progress)
        with optimizer.averaged():
            return finish(job, model, tokenizer, progress, output_step)


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
    announce_waiting(job)


def announce_waiting(job: Job) -> None:
    train_config = job.config.train
    num_micro_steps = -(-train_config.bins_per_step // train_config.bins_per_micro_step)
    if num_micro_steps % job.ranks.count:
        tell(
            job,
            f"some processes wait: {num_micro_steps} micro-steps in a step for {job.ranks.count} of them; "
            "train.bins_per_step over train.bins_per_micro_step is best a multiple of their number",
        )


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
        tell(job, f"trained weights in {output}")
    job.ranks.wait_for_all()
    result = written if written is not None else read_result(job)
    assert result is not None, "the first rank has just written it"
    return result
