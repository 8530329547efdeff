"""Rows of the support matrix as trainings of three steps: on one process here, on two in one group of ranks."""

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from schemas.pipeline_config import PipelineConfig
from tests.trainer.rank_groups import train_with_two_processes
from tests.trainer.ranks_program import BACKEND_VARIABLE
from tests.trainer.tiny_models import learnable_documents, tiny_run, write_model, write_plans
from trainer import compiling
from trainer.job import plan_job
from trainer.support import ONE_PROCESS
from trainer.support_matrix import Answer, model_settings, train_settings
from trainer.train import train_job

NUM_STEPS = 3
QUICK_BACKEND = "aot_eager"
"""Traces and differentiates as the default does, and leaves the C++ compiler out."""
NUM_DOCUMENTS = 20
DOCUMENTS = {
    "train": learnable_documents(NUM_DOCUMENTS),
    "validation": learnable_documents(6, seed=1),
    "test": learnable_documents(6, seed=2),
}
Settings = Mapping[str, Any]


def row_name(settings: Settings) -> str:
    """zero2-lora-int8-bfloat16-packed-checkpointing"""
    words = (
        str(name) if value is True else str(value) for name, value in settings.items() if value is not False
    )
    return "-".join(words)


def config_of_row(folder: Path, settings: Settings) -> PipelineConfig:
    """A run root of that name beside the model that all rows share."""
    model = folder / "model"
    if not model.exists():
        write_model(model)
    place = folder / row_name(settings)
    train = {
        "max_steps": NUM_STEPS,
        "bins_per_step": 3,  # over two processes: one of them computes a filler
        "learning_rate": 1e-3 if settings["method"] == "full" else 1e-2,
        "num_processes": 1 if settings["strategy"] in ONE_PROCESS else 2,
        **train_settings(settings),
    }
    train["lora"] = {"rank": 4, "alpha": 8, **train.get("lora", {})}
    config = tiny_run(
        place,
        train=train,
        model={"path": str(model), **model_settings(settings)},
        num_documents=NUM_DOCUMENTS,
        pack={"mode": settings["packing"]},
    )
    write_plans(config.run_root, DOCUMENTS, capacity=64 if settings["packing"] == "packed" else 1)
    return config


def losses_of_rows(folder: Path, rows: Sequence[Settings]) -> dict[str, list[float]]:
    """Losses of the three steps by the row's name."""
    configs = {row_name(row): config_of_row(folder, row) for row in rows}
    alone = {name: one for name, one in configs.items() if one.train.strategy in ONE_PROCESS}
    together = {name: one for name, one in configs.items() if name not in alone}
    with (
        mock.patch.object(compiling, "BACKEND", QUICK_BACKEND),
        mock.patch.dict(os.environ, {BACKEND_VARIABLE: QUICK_BACKEND}),
    ):
        for config in alone.values():
            train_job(plan_job(config))
        if together:
            train_with_two_processes(together, folder / "extensions")
    return {name: read_losses(config) for name, config in configs.items()}


def read_losses(config: PipelineConfig) -> list[float]:
    (metrics,) = (config.run_root / "checkpoints").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    return [math.nan if loss is None else loss for loss in losses]


def reference_of(settings: Settings) -> dict[str, Any]:
    """The row that computes the same the plain way: one process, plain base, fp32, nothing switched on.

    Full tuning of this model overflows in fp16 at first, and skips that step: there fp16 is compared with fp16.
    """
    overflows = (settings["method"], settings["dtype"]) == ("full", "float16")
    plain = {"strategy": "single", "base": "plain", "dtype": "float16" if overflows else "float32"}
    return {name: plain.get(name, False if value is True else value) for name, value in settings.items()}


def covering(found: Iterable[Answer], *, num_settings: int) -> list[Answer]:
    """Few rows in which every so many values that meet in some row meet."""
    rows = list(found)
    groups = {id(row): set(itertools.combinations(row.settings.items(), num_settings)) for row in rows}
    left = set().union(*groups.values())
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(groups[id(row)] & left))
        chosen.append(best)
        left -= groups[id(best)]
    return chosen
