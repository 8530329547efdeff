"""Before any weight is loaded: do all processes run the same training on machines that can carry it?

Each says what it runs on and with; all hear all, so all refuse together and in the same words. Differences that
would train something else, or nothing at all an hour later, are refused; others are told.
"""

import hashlib
import json
import platform
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from schemas.errors import InputError, RefusedError, TrainingError
from schemas.run import TEMPORARY_PREFIX
from trainer.job import TRAINER_VERSION, Job
from trainer.memory import free_machine_bytes, memory_need, read_shapes
from trainer.metrics import report
from trainer.ranks import Ranks
from trainer.support import model_architecture, model_folder

PACKAGES = (
    *("sft-pipeline", "torch", "transformers", "peft", "safetensors", "tokenizers"),
    *("deepspeed", "bitsandbytes", "liger-kernel"),
)
CLOCK_LIMIT_SECONDS = 5.0
"""Times of files and lines in logs could not be put in order."""
WHOLE_ON_EACH = ("single", "ddp", "zero1", "zero2")
"""Strategies of which the least need of a process is known."""
ADDED_NUMBERS = 1 << 18
NUM_NAMED = 4
GIB = 2**30


def check_ranks(job: Job) -> None:
    """Raises RefusedError when processes differ in what they run or one has too little memory, TrainingError when
    they add up wrongly. Differences that do no harm are told once.
    """
    ranks = job.ranks
    check_adding_up(ranks)
    ranks.wait_for_all()  # so that the clocks are read at one moment
    found = [json.loads(text) for text in ranks.gather(json.dumps(own_facts(job)))]
    refuse_differences([facts["same"] for facts in found], [facts["host"] for facts in found])
    check_run_root_is_shared(job, [facts["host"] for facts in found])
    warnings = [*memory_findings(job, found), *clock_findings(found), *gpu_findings(found)]
    for warning in warnings if ranks.is_first else ():
        report(f"warning: {warning}")


def own_facts(job: Job) -> dict[str, Any]:
    """What this process runs. Under "same" all must agree."""
    train = job.config.train.model_dump(mode="json")
    return {
        "same": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in PACKAGES},
            "trainer version": TRAINER_VERSION,
            "our code": code_digest(),
            **{f"train.{name}": value for name, value in train.items()},
            "model.dtype": str(job.dtype).removeprefix("torch."),
            "model.device": job.device.type,
            **{f"input {name}": digest for name, digest in job.inputs.items()},
        },
        "host": socket.gethostname(),
        "gpu": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else None,
        "free_bytes": _free_bytes(job.device),
        "clock": time.time(),
    }


