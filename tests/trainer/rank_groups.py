"""Groups of processes that train together, in tests: started as torchrun starts them, watched, and read back."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer import ranks_program
from tests.trainer.tiny_models import tiny_run, write_model
from trainer.checkpoint import step_name
from trainer.job import plan_job, read_result
from trainer.support import ONE_PROCESS

ROOT = Path(__file__).parent.parent.parent
SETTINGS: dict[str, Any] = {
    "bins_per_step": 3,  # over two processes: one of them computes a filler in each step
    "lora": {"dropout": 0.1},
    "max_steps": 20,
    "checkpoint_every_steps": 10,
    "keep_checkpoints": 9,
}
FULL: dict[str, Any] = {"method": "full", "weight_decay": 0.1, "learning_rate": 1e-3, "max_steps": 6}
POISONED: dict[str, Any] = {"seed": ranks_program.POISONED_SEED, "max_steps": 8}
LONGEST_SECONDS = 590


@dataclass(frozen=True)
class Finished:
    """A finished training."""

    config: PipelineConfig
    result: TrainingResult

    @property
    def folder(self) -> Path:
        return self.config.run_root / "checkpoints" / self.result.key

    @property
    def steps(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]

    @property
    def losses(self) -> list[float | None]:
        return [step["loss"] for step in self.steps]

    def numbers(self, name: str) -> np.ndarray:
        """Of each step; not a number where it was not finite."""
        return np.array([step[name] for step in self.steps], float)

    @property
    def measured(self) -> list[dict[str, Any]]:
        """What each rank read and held, for trainings of ranks_program.MEASURED_SEED."""
        paths = [self.config.run_root / f"bytes-{rank}.json" for rank in range(self.result.num_processes)]
        return [json.loads(path.read_text()) for path in paths]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        (path,) = (self.folder / self.result.output).glob("*.safetensors")
        return load_file(path)


def finished(config: PipelineConfig) -> Finished:
    result = read_result(plan_job(config))
    assert result is not None
    return Finished(config, result)


def run_of(folder: Path, *, dtype: str = "float32", **train_settings: Any) -> PipelineConfig:
    """Run roots beside each other share the model."""
    model = folder.parent / "model"
    if not model.exists():
        write_model(model)
    settings = SETTINGS | train_settings
    if settings["strategy"] not in ONE_PROCESS:
        settings.setdefault("num_processes", 2)
    return tiny_run(folder, epochs=4, train=settings, model={"path": str(model), "dtype": dtype})


def unfinished_after(step: int, other: Finished, config: PipelineConfig) -> PipelineConfig:
    """Lets a run stand where `other` stood after that step, to be gone on with under other settings."""
    copy = config.run_root / "checkpoints" / other.result.key
    shutil.copytree(other.folder, copy)
    (copy / "training.json").unlink()
    shutil.rmtree(copy / "adapter")
    for later in copy.glob("step-*"):
        if later.name > step_name(step):
            shutil.rmtree(later)
    assert (copy / step_name(step)).is_dir()
    return config


def train_with_two_processes(configs: Mapping[Any, PipelineConfig], extensions: Path) -> str:
    return train_with_processes(configs, extensions, count=2)


def train_with_processes(configs: Mapping[Any, PipelineConfig], extensions: Path, *, count: int) -> str:
    """All of them, in one group of processes; what they said. One that fails ends all."""
    paths = []
    for config in configs.values():
        paths.append(config.run_root / "config.json")
        paths[-1].write_text(config.model_dump_json())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | place | {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(extensions)}
    said_path = paths[0].with_name("said.txt")  # a pipe that nobody reads would fill up
    with said_path.open("wb") as said:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.trainer.ranks_program", *map(str, paths)],
                cwd=ROOT,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=said,
                stderr=subprocess.STDOUT,
            )
            for rank in range(count)
        ]
        codes = _exit_codes(processes)
    text = said_path.read_text(errors="replace")
    assert codes == [0] * count, text[-8000:]
    return text


def _exit_codes(processes: "list[subprocess.Popen[bytes]]") -> list[int | None]:
    deadline = time.monotonic() + LONGEST_SECONDS
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                time.sleep(2.0)  # the others may have something to say, too
                break
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
