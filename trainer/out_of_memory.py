"""Running out of memory: the same step again with fewer bins at once, or words that say what took the memory.

Gradients are sums over bins and dropout is drawn bin by bin (trainer/draws.py), so a smaller micro-step is the same
maths. A strategy whose ranks exchange gradients in the backward pass can't go back inside a step: all its ranks end
and are started again from the last checkpoint (trainer/rank_processes.py).
"""

import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from schemas.errors import TrainingError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import TrainConfig
from trainer.job import Job
from trainer.metrics import report
from trainer.optimizers import Limits, Optimizer
from trainer.rank_processes import MICRO_STEP_VARIABLE, OUT_OF_MEMORY_EXIT_CODE, smaller
from trainer.stepping import BatchesAhead, MicroStepError, StepOutcome, is_out_of_memory, run_step
from trainer.steps import Step
from trainer.strategies import STRATEGIES

GIB = 2**30


class OutOfMemoryError(TrainingError):
    """With what took the memory. Ranks that could go on with a smaller micro-step tell their starter so."""

    def __init__(self, message: str, *, can_be_smaller: bool = False) -> None:
        super().__init__(message)
        self.exit_code = OUT_OF_MEMORY_EXIT_CODE if can_be_smaller else TrainingError.exit_code


@contextmanager
def memory_explained(job: Job) -> Iterator[None]:
    """Before the first step: one line in the place of an allocator's."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        cure = _smaller_weights(job.config.train)
        raise OutOfMemoryError(f"out of memory before the first step ({_line(error)}); {cure}") from error


class Stepper:
    """Runs steps, and remembers how many bins fit into the memory of this rank at once."""

    def __init__(self, job: Job, model: torch.nn.Module, optimizer: Optimizer) -> None:
        self._job = job
        self._model = model
        self._optimizer = optimizer
        self.bins_at_once = job.config.train.bins_per_micro_step
        self._ahead = BatchesAhead(job)

    def run(self, step: Step, limits: Limits, *, loss_scale: float = 1.0) -> StepOutcome:
        """Raises OutOfMemoryError when even one bin, or the update, is too much."""
        while True:
            outcome, problem = self._attempt(step, limits, loss_scale)
            if outcome is not None:
                return outcome
            # Only here, where the exception is gone, is the memory of what it interrupted free again.
            self._optimizer.drop_gradients()
            _release_memory(self._job.device)
            self.bins_at_once = smaller(self.bins_at_once)
            report(f"{problem}; going on with {self.bins_at_once} bins at once")

    def _attempt(self, step: Step, limits: Limits, loss_scale: float) -> tuple[StepOutcome | None, str]:
        try:
            outcome = run_step(
                self._job,
                self._model,
                self._optimizer,
                step,
                limits=limits,
                bins_at_once=self.bins_at_once,
                loss_scale=loss_scale,
                ahead=self._ahead,
            )
            return outcome, ""
        except MicroStepError as error:
            problem = self._explain(error.__cause__ or error)
            can_redo = STRATEGIES[self._job.config.train.strategy].can_redo_step
            if self.bins_at_once > 1 and can_redo:
                return None, problem
            can_be_smaller = self.bins_at_once > 1 and self._job.ranks.count > 1
            raise OutOfMemoryError(problem, can_be_smaller=can_be_smaller) from error
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Inside an update: some weights may be new already, so this step can't be done again.
            can_be_smaller = self.bins_at_once > 1 and self._job.ranks.count > 1
            raise OutOfMemoryError(self._explain(error), can_be_smaller=can_be_smaller) from error

    def _explain(self, error: BaseException) -> str:
        weights, states, rest = _shares(self._job, self._model, self._optimizer)
        cure = _cure(self._job.config.train, self.bins_at_once, weights, states, rest)
        return (
            f"out of memory with {self.bins_at_once} bins at once ({_line(error)}): weights {weights / GIB:.1f} "
            f"GiB, optimiser {states / GIB:.1f}, micro-step and the rest {rest / GIB:.1f} of "
            f"{_total(self._job.device) / GIB:.1f}; {cure}"
        )


def lowered(config: PipelineConfig) -> PipelineConfig:
    """The config with the micro-step that the starter of the ranks has come down to."""
    told = int(os.environ.get(MICRO_STEP_VARIABLE, config.train.bins_per_micro_step))
    train = config.train.model_copy(update={"bins_per_micro_step": told})
    return config.model_copy(update={"train": train})


# Words ------------------------------------------------------------------------------------------------------


def _cure(train: TrainConfig, bins_at_once: int, weights: int, states: int, rest: int) -> str:
    """The setting that makes the largest part smaller."""
    if rest >= max(weights, states):
        if bins_at_once > 1:
            return "a lower train.bins_per_micro_step helps"
        if train.gradient_checkpointing == "none":
            return "set train.gradient_checkpointing: true"
        return "lower split.max_tokens and pack.capacity, so that a bin is shorter"
    if states > weights:
        return "set train.method: lora, or a train.strategy that shares the optimiser among devices, as zero2 does"
    return _smaller_weights(train)


def _smaller_weights(train: TrainConfig) -> str:
    if train.method == "lora" and train.base == "plain":
        return "set train.base: int8, which holds the frozen weights in 8 bits, or use a smaller model"
    return "use more devices with a train.strategy that shares the weights out, or a smaller model"


def _shares(job: Job, model: torch.nn.Module, optimizer: Optimizer) -> tuple[int, int, int]:
    """Bytes of the weights, of masters and moments, and of all else that was in use at the worst moment."""
    trained = {id(p) for p in model.parameters() if p.requires_grad and p.dtype == torch.float32}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    states = sum(p.values.numel() * p.values.element_size() for p in optimizer.pieces())
    states -= sum(4 * p.numel() for p in model.parameters() if id(p) in trained)  # they are their own masters
    if job.device.type == "cuda":
        used = torch.cuda.max_memory_allocated(job.device)
    else:
        used = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return weights, max(states, 0), max(used - weights - max(states, 0), 0)


def _total(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    physical = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    return physical if limit == resource.RLIM_INFINITY else min(limit, physical)


def _release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _line(error: BaseException) -> str:
    """The first sentences: torch goes on for lines about fragmentation."""
    return " ".join(str(error).split())[:160] or type(error).__name__
