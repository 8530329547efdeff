"""What a benchmark is asked to do, and the config of ours that follows from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.storage import json_digest
from schemas.config_file import load_config
from schemas.errors import ConfigError
from schemas.pipeline_config import PipelineConfig
from schemas.training_config import TrainConfig

Data = Literal["alpaca", "long", "whole"]
Checkpointing = Literal["none", "selective", "full", "auto"]
CHECKPOINTING_FIELD = "gradient_checkpointing"


SHAPING = (
    *("shape", "method", "base", "rank", "data", "tokens_per_step", "capacity", "num_chats", "checkpointing"),
    *("compile", "num_steps", "num_warm_up", "memory_cap_gib", "device", "dtype", "overrides"),
)


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """See the command's --help. `num_steps` are timed, behind `num_warm_up` others; 0 stands for an epoch."""

    folder: Path
    shape: str = "8b"
    method: str = "lora"
    base: str = "plain"
    rank: int = 16
    data: Data = "alpaca"
    tokens_per_step: int = 8192
    capacity: int = 8192
    num_chats: int = 0
    checkpointing: Checkpointing = "none"
    compile: bool | None = None
    """None: as ours does where nothing is said."""
    peers: tuple[str, ...] = ()
    peer_pythons: Mapping[str, str] | None = None
    num_steps: int = 50
    num_warm_up: int = 10
    num_rounds: int = 3
    steps_of: Mapping[str, int] | None = None
    """Timed steps of single peers, fewer than ours."""
    rounds_of: Mapping[str, int] | None = None
    limit_seconds: float | None = None
    memory_cap_gib: float | None = None
    device: str = "auto"
    dtype: str = "bfloat16"
    sweep: bool = True
    variants_of: Path | None = None
    resume: bool = False
    timeout_seconds: float = 1800.0
    overrides: tuple[str, ...] = ()

    @property
    def bins_per_step(self) -> int:
        return self.tokens_per_step // self.capacity

    @property
    def max_steps(self) -> int | None:
        return self.max_steps_of("")

    def max_steps_of(self, name: str) -> int | None:
        """Of a contestant; None where it trains an epoch."""
        num_steps = (self.steps_of or {}).get(name, self.num_steps)
        return self.num_warm_up + num_steps if num_steps else None

    def num_rounds_of(self, name: str) -> int:
        return min(self.num_rounds, (self.rounds_of or {}).get(name, self.num_rounds))

    @property
    def model_folder(self) -> Path:
        return self.folder / f"model-{self.shape}"

    @property
    def data_folder(self) -> Path:
        """Chats, run root and documents: one for all benchmarks that train on the same."""
        length = self.max_steps if self.max_steps is not None else f"{self.num_chats}-chats"
        return (
            self.folder / "data" / f"{self.data}-{self.shape}-{self.bins_per_step}x{self.capacity}-{length}"
        )

    @property
    def runs_folder(self) -> Path:
        """Processes of this benchmark, told from others in the same folder by all that shapes their numbers."""
        facts = {name: str(getattr(self, name)) for name in SHAPING}
        return self.folder / "runs" / json_digest(facts)[:12]

    def python_of(self, name: str) -> str | None:
        return (self.peer_pythons or {}).get(name)


def pythons_of(pairs: Sequence[str]) -> dict[str, str]:
    """From NAME=PATH to a dict. Raises ConfigError."""
    found = dict(pair.partition("=")[::2] for pair in pairs)
    for name, path in found.items():
        if not name or not path:
            raise ConfigError(f"--peer-python {name}: expected NAME=PATH, such as trl=/envs/trl/bin/python")
    return found


def numbers_of(pairs: Sequence[str], flag: str) -> dict[str, int]:
    """From NAME=NUMBER to a dict. Raises ConfigError."""
    found = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if not name or not number.isdecimal() or int(number) < 1:
            raise ConfigError(f"{flag} {pair}: expected NAME=NUMBER, such as padded=10")
        found[name] = int(number)
    return found


def check_options(options: BenchOptions) -> None:
    """Raises ConfigError where numbers can't be meant."""
    if options.tokens_per_step % options.capacity:
        raise ConfigError(
            f"--tokens-per-step is {options.tokens_per_step}, expected a multiple of --capacity {options.capacity}"
        )
    if options.num_warm_up < 1 or options.num_rounds < 1 or options.num_steps < 0:
        raise ConfigError(
            f"--warm-up is {options.num_warm_up}, --rounds {options.num_rounds}, --steps {options.num_steps}: "
            "expected 1 or more, and for --steps 0 or more"
        )
    for name, num_steps in (options.steps_of or {}).items():
        if options.num_steps and num_steps > options.num_steps:
            raise ConfigError(
                f"--peer-steps {name}={num_steps}: expected at most --steps, {options.num_steps}"
            )
    if options.num_steps == 0 and options.num_chats == 0:
        raise ConfigError("--steps 0 trains all of an epoch: say with --chats how many chats it has")


def config_of(options: BenchOptions, *, max_steps: int | None, checkpointing: str) -> PipelineConfig:
    """The config of ours, read as a user's would be, from a file in the folder."""
    path = options.data_folder / "bench.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_document(options, max_steps, checkpointing), indent=1))  # JSON is YAML, too
    return load_config(path, options.overrides)


def cache_of(options: BenchOptions, name: str) -> Path:
    """Where a contestant's compiled programs are kept from process to process."""
    return options.runs_folder / "cache" / name


def learning_rate(options: BenchOptions) -> float:
    return 2e-5 if options.method == "full" else 2e-4


def _document(options: BenchOptions, max_steps: int | None, checkpointing: str) -> dict[str, Any]:
    return {
        "run_root": "run",
        "sources": [{"name": "made", "path": "made.jsonl", "format": "messages"}],
        "holdout": {"validation": 0, "test": 0},
        "split": {"max_tokens": options.capacity},
        "model": {"path": str(options.model_folder), "dtype": options.dtype, "device": options.device},
        "train": {
            "method": options.method,
            "base": options.base,
            "lora": {"rank": options.rank, "alpha": 2 * options.rank, "targets": "all-linear"},
            "bins_per_step": options.bins_per_step,
            "bins_per_micro_step": options.bins_per_step,
            "learning_rate": learning_rate(options),
            "schedule": "constant",
            "warmup_steps": 0,
            "max_steps": max_steps,
            **({} if options.compile is None else {"compile": options.compile}),
            "compile_cache": str(cache_of(options, "ours")),
            "checkpoint_every_steps": max(options.num_steps // 2, 1),
            **checkpointing_setting(checkpointing),
        },
    }


def checkpointing_setting(name: str) -> dict[str, Any]:
    """As this version's config writes it. Raises ConfigError where it has no such kind."""
    for value in _ways_to_write(name):
        if _is_taken(value):
            return {CHECKPOINTING_FIELD: value}
    raise ConfigError(
        f"--checkpointing {name}: train.{CHECKPOINTING_FIELD} of this version does not know it; none and full do"
    )


def is_known(name: str) -> bool:
    """Whether this version's config has that kind of checkpointing."""
    return any(map(_is_taken, _ways_to_write(name)))


def _ways_to_write(name: str) -> list[str | bool]:
    switch = {"none": False, "full": True}
    return [name, *([switch[name]] if name in switch else [])]


def _is_taken(value: str | bool) -> bool:
    from pydantic import ValidationError

    try:
        found = getattr(TrainConfig.model_validate({CHECKPOINTING_FIELD: value}), CHECKPOINTING_FIELD)
    except ValidationError:
        return False
    return bool(found == value)