def package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def code_digest() -> str:
    """Of the rooms that train: two checkouts may have one version."""
    digest = hashlib.blake2b(digest_size=8)
    ours = Path(__file__).resolve().parent.parent
    for path in sorted(
        path for room in ("schemas", "pipelines", "trainer") for path in (ours / room).rglob("*.py")
    ):
        digest.update(f"{path.relative_to(ours)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_machine_bytes()


# What must be the same ----------------------------------------------------------------------------------------


def refuse_differences(found: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> None:
    """`found` and `hosts` have an entry for each process. Raises RefusedError naming values and processes."""
    names = dict.fromkeys(name for facts in found for name in facts)
    differences = [text for name in names if (text := _difference(name, found, hosts))]
    if differences:
        more = len(differences) - NUM_NAMED
        raise RefusedError(
            f"the processes of this training are not alike: {'; '.join(differences[:NUM_NAMED])}"
            f"{f'; and {more} more' if more > 0 else ''}: start all of them with the same config, files and packages"
        )


def _difference(name: str, found: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> str:
    by_value: dict[str, list[int]] = {}
    for number, facts in enumerate(found):
        by_value.setdefault(json.dumps(facts.get(name)), []).append(number)
    if len(by_value) == 1:
        return ""
    parts = (f"{value.strip(chr(34))} on {_whom(numbers, hosts)}" for value, numbers in by_value.items())
    return f"{name} is {', '.join(parts)}"


def _whom(numbers: Sequence[int], hosts: Sequence[str]) -> str:
    """Processes for people: "processes 0, 1, 2, ... (host-a, host-b)"."""
    named = ", ".join(str(number) for number in numbers[:NUM_NAMED])
    more = ", ..." if len(numbers) > NUM_NAMED else ""
    places = ", ".join(sorted({hosts[number] for number in numbers})[:NUM_NAMED])
    return f"process{'es' if len(numbers) > 1 else ''} {named}{more} ({places})"


def check_run_root_is_shared(job: Job, hosts: Sequence[str]) -> None:
    """All see a file that the first process makes: each writes a part of a checkpoint. Raises RefusedError."""
    if job.ranks.count == 1:
        return
    run_root = job.config.run_root
    path = run_root / job.ranks.gather(f"{TEMPORARY_PREFIX}{uuid4().hex}")[0]
    try:
        if job.ranks.is_first:
            path.touch()
        job.ranks.wait_for_all()
        sees_it = [text == "yes" for text in job.ranks.gather("yes" if path.exists() else "no")]
    finally:
        if job.ranks.is_first:
            path.unlink(missing_ok=True)
    if not all(sees_it):
        blind = [number for number, sees in enumerate(sees_it) if not sees]
        raise RefusedError(
            f"{run_root} on {_whom(blind, hosts)} is not the folder that process 0 ({hosts[0]}) writes to; put the "
            "run root on a file system that all machines see"
        )


# Memory, clocks, GPUs -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Need:
    floor: int
    likely: int


def memory_findings(job: Job, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Warnings. Raises RefusedError where a process has less than weights and optimiser take for certain."""
    train = job.config.train
    need = _need(job)
    if need is None or train.strategy == "pipeline":  # whose one process has the memory of all its devices
        return
    free = _free_for_each(found)
    hosts = [facts["host"] for facts in found]
    cure = "end what else uses the memory, or see what to lower with `sft-pipeline doctor`"
    below = [number for number, num_bytes in enumerate(free) if num_bytes < need.floor]
    if below and train.strategy in WHOLE_ON_EACH and train.offload == "none":
        raise RefusedError(
            f"{min(free[n] for n in below) / GIB:.2f} GiB of memory are free for {_whom(below, hosts)}, weights and "
            f"optimiser take {need.floor / GIB:.2f} GiB; {cure}"
        )
    tight = [number for number, num_bytes in enumerate(free) if num_bytes < need.likely]
    if tight:
        yield (
            f"{min(free[n] for n in tight) / GIB:.2f} GiB of memory are free for {_whom(tight, hosts)}, with "
            f"activations about {need.likely / GIB:.2f} GiB are needed; {cure}"
        )


def _need(job: Job) -> _Need | None:
    """Of one process; None where the model's files don't say their shapes."""
    try:
        shapes = read_shapes(model_folder(job.model.path, job.model.revision))
    except InputError:
        return None
    found = memory_need(
        job.config,
        shapes,
        model_architecture(job.config),
        bytes_per_weight=job.dtype.itemsize,
        num_processes=job.ranks.count,
    )
    return _Need(found.floor, found.likely)


def _free_for_each(found: Sequence[Mapping[str, Any]]) -> list[int]:
    """A GPU is one process's own; a machine's memory is shared by those that compute on its CPUs."""
    hosts = [facts["host"] for facts in found]
    return [
        facts["free_bytes"] // (hosts.count(facts["host"]) if facts["gpu"] is None else 1) for facts in found
    ]


def clock_findings(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Clocks that are far from the first process's."""
    offsets = {number: facts["clock"] - found[0]["clock"] for number, facts in enumerate(found)}
    far = {number: offset for number, offset in offsets.items() if abs(offset) > CLOCK_LIMIT_SECONDS}
    if far:
        whom = _whom(list(far), [facts["host"] for facts in found])
        worst = max(far.values(), key=abs)
        yield (
            f"the clock of {whom} is {worst:+.0f} s from that of process 0: times in logs and of files can't be "
            "compared; synchronise them"
        )


def gpu_findings(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """GPUs of several kinds: the slowest sets the pace."""
    kinds = sorted({str(facts["gpu"]) for facts in found})
    if len(kinds) > 1:
        yield f"the processes compute on different GPUs ({', '.join(kinds)}): all wait for the slowest"


# Adding up ----------------------------------------------------------------------------------------------------


def check_adding_up(ranks: Ranks) -> None:
    """Known numbers, other ones on each rank, summed over all: what gradients will go through."""
    if ranks.count == 1:
        return
    numbers = torch.arange(ADDED_NUMBERS, device=ranks.device, dtype=torch.float32).remainder_(251)
    summed = ranks.add_up(numbers * (ranks.number + 1))
    expected = numbers * (ranks.count * (ranks.count + 1) // 2)  # whole numbers, exact in float32
    num_wrong = int((summed != expected).sum())
    if num_wrong:
        raise TrainingError(
            f"process {ranks.number} of {ranks.count} on {socket.gethostname()}: {num_wrong} of {ADDED_NUMBERS} "
            "numbers were added up wrongly among the processes; look at the network or the links between the GPUs"
        )
