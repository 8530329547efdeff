"""Weights, chats, shards and documents: made once, in a process of its own, so that the GPU is free after it."""

import json
import sys
from pathlib import Path
from typing import Any

from flows.bench.options import BenchOptions, config_of
from flows.bench.processes import run_process
from flows.bench.search import say
from flows.packages import OUR_FOLDER
from schemas.errors import InputError

SPARE_STEPS = 2
"""Of made chats, so that the last step is full."""


def make(options: BenchOptions, *, weights: bool = True) -> list[dict[str, int]]:
    """Tokens and trained tokens of each step, by the plan. What lies there already, of the same numbers, is taken.

    Without weights all else is made: a machine with a GPU may lack what the data stages need. Raises InputError where
    nothing could be made, or too little.
    """
    folder = options.data_folder / "making"
    request = _request(options, folder) | {"weights": weights}
    say("making weights, chats and shards" if weights else "making chats and shards")
    command = (sys.executable, str(OUR_FOLDER / "flows" / "child.py"), "trainer.bench.prepare")
    outcome = run_process(command, request, folder, timeout_seconds=options.timeout_seconds)
    if outcome.raw is None:
        raise InputError(f"nothing to train on could be made: {outcome.problem}; see {folder}")
    found: list[dict[str, int]] = json.loads(documents_of(options).with_suffix(".json").read_bytes())
    if options.max_steps is not None and len(found) < options.max_steps:
        raise InputError(
            f"{options.num_chats} chats fill {len(found)} steps, {options.max_steps} are asked for: leave --chats out, "
            "or ask for more of them"
        )
    return found


def documents_of(options: BenchOptions) -> Path:
    """The tokens of all steps, for the peers; beside it in JSON how many each step has."""
    return options.data_folder / "documents.safetensors"


def _request(options: BenchOptions, folder: Path) -> dict[str, Any]:
    config = config_of(options, max_steps=options.max_steps, checkpointing="none")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.model_dump_json())
    num_steps = options.max_steps + SPARE_STEPS if options.max_steps is not None else 0
    return {
        "shape": options.shape,
        "config": str(folder / "config.json"),
        "documents": str(documents_of(options)),
        "chats": {
            "kind": options.data,
            "num_tokens": num_steps * options.tokens_per_step,
            "num_chats": options.num_chats,
            "longest": options.capacity,
        },
    }
