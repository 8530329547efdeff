"""What every contestant does alike: read the request, hold memory to a cap, note each step, leave a result.

A result is {"steps": [...], "first_loss": ..., "kernel": ..., ...}, or {"left_out": why} of a contestant that can't do
what is asked for. All else is counted by the one who asked, from the steps, in the same way for all.
"""

import ctypes
import importlib.metadata
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

IGNORED = -100
GIB = 2**30
EIGHT_BITS = ("int8", "int8_rows")
"""What ours calls a base in 8 bits: bitsandbytes' LLM.int8, which is the peers' own way, or int8 rows."""
CAP_MARGIN_BYTES = 400 * 2**20
"""Kernels are loaded when they are first called, outside of the allocator."""
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "unsloth",
    "liger-kernel",
    "bitsandbytes",
    "flash-attn",
    "torchao",
)

Request = Mapping[str, Any]
Result = dict[str, Any]


def run(train: Callable[[Request], Result]) -> None:
    """A contestant's `main`: the request is the file that the first argument names."""
    request: Request = json.loads(Path(sys.argv[1]).read_bytes())
    end_with_parent(request["parent"])
    cap_memory(request["memory_cap_gib"])
    torch.manual_seed(0)
    result = train(request)
    write_result(request, result)


def write_result(request: Request, result: Result) -> None:
    """With what is known of every process."""
    result |= {
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_initialized() else None,
        "resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        "device": torch.cuda.get_device_name() if torch.cuda.is_initialized() else "CPU",
        "versions": installed_versions(),
    }
    Path(request["result"]).write_text(json.dumps(result))


def end_with_parent(parent: int) -> None:
    """However it ends: the kernel sends the signal. Linux alone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it ended while torch was imported: no signal will come
            raise SystemExit(f"process {parent}, which asked for this, has ended")


def installed_versions() -> dict[str, str]:
    versions = {"python": ".".join(map(str, sys.version_info[:3])), "cuda": str(torch.version.cuda)}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def device_of(request: Request) -> torch.device:
    """The device by its name; CUDA where there is one for auto."""
    name = request["device"]
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def quantisation(request: Request) -> dict[str, Any]:
    """What `from_pretrained` needs to hold the base in 8 or 4 bits."""
    if request["base"] == "plain":
        return {}
    from transformers import BitsAndBytesConfig

    if request["base"] in EIGHT_BITS:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    dtype = getattr(torch, request["dtype"])
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": four_bits}


# Memory -----------------------------------------------------------------------------------------------------


def cap_memory(cap_gib: float | None) -> None:
    """The allocator is refused what would bring the use of the whole GPU, as NVML sees it, over the cap."""
    if cap_gib is None or not torch.cuda.is_available():
        return
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    allowed = cap_gib * GIB - outside - CAP_MARGIN_BYTES
    torch.cuda.set_per_process_memory_fraction(max(allowed, 0.0) / total)
    print(
        f"allocator capped at {allowed / GIB:.2f} GiB: {outside / GIB:.2f} GiB of the GPU are in use beside it"
    )


# Documents --------------------------------------------------------------------------------------------------


class Documents:
    """Token ids and labels of documents, in the order in which ours trains them, cut into its bins."""

    def __init__(self, path: str) -> None:
        from safetensors.numpy import load_file

        columns = load_file(path)
        self._input_ids, self._labels = columns["input_ids"], columns["labels"]
        self._starts, self._bin_starts = columns["document_starts"], columns["bin_starts"]

    @property
    def num_bins(self) -> int:
        return len(self._bin_starts) - 1

    def __len__(self) -> int:
        return len(self._starts) - 1

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels, int32 [tokens]; a label stands at its own token."""
        here = slice(self._starts[number], self._starts[number + 1])
        return self._input_ids[here], self._labels[here]

    def packed(self, number: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Ids and labels of a bin, and the lengths of its documents."""
        borders = self._starts[self._bin_starts[number] : self._bin_starts[number + 1] + 1]
        here = slice(borders[0], borders[-1])
        return self._input_ids[here], self._labels[here], np.diff(borders).tolist()

    def in_bins(self, first: int, end: int) -> range:
        """Numbers of the documents in bins [first, end)."""
        return range(int(self._bin_starts[first]), int(self._bin_starts[end]))


def padded_batch(documents: Documents, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Rows of documents on the CPU, padded on the right to the longest: input_ids, labels, attention_mask."""
    rows = [documents.document(number) for number in numbers]
    longest = max(len(ids) for ids, _ in rows)
    input_ids = np.zeros((len(rows), longest), np.int64)
    labels = np.full((len(rows), longest), IGNORED, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for place, (ids, targets) in enumerate(rows):
        input_ids[place, : len(ids)], labels[place, : len(ids)], mask[place, : len(ids)] = ids, targets, 1
    columns = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
    return {name: torch.from_numpy(values) for name, values in columns.items()}


def moved(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: values.to(device, non_blocking=True) for name, values in batch.items()}


@torch.no_grad()
def forward_loss(
    model: Any, documents: Documents, numbers: Sequence[int], device: torch.device, *, rows: int = 8
) -> float:
    """The mean loss over the trained tokens of some documents, a few rows at a time: a forward pass, nothing learned."""
    total, count = 0.0, 0
    for first in range(0, len(numbers), rows):
        batch = padded_batch(documents, numbers[first : first + rows])
        num_targets = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**moved(batch, device)).loss) * num_targets
        count += num_targets
    return total / count


