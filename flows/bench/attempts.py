"""One process of a contestant: what it is asked, whether an earlier call has it, what its result is worth."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.bench.contestants import OURS, Contestant, Variant
from flows.bench.making import documents_of
from flows.bench.options import BenchOptions, cache_of, config_of, learning_rate
from flows.bench.processes import Outcome, log_lines, run_process
from flows.bench.results import Run, check_counts, run_of
from flows.bench.search import say
from schemas.errors import IntegrityError
from schemas.pipeline_config import PipelineConfig
from schemas.run import CHECKPOINTS_FOLDER
from trainer.program_cache import VARIABLES

KERNEL_SIGNS = ("computing with ", "decoder layers compute", "layers are compiled", "nothing is compiled")
OUTCOME_NAME, CONFIG_NAME = "outcome.json", "config.json"


@dataclass(frozen=True, slots=True)
class Attempt:
    """`counts` are the tokens of each step by the plan; `max_steps` None is an epoch."""

    options: BenchOptions
    contestant: Contestant
    variant: Variant
    label: str
    counts: Sequence[Mapping[str, int]]
    max_steps: int | None
    num_warm_up: int
    timeout_seconds: float
    is_cold: bool = False

    @property
    def is_ours(self) -> bool:
        return self.contestant.name == OURS

    @property
    def folder(self) -> Path:
        return self.options.runs_folder / f"{self.label}-{self.contestant.name}"

    def config(self) -> PipelineConfig:
        return config_of(self.options, max_steps=self.max_steps, checkpointing=self.variant["checkpointing"])


def run_attempt(attempt: Attempt) -> Run | str:
    """Its numbers, or why there are none."""
    request = request_of(attempt)
    known = _known(attempt, request)
    if known is not None:
        say(f"{attempt.contestant.name} {attempt.label}: taken over from an earlier call")
        return known
    if attempt.is_ours:
        _begin_anew(attempt)
    cache = cache_of(attempt.options, attempt.contestant.name)
    if attempt.is_cold:
        shutil.rmtree(cache, ignore_errors=True)
    # Ours is told by its config, as a user would.
    caches = {} if attempt.is_ours else {variable: str(cache / name) for variable, name in VARIABLES.items()}
    outcome = run_process(
        attempt.contestant.command,
        request,
        attempt.folder,
        timeout_seconds=attempt.timeout_seconds,
        environment=caches,
    )
    found = judged(attempt, outcome)
    if not outcome.is_cut_off:
        _note(attempt, request, found)
    return found


def request_of(attempt: Attempt) -> dict[str, Any]:
    """The same for all; ours has its settings in a config, which also says whether an earlier result still holds."""
    options = attempt.options
    request = {
        "documents": str(documents_of(options)),
        "model": str(options.model_folder),
        "method": options.method,
        "base": options.base,
        "rank": options.rank,
        "alpha": 2 * options.rank,
        "learning_rate": learning_rate(options),
        "num_steps": attempt.max_steps or len(attempt.counts),
        "num_warm_up": attempt.num_warm_up,
        "bins_per_step": options.bins_per_step,
        "capacity": options.capacity,
        "device": options.device,
        "dtype": options.dtype,
        "memory_cap_gib": options.memory_cap_gib,
        "variant": attempt.variant,
    }
    if attempt.is_ours:
        settings = attempt.config().model_dump(mode="json")
        request |= {"config": str(attempt.folder / CONFIG_NAME), "settings": settings}
    return request


def judged(attempt: Attempt, outcome: Outcome) -> Run | str:
    """A result counts if its tokens are those of the plan."""
    if outcome.raw is None:
        return outcome.problem
    steps = outcome.raw["steps"]
    if len(steps) <= attempt.num_warm_up:
        return f"made {len(steps)} steps, more than {attempt.num_warm_up} are needed"
    try:
        check_counts(attempt.contestant.name, steps, attempt.counts, exact=_makes_our_steps(attempt))
    except IntegrityError as error:
        return str(error)
    return run_of(
        outcome.raw,
        num_warm_up=attempt.num_warm_up,
        started_at=outcome.started_at,
        ended_at=outcome.ended_at,
        nvml_gib=outcome.nvml_gib,
        is_cold=attempt.is_cold,
        kernel=_kernel_of_ours(attempt) if attempt.is_ours else "",
    )


def _makes_our_steps(attempt: Attempt) -> bool:
    return attempt.is_ours or (attempt.contestant.name == "trl" and bool(attempt.variant["packing"]))


def _kernel_of_ours(attempt: Attempt) -> str:
    """As the training itself said it, in its order."""
    said = [line for line in log_lines(attempt.folder) if any(sign in line for sign in KERNEL_SIGNS)]
    kernels = [line.removeprefix(KERNEL_SIGNS[0]) for line in said] or ["not said"]
    compiled = ["compiled"] * attempt.config().train.compile
    return ", ".join([*kernels, *compiled, f"checkpointing {attempt.variant['checkpointing']}"])


def _begin_anew(attempt: Attempt) -> None:
    """A finished training of the same key would be taken as it is."""
    config = attempt.config()
    shutil.rmtree(config.run_root / CHECKPOINTS_FOLDER, ignore_errors=True)
    attempt.folder.mkdir(parents=True, exist_ok=True)
    (attempt.folder / CONFIG_NAME).write_text(config.model_dump_json())


# What an earlier call has found -----------------------------------------------------------------------------


def _note(attempt: Attempt, request: Mapping[str, Any], found: Run | str) -> None:
    outcome = {"problem": found} if isinstance(found, str) else {"run": dataclasses.asdict(found)}
    (attempt.folder / OUTCOME_NAME).write_text(json.dumps({"request": request, **outcome}))


def _known(attempt: Attempt, request: Mapping[str, Any]) -> Run | str | None:
    path = attempt.folder / OUTCOME_NAME
    if not attempt.options.resume or not path.is_file():
        return None
    known = json.loads(path.read_bytes())
    if known["request"] != request:
        return None
    if "problem" in known:
        return str(known["problem"])
    return Run(**{**known["run"], "grad_norms": tuple(known["run"]["grad_norms"])})
