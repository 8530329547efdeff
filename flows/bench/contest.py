"""The whole benchmark: things are made once, each contestant finds its best way, then all take turns."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.bench.contestants import OURS, Contestant, Variant, contestants_of
from flows.bench.options import (
    SWEEP_STEPS,
    SWEEP_WARM_UP_STEPS,
    BenchOptions,
    check_options,
    config_of,
)
from flows.bench.processes import Outcome, log_lines, run_process
from flows.bench.results import Run, Summary, check_counts, run_of
from flows.bench.search import Tried, first_of, say, search
from flows.packages import OUR_FOLDER
from schemas.errors import InputError, TrainingError
from schemas.run import CHECKPOINTS_FOLDER

SWEEP_TIMEOUT_SECONDS = 420.0
SPARE_STEPS = 2
"""Of made chats, so that the last step is full."""
KERNEL_LINE = "computing with "
OUTCOME_NAME = "outcome.json"


@dataclass(slots=True)
class Entry:
    """What became of a contestant. `problem` says why it is left out."""

    contestant: Contestant
    variant: Variant
    tried: list[Tried] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    problem: str = ""

    @property
    def name(self) -> str:
        return self.contestant.name

    def summary(self) -> Summary:
        return Summary(self.name, tuple(self.runs))


def run_bench(options: BenchOptions) -> list[Entry]:
    """Ours first. Raises ConfigError, and TrainingError where ours did not come to its end."""
    check_options(options)
    options = dataclasses.replace(options, folder=options.folder.resolve())
    entries = [Entry(found, first_of(found.dimensions)) for found in contestants_of(options)]
    if not options.resume:
        shutil.rmtree(options.folder / "runs", ignore_errors=True)
    prepare(options)
    contest = Contest(options, read_counts(options))
    for entry in entries:
        contest.choose_variant(entry)
    for number in range(1, options.num_rounds + 1):
        for entry in entries if number % 2 else reversed(entries):
            contest.run_round(entry, number)
    return entries


def prepare(options: BenchOptions) -> None:
    """Weights, chats and shards; what lies there already is taken as it is."""
    say("making weights, chats and shards")
    folder = options.folder / "prepare"
    config = config_of(options, max_steps=options.max_steps, checkpointing="none")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.model_dump_json())
    steps = (options.max_steps or 0) + SPARE_STEPS if options.max_steps else 0
    request = {
        "shape": options.shape,
        "config": str(folder / "config.json"),
        "documents": str(_documents(options)),
        "chats": {
            "kind": options.data,
            "num_tokens": steps * options.tokens_per_step,
            "num_chats": options.num_chats,
            "longest": options.capacity,
        },
    }
    command = (sys.executable, str(OUR_FOLDER / "flows" / "child.py"), "trainer.bench.prepare")
    outcome = run_process(command, request, folder, timeout_seconds=options.timeout_seconds)
    if outcome.raw is None:
        raise InputError(f"nothing to train on could be made: {outcome.problem}; see {folder}")


def read_counts(options: BenchOptions) -> list[dict[str, int]]:
    """Tokens and trained tokens of each step, by the plan."""
    found: list[dict[str, int]] = json.loads(_documents(options).with_suffix(".json").read_bytes())
    if options.max_steps is not None and len(found) < options.max_steps:
        raise InputError(
            f"the chats fill {len(found)} steps, {options.max_steps} are asked for: say no --chats, or more of them"
        )
    return found


def _documents(options: BenchOptions) -> Path:
    return options.folder / "documents.safetensors"


class Contest:
    """Runs contestants; what it asks of each is the same."""

    def __init__(self, options: BenchOptions, counts: Sequence[Mapping[str, int]]) -> None:
        self._options = options
        self._counts = counts

    def choose_variant(self, entry: Entry) -> None:
        """Take the fastest, dimension by dimension, or what an earlier benchmark has found."""
        options = self._options
        if options.variants_of is not None:
            entry.variant |= variants_in(options.variants_of).get(entry.name, {})
            return
        if not options.sweep:
            return

        def measure(variant: Variant) -> Tried:
            found = self._run(entry.contestant, variant, f"sweep-{len(entry.tried) + 1}", is_trial=True)
            tried = (
                Tried(variant, None, found)
                if isinstance(found, str)
                else Tried(variant, found.tokens_per_second)
            )
            entry.tried.append(tried)
            return tried

        entry.variant = search(entry.contestant.dimensions, measure)

    def run_round(self, entry: Entry, number: int) -> None:
        """One process. A peer that fails is left out of the rounds that follow; raises TrainingError for ours."""
        if entry.problem:
            return
        cache = self._cache(entry.name)
        if number == 1 and not self._is_done(entry.name, "round-1"):
            shutil.rmtree(cache, ignore_errors=True)
        found = self._run(entry.contestant, entry.variant, f"round-{number}", is_cold=number == 1)
        if isinstance(found, Run):
            entry.runs.append(found)
            say(f"round {number}: {entry.name} {found.tokens_per_second:,.0f} tokens/s")
            return
        if entry.name == OURS:
            raise TrainingError(
                f"ours, round {number}: {found}; see {self._folder(entry.name, f'round-{number}')}"
            )
        entry.problem = found
        say(f"{entry.name} is left out: {found}")

    def _run(
        self,
        contestant: Contestant,
        variant: Variant,
        label: str,
        *,
        is_trial: bool = False,
        is_cold: bool = False,
    ) -> Run | str:
        options = self._options
        num_warm_up = SWEEP_WARM_UP_STEPS if is_trial else options.num_warm_up
        num_steps = SWEEP_STEPS if is_trial else len(self._counts)
        folder = self._folder(contestant.name, label)
        request = self._request(variant, num_warm_up, num_steps)
        if contestant.name == OURS:
            request["config"] = self._config(folder, variant, num_steps if is_trial else options.max_steps)
        if self._is_done(contestant.name, label):
            known = json.loads((folder / OUTCOME_NAME).read_bytes())
            if known["request"] == request:
                say(f"{contestant.name} {label}: taken over from an earlier call")
                return known["problem"] or Run(
                    **{**known["run"], "grad_norms": tuple(known["run"]["grad_norms"])}
                )
        cache = self._cache(contestant.name)
        outcome = run_process(
            contestant.command,
            request,
            folder,
            timeout_seconds=SWEEP_TIMEOUT_SECONDS if is_trial else options.timeout_seconds,
            environment={
                "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
                "TRITON_CACHE_DIR": str(cache / "triton"),
            },
        )
        found = self._judged(contestant, outcome, folder, variant, num_warm_up, is_cold)
        record = (
            {"run": dataclasses.asdict(found), "problem": ""}
            if isinstance(found, Run)
            else {"problem": found}
        )
        (folder / OUTCOME_NAME).write_text(json.dumps({"request": request, **record}))
        return found

    def _judged(
        self,
        contestant: Contestant,
        outcome: Outcome,
        folder: Path,
        variant: Variant,
        num_warm_up: int,
        is_cold: bool,
    ) -> Run | str:
        if outcome.raw is None:
            return outcome.problem
        steps = outcome.raw["steps"]
        if len(steps) <= num_warm_up:
            return f"made {len(steps)} steps, more than {num_warm_up} are needed"
        makes_our_steps = contestant.name == OURS or (contestant.name == "trl" and bool(variant["packing"]))
        check_counts(contestant.name, steps, self._counts, exact=makes_our_steps)
        said = [line for line in log_lines(folder) if line.startswith(KERNEL_LINE)]
        return run_of(
            outcome.raw,
            num_warm_up=num_warm_up,
            started_at=outcome.started_at,
            ended_at=outcome.ended_at,
            nvml_gib=outcome.nvml_gib,
            is_cold=is_cold,
            kernel=f"{said[0].removeprefix(KERNEL_LINE)}, checkpointing {variant.get('checkpointing')}"
            if said
            else "",
        )

    def _request(self, variant: Variant, num_warm_up: int, num_steps: int) -> dict[str, Any]:
        options = self._options
        return {
            "documents": str(_documents(options)),
            "model": str(options.folder / f"model-{options.shape}"),
            "method": options.method,
            "base": options.base,
            "rank": options.rank,
            "alpha": 2 * options.rank,
            "learning_rate": 2e-4 if options.method != "full" else 2e-5,
            "num_steps": num_steps,
            "num_warm_up": num_warm_up,
            "bins_per_step": options.bins_per_step,
            "capacity": options.capacity,
            "device": options.device,
            "dtype": options.dtype,
            "memory_cap_gib": options.memory_cap_gib,
            "variant": variant,
        }

    def _config(self, folder: Path, variant: Variant, max_steps: int | None) -> str:
        """Ours begins anew each time: a finished training of the same key would be taken as it is."""
        config = config_of(self._options, max_steps=max_steps, checkpointing=variant["checkpointing"])
        shutil.rmtree(config.run_root / CHECKPOINTS_FOLDER, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.json"
        path.write_text(config.model_dump_json())
        return str(path)

    def _folder(self, name: str, label: str) -> Path:
        return self._options.folder / "runs" / f"{label}-{name}"

    def _cache(self, name: str) -> Path:
        return self._options.folder / "cache" / name

    def _is_done(self, name: str, label: str) -> bool:
        return self._options.resume and (self._folder(name, label) / OUTCOME_NAME).is_file()


def variants_in(path: Path) -> dict[str, Variant]:
    """What an earlier benchmark found best, by contestant. Raises InputError."""
    try:
        return {entry["name"]: entry["variant"] for entry in json.loads(path.read_bytes())["contestants"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--variants-of {path} is no result of `bench train --json` ({error})") from None
