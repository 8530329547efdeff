"""How fast a step was and how much memory is held, from books that others keep: nothing here waits for a GPU."""

import importlib.util
import resource
import time
from typing import Any

import numpy as np
import torch

from trainer.job import Job
from trainer.metrics import report
from trainer.mfu import count_work, peak_flops
from trainer.padding import num_padded_tokens
from trainer.ranks import CPU
from trainer.steps import Step, micro_steps

SECONDS_BETWEEN_QUESTIONS = 5.0
"""NVML answers within a millisecond, but opens the driver anew each time."""


class StepMeter:
    """Numbers of the whole training, of all its processes together; memory is that of this one."""

    def __init__(self, job: Job, model: torch.nn.Module) -> None:
        self._job = job
        self._work = count_work(model)
        self._peak = _peak_of_all(job, model)
        self._device_memory = DeviceMemory(job.device if job.ranks.is_first else CPU)

    def read(self, step: Step, seconds: float) -> dict[str, Any]:
        """Of a step that took so long. `mfu` is None where the peak of the device is not known."""
        computed = self._lengths(step)
        flops = self._work.of(np.concatenate([np.zeros(0, np.int64), *computed]), step.num_trained_tokens)
        flops_per_second = flops / max(seconds, 1e-9)
        return self._padding(computed) | {
            "tokens_per_second": step.num_tokens / max(seconds, 1e-9),
            "teraflops_per_second": flops_per_second / 1e12,
            "mfu": flops_per_second / self._peak if self._peak else None,
            "memory_gib": memory_gib(self._job.device),
            "device_memory_gib": self._device_memory.gib(),
        }

    def _lengths(self, step: Step) -> list[np.ndarray]:
        """Of the documents of each micro-step, on whichever rank."""
        plan, num_bins = self._job.plans[step.epoch], self._job.config.train.bins_per_micro_step
        computed = micro_steps(plan, step, bins_per_micro_step=num_bins)
        return [plan.num_tokens[plan.documents(part.first_bin, part.end_bin)] for part in computed]

    def _padding(self, computed: list[np.ndarray]) -> dict[str, Any]:
        """The share of padding in what is computed; nothing where documents are packed."""
        budget = self._job.padded_tokens_per_bin
        if budget is None:
            return {}
        max_tokens = budget * self._job.config.train.bins_per_micro_step
        num_tokens = sum(int(lengths.sum()) for lengths in computed)
        num_padded = sum(num_padded_tokens(lengths, max_tokens=max_tokens) for lengths in computed)
        return {"padding_share": 1 - num_tokens / max(num_padded, 1)}


def _peak_of_all(job: Job, model: torch.nn.Module) -> float | None:
    """Of all GPUs that compute, taken to be of one kind; None on CPUs and for a GPU that the table lacks."""
    if job.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(job.device)
    peak = peak_flops(name)
    if peak is None:
        if job.ranks.is_first:
            report(f"no MFU will be shown: the peak of {name!r} is not in the table of trainer/mfu.py")
        return None
    own_gpus = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    return peak * max(len(own_gpus), 1) * job.ranks.count


def memory_gib(device: torch.device) -> float:
    """Most memory held so far: the allocator's on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class DeviceMemory:
    """What is in use on a GPU by all that run there, as nvidia-smi shows it; asked for every few seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_known = device.type == "cuda"
        self._asked_at = -SECONDS_BETWEEN_QUESTIONS
        self._gib: float | None = None

    def gib(self) -> float | None:
        """The last answer; None on a CPU and where NVML can't be asked, which is said once."""
        if self._is_known and time.monotonic() - self._asked_at >= SECONDS_BETWEEN_QUESTIONS:
            self._asked_at = time.monotonic()
            self._gib = self._ask()
        return self._gib

    def _ask(self) -> float | None:
        if importlib.util.find_spec("pynvml") is None:
            self._give_up("pip install nvidia-ml-py")
            return None
        import pynvml

        try:
            return torch.cuda.device_memory_used(self._device) / 2**30
        except (pynvml.NVMLError, RuntimeError) as error:
            self._give_up(" ".join(str(error).split()))
            return None

    def _give_up(self, reason: str) -> None:
        self._is_known = False
        report(f"memory in use on the whole GPU is not shown: {reason}")