# Steps ------------------------------------------------------------------------------------------------------


MOST_BATCHES_AHEAD = 4
"""Data loaders make some before they are asked for."""


class Steps:
    """When each step ended. A GPU is waited for only where a time that counts is taken: at the marked steps."""

    def __init__(self, *, num_warm_up: int, num_steps: int, device: torch.device) -> None:
        self._waited_for = {1, num_warm_up, num_steps}
        self._device = device
        self._started = (time.time(), time.monotonic())
        self._times: list[float] = []
        self.counts: list[tuple[int, int]] = []
        """Tokens and trained tokens of each batch, as it was made: padding is none."""
        self.losses: dict[int, float] = {}
        self.grad_norms: dict[int, float] = {}
        self._seconds_of_checks = 0.0

    def checked(self, check: Callable[[], float]) -> float:
        """What only the benchmark asks for, before the first step: its time and its memory are not the peer's."""
        begun = time.monotonic()
        found = check()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self._seconds_of_checks += time.monotonic() - begun
        return found

    def end(self) -> None:
        if len(self._times) + 1 in self._waited_for and self._device.type == "cuda":
            torch.cuda.synchronize()
        started, begun = self._started
        self._times.append(started + time.monotonic() - begun)

    def count(self, labels: torch.Tensor, num_tokens: int) -> None:
        self.counts.append((num_tokens, int((labels != IGNORED).sum())))

    def records(self, *, batches_per_step: int = 1) -> list[dict[str, Any]]:
        """Raises ValueError where steps held more batches than they were told to: their tokens would not be counted."""
        num_expected = len(self._times) * batches_per_step
        if len(self.counts) > num_expected + MOST_BATCHES_AHEAD:
            raise ValueError(
                f"{len(self.counts)} batches were made for {len(self._times)} steps, expected {num_expected}"
            )
        return list(self._records(batches_per_step))

    def _records(self, batches_per_step: int) -> Iterator[dict[str, Any]]:
        for number, ended_at in enumerate(self._times):
            counts = self.counts[number * batches_per_step : (number + 1) * batches_per_step]
            yield {
                "unix_time": ended_at - self._seconds_of_checks,
                "num_tokens": sum(tokens for tokens, _ in counts),
                "num_trained_tokens": sum(trained for _, trained in counts),
                "loss": self.losses.get(number + 1),
                "grad_norm": self.grad_norms.get(number + 1),
            }


def quiet() -> None:
    """No network, no telemetry, no progress bars: set before a library is imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
