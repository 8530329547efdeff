"""Recipes at toy size: data of the kinds that they name, at the places that they name, small enough for seconds."""

import csv
import json
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flows.recipe import RECIPES_FOLDER
from pipelines.stage import run_stage
from schemas.config_file import load_config
from schemas.pipeline_config import PipelineConfig
from schemas.run import STAGES
from tests.integration.toy import NOUNS, VERBS, write_model

ROOT = Path(__file__).parent.parent
NUM_RECORDS = 120
NUM_STEPS = 50
SIZE: dict[str, Any] = {
    "model.device": "cpu",
    "split.max_tokens": 128,
    "pack.capacity": 128,
    "filter.skip_languages": [],  # a language of twelve nouns is told by chance
    "dedup.near": False,
    "holdout.validation": 0.05,
    "holdout.test": 0.05,
    "train.max_steps": NUM_STEPS,
    "train.epochs": 4,
    "train.bins_per_step": 1,
    "train.bins_per_micro_step": 1,
    "train.learning_rate": 1e-2,
    "train.warmup_steps": 2,
    "train.checkpoint_every_steps": NUM_STEPS,
    "train.trackers": [],
    "engine.workers": 1,
    "engine.min_free_gib": 0.1,
}
"""Of every recipe. What it trains, how, and on what kind of data stays as it is."""
VIRTUAL_TOKENS = {"train.virtual_tokens.count": 8, "train.learning_rate": 0.1}
METHOD_SIZE: dict[str, dict[str, Any]] = {
    "freeze": {"train.freeze.last_layers": 1},
    "prefix": {**VIRTUAL_TOKENS, "train.virtual_tokens.inner_size": 16},
    "p_tuning": {**VIRTUAL_TOKENS, "train.virtual_tokens.inner_size": 16, "train.learning_rate": 1e-2},
    "prompt": VIRTUAL_TOKENS,
    "llama_adapter": {**VIRTUAL_TOKENS, "train.virtual_tokens.layers": 1},
}
"""Of those of a method, for a model of two layers."""


def toy_recipe(folder: Path, name: str, overrides: Mapping[str, Any] | None = None) -> PipelineConfig:
    """The recipe's own file beside toy data and a toy model, with sizes changed as by --set."""
    path = folder / f"{name}.yaml"
    shutil.copyfile(RECIPES_FOLDER / path.name, path)
    as_written = load_config(path)
    assert as_written.model is not None
    write_sources(folder, as_written)
    size = SIZE | {"model.path": str(toy_model(folder))} | dict(overrides or {})
    if as_written.model.dtype == "auto":
        size["model.dtype"] = "float32"
    if as_written.pack.documents == "window":
        size["pack.window_tokens"] = 32
    return load_config(path, size | METHOD_SIZE.get(as_written.train.method, {}))


def run_stages(config: PipelineConfig) -> None:
    for stage in STAGES:
        run_stage(stage, config)


# The model ----------------------------------------------------------------------------------------------------


def toy_model(folder: Path) -> Path:
    """Two layers, 32 wide, with a tokenizer that has a chat template."""
    place = folder / "toy-model"
    if place.exists():
        return place
    templates = [path.read_text() for path in (ROOT / "pipelines" / "chat_templates").glob("*.jinja")]
    answers = [record["answer"] for record in records()]
    texts = [*templates * 3, *answers]  # else a prompt is longer than a row here
    sizes = {"intermediate_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 512}
    write_model(place, texts, hidden_size=32, **sizes)
    return place


# The data -----------------------------------------------------------------------------------------------------


def records() -> list[dict[str, str]]:
    """Each answer follows from its question, in a language that a few steps teach."""
    draw = random.Random(0)
    found = []
    for number in range(NUM_RECORDS):
        noun, verb, other = draw.choice(NOUNS), draw.choice(VERBS), draw.choice(NOUNS)
        question = f"What does the {noun} do, number {number}?"
        found.append({"question": question, "answer": f"The {noun} {verb} the {other} near the {noun}."})
    return found


def write_sources(folder: Path, config: PipelineConfig) -> None:
    """Files at the paths of the config's sources, which lie beside it."""
    for source in config.sources:
        if not source.path:
            continue
        path = Path(source.path.replace("*", "1"))
        path.parent.mkdir(parents=True, exist_ok=True)
        KINDS[_kind(source.name)](path, records())


def _kind(source_name: str) -> str:
    return source_name if source_name in KINDS else "messages"


def _write_lines(path: Path, found: Iterable[Any]) -> None:
    path.write_text("\n".join(map(json.dumps, found)) + "\n")


def _alpaca(path: Path, found: list[dict[str, str]]) -> None:
    _write_lines(path, ({"instruction": r["question"], "input": "", "output": r["answer"]} for r in found))


def _messages(path: Path, found: list[dict[str, str]]) -> None:
    roles = {"user": "question", "assistant": "answer"}
    chats = ({"messages": [{"role": k, "content": r[v]} for k, v in roles.items()]} for r in found)
    _write_lines(path, chats)


def _sharegpt(path: Path, found: list[dict[str, str]]) -> None:
    sides = {"human": "question", "gpt": "answer"}
    page = '<div class="markdown prose"><p>{}</p></div>'
    chats = []
    for number, record in enumerate(found):
        turns = [{"from": side, "value": record[key]} for side, key in sides.items()]
        turns[1]["value"] = page.format(turns[1]["value"])
        chats.append({"id": f"{path.stem}-{number}", "conversations": turns})
    path.write_text(json.dumps(chats))


def _papers(path: Path, found: list[dict[str, str]]) -> None:
    texts = (" ".join(r["answer"] for r in found[n : n + 6]) for n in range(len(found) - 6))
    _write_lines(path, ({"text": text} for text in texts))


def _questions(path: Path, found: list[dict[str, str]]) -> None:
    _write_lines(path, found)


def _grammar(path: Path, found: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["input", "target"])
        writer.writerows((r["question"].replace("does", "do"), r["question"]) for r in found)


def _quotes(path: Path, found: list[dict[str, str]]) -> None:
    _write_lines(path, ({"quote": r["answer"], "author": r["question"], "tags": ["x"]} for r in found))


Write = Callable[[Path, list[dict[str, str]]], None]
KINDS: dict[str, Write] = {
    "alpaca": _alpaca,
    "gpt4": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "papers": _papers,
    "medqa": _papers,
    "medqa_chats": _questions,
    "grammar": _grammar,
    "quotes": _quotes,
}
"""By the name of the source in the recipe."""
