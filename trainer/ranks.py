"""The processes of one training, its ranks: who this one is, what they add up, what they agree on.

A training of one process runs the same code with nobody to ask. Only the first rank writes and speaks; each
computes a share of every step. gloo connects CPUs, NCCL connects GPUs.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from schemas.errors import RefusedError, TrainingError
from schemas.pipeline_config import PipelineConfig
from trainer.rank_processes import LISTENING_FD_VARIABLE, LOST_RANKS_EXIT_CODE, PORT_VARIABLE
from trainer.support import ONE_PROCESS

JOIN_SECONDS = 180.0
"""Until all ranks have found each other; loading the libraries from a cold disk takes most of it."""
COLLECTIVE_TIMEOUTS = 2
"""Longest wait for another rank, in train.rank_timeout_seconds: the heartbeat comes first, and has a name. A rank
that died is noticed at once by whoever started it."""
BUCKET_NUMBERS = 1 << 24
"""64 MiB of fp32 in one message: large enough for the wire, small beside the model."""

CPU = torch.device("cpu")


class LostRanksError(TrainingError):
    """Another rank is gone. Its own message says why, so the starter shows that one."""

    exit_code = LOST_RANKS_EXIT_CODE


class Pulse:
    """How far this process is, for trainer/heartbeat.py. All ranks come to the same marks, not to the same moves."""

    def __init__(self) -> None:
        self.state = (0, 0, "starting")

    def mark(self, doing: str) -> None:
        """What begins now."""
        phase, moves, _ = self.state
        self.state = (phase + 1, moves, doing)

    def move(self) -> None:
        """It goes on."""
        phase, moves, doing = self.state
        self.state = (phase, moves + 1, doing)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank `number` of `count`; tensors that the ranks exchange lie on `device`."""

    number: int = 0
    count: int = 1
    device: torch.device = CPU
    pulse: Pulse = field(default_factory=Pulse, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace the tensor by its sum over all ranks; returns it."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def add_up_all(self, tensors: Sequence[torch.Tensor]) -> None:
        """The same for many tensors of one dtype, in few messages."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.count == 1:
            return value
        shared = torch.tensor([value], device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared.item())

    def gather(self, text: str) -> list[str]:
        """The texts of all ranks, in their order. They hold no NUL."""
        if self.count == 1:
            return [text]
        own = text.encode()
        padded = own.ljust(self.largest(len(own)), b"\0")
        sent = torch.tensor(list(padded), dtype=torch.uint8, device=self.device)
        received = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(received, sent)
        return [bytes(part.tolist()).rstrip(b"\0").decode() for part in received]

    def copy_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite them by those of the first rank."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def wait_for_all(self) -> None:
        """Go on when every rank has come here."""
        self.largest(0)


ALONE = Ranks()


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    filled = 0
    for tensor in tensors:
        if bucket and filled + tensor.numel() > BUCKET_NUMBERS:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        filled += tensor.numel()
    if bucket:
        yield bucket


# Joining ----------------------------------------------------------------------------------------------------


@contextmanager
def joined_ranks(config: PipelineConfig) -> Iterator[Ranks]:
    """This process among the ranks that its environment names, as torchrun and our own starter set it.

    Raises RefusedError when the environment is not what the config asks for, TrainingError when the ranks do
    not find each other, LostRanksError when one of them is gone.
    """
    number, count, local_number = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", os.environ.get("RANK", "0")))
    )
    _check_count(config, count)
    if config.train.strategy in ONE_PROCESS:
        yield ALONE
        return
    device = _own_device(config, local_number)
    timeout_seconds = COLLECTIVE_TIMEOUTS * config.train.rank_timeout_seconds
    _form_group(number, count, device, timeout_seconds)
    is_whole = True
    try:
        yield Ranks(number, count, device)
    except Exception as error:
        is_whole = False
        if isinstance(error, RuntimeError) and _is_lost_connection(error):
            raise LostRanksError(
                f"process {number} of {count} has lost another one: {_line(error)}"
            ) from error
        raise
    finally:
        # After a failure the others may be gone, and leaving in good order would wait for them.
        if is_whole or count == 1:
            dist.destroy_process_group()


def _check_count(config: PipelineConfig, count: int) -> None:
    wanted = 1 if config.train.strategy in ONE_PROCESS else config.train.num_processes
    if wanted is not None and wanted != count:
        raise RefusedError(
            f"{count} processes were started, strategy {config.train.strategy} with train.num_processes "
            f"{config.train.num_processes} expects {wanted}; start as many, or change the config"
        )


def _own_device(config: PipelineConfig, local_number: int) -> torch.device:
    assert config.model is not None, "check_supported has refused a config without a model"
    if config.model.device == "cpu" or not torch.cuda.is_available():
        return CPU
    if local_number >= torch.cuda.device_count():
        raise RefusedError(
            f"process {local_number + 1} of this machine finds {torch.cuda.device_count()} GPUs; set "
            f"train.num_processes to at most {torch.cuda.device_count()}, or model.device: cpu"
        )
    torch.cuda.set_device(local_number)
    return torch.device("cuda", local_number)


def _form_group(number: int, count: int, device: torch.device, timeout_seconds: float) -> None:
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store(number, count),
            rank=number,
            world_size=count,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(
            f"process {number} of {count} can't reach the others: {_line(error)}; start them together, and look "
            "for the first one that ended"
        ) from error


def _store(number: int, count: int) -> dist.Store | None:
    """Where the ranks find each other: the first one's port; None: where torchrun says."""
    if count == 1:
        return dist.HashStore()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return None  # torchrun has a store of its own
    host, port = _meeting_place()
    listening = os.environ.get(LISTENING_FD_VARIABLE)
    return dist.TCPStore(
        host,
        port,
        count,
        is_master=number == 0,
        timeout=timedelta(seconds=JOIN_SECONDS),
        master_listen_fd=int(listening) if number == 0 and listening is not None else None,
    )


def _meeting_place() -> tuple[str, int]:
    if PORT_VARIABLE in os.environ:
        return "127.0.0.1", int(os.environ[PORT_VARIABLE])
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(f"RANK is set in the environment, {missing[0]} is not")
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _is_lost_connection(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors that name its source files.
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
