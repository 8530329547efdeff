"""Two weeks of a toy run, one command at a time, with the run root as it was before each: faults begin there.

The first week starts from nothing. In the second a source is added and the training is longer, so every folder is
written over a finished one. The last command is a rollback.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from schemas.run import STAGES
from tests.integration import toy
from tests.integration.faults.published import digests
from tests.integration.faults.warm import Call, Warm

NAMES = (*STAGES, "train", "evaluate", "promote")
DISK = "disk"
"""The folder that holds the run root, and nothing else."""
PHASES = tuple([f"{name}-{week}" for week in (1, 2) for name in NAMES] + ["rollback-2"])

SETTINGS = {
    "validation: 0.08, test: 0.12": "validation: 0.2, test: 0.35",
    "max_tokens: 256": "max_tokens: 192",
    "max_steps: 12, bins_per_step: 4, bins_per_micro_step: 4": "max_steps: 3, bins_per_step: 2, bins_per_micro_step: 2",
    "checkpoint_every_steps: 4": "checkpoint_every_steps: 1, keep_checkpoints: 1, evaluate_every_steps: 2",
    "min_free_gib: 0.1": "min_free_gib: 0, lock_wait_seconds: 0",
}


@dataclass(frozen=True, slots=True)
class Phase:
    """One command: what it finds (`before`), what it leaves (`after`), and its calls that change files."""

    name: str
    arguments: tuple[str, ...]
    before: Path
    after: dict[str, str]
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Journey:
    warm: Warm
    run_root: Path
    phases: dict[str, Phase]

    def rewind(self, phase: Phase) -> None:
        """The run root as `phase` finds it."""
        shutil.rmtree(self.seen, ignore_errors=True)
        if phase.before.exists():
            shutil.copytree(phase.before, self.seen)

    @property
    def seen(self) -> Path:
        """The run root by the path under which this process sees it, also when it is mounted for the warm one alone."""
        return self.warm.seen(self.run_root)


def write_inputs(folder: Path) -> None:
    """Dumps, model, and the configs of both weeks: week-1.yaml, week-2.yaml."""
    toy.write_dumps(folder / "dumps", num_chats=14, num_records=6)
    records = [json.dumps(record) for record in toy.alpaca_records(8, seed=7)]
    (folder / "dumps" / "more.jsonl").write_text("\n".join(records) + "\n")
    toy.write_model(folder / "model")
    (folder / DISK).mkdir()
    config = toy.write_config(folder)
    text = config.read_text().replace("run_root: run", f"run_root: {DISK}/run")
    for old, new in SETTINGS.items():
        assert old in text, old
        text = text.replace(old, new)
    config.unlink()
    (folder / "week-1.yaml").write_text(text)
    grown = text.replace("alpaca.jsonl}", "alpaca.jsonl}\n  - {name: more, path: dumps/more.jsonl}")
    (folder / "week-2.yaml").write_text(grown.replace("max_steps: 3", "max_steps: 5"))


def travel(warm: Warm, folder: Path, *, names: Sequence[str] = PHASES) -> Journey:
    """These phases once, without a fault; `folder` holds what write_inputs has written."""
    journey = Journey(warm, folder / DISK / "run", {})
    for name in names:
        before = folder / "before" / name
        if journey.seen.exists():
            shutil.copytree(journey.seen, before)
        arguments = _arguments(name, folder)
        ended = warm.run(*arguments, under=journey.run_root, learn=True)
        assert ended.code == 0, (name, ended.output)
        journey.phases[name] = Phase(name, arguments, before, digests(journey.seen), ended.calls)
    return journey


def _arguments(phase: str, folder: Path) -> tuple[str, ...]:
    name, week = phase.split("-")
    words = ("step", name) if name in STAGES else (name,)
    return (*words, str(folder / f"week-{week}.yaml"))
