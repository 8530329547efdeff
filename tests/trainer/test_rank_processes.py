"""The starter of several ranks: one failure ends all and is told once, a signal stops all at the same step."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from schemas.errors import SftPipelineError, TrainingError, UsageError
from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer.tiny_models import tiny_run, write_model
from trainer import checkpoint
from trainer.job import plan_job, read_result
from trainer.rank_processes import (
    LOST_RANKS_EXIT_CODE,
    OUT_OF_MEMORY_EXIT_CODE,
    _failure,
    _Rank,
    _RanksOutOfMemoryError,
    count_processes,
    smaller,
)

ROOT = Path(__file__).parent.parent.parent
WAIT_SECONDS = 300
"""For a loaded machine; alone it takes ten."""


# Whose fault it is ------------------------------------------------------------------------------------------


@contextmanager
def ended(*programs: str) -> Iterator[list[_Rank]]:
    """Small processes in the place of ranks; what they print are their last words."""
    ranks = []
    for number, program in enumerate(programs):
        words = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
        process = subprocess.Popen([sys.executable, "-c", program], stdout=words, stderr=words)
        ranks.append(_Rank(number, process, words))
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.wait()
            rank.words.close()


LOST = f"print('error: lost'); exit({LOST_RANKS_EXIT_CODE})"


@pytest.mark.parametrize(
    ("programs", "kind", "said"),
    [
        (
            ["import time; time.sleep(60)", "print('error: no gradient'); exit(1)"],
            TrainingError,
            "no gradient",
        ),
        (["print('error: not built'); exit(2)", "exit(0)"], UsageError, "not built"),
        ([LOST, "import os; os.kill(os.getpid(), 9)"], TrainingError, "process 1 of 2 was ended by SIGKILL"),
        (
            [LOST, "import time; time.sleep(1); 1 / 0"],
            TrainingError,
            "exit code 1: ZeroDivisionError: division",
        ),
        ([LOST, "exit(0)"], TrainingError, "lost"),
    ],
)
def test_the_rank_that_is_to_blame_is_quoted(
    programs: list[str], kind: type[SftPipelineError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.rank_processes.CULPRIT_SECONDS", 3.0)
    with ended(*programs) as ranks:
        while all(rank.process.poll() in (None, 0) for rank in ranks):
            time.sleep(0.01)
        error = _failure(ranks, None)
    assert type(error) is kind
    assert said in str(error)
    assert "\n" not in str(error)


def test_ranks_that_can_go_on_with_a_smaller_micro_step_are_told_from_failed_ones() -> None:
    program = f"print('error: out of memory with 4 bins'); exit({OUT_OF_MEMORY_EXIT_CODE})"
    with ended(program, LOST) as ranks:
        while any(rank.process.poll() is None for rank in ranks):
            time.sleep(0.01)
        error = _failure(ranks, None)
    assert isinstance(error, _RanksOutOfMemoryError)
    assert str(error) == "process 0 of 2: out of memory with 4 bins"
    assert [smaller(bins) for bins in (7, 2, 1)] == [3, 1, 1]


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({}, 1),
        ({"strategy": "zero2"}, 1),
        ({"strategy": "zero2", "num_processes": 3}, 3),
        ({"strategy": "ddp", "num_processes": 2}, 2),
    ],
)
def test_without_a_number_a_cpu_gets_one_process(
    tmp_path: Path, train: dict[str, Any], expected: int
) -> None:
    assert count_processes(tiny_run(tmp_path, train=train)) == expected


# Real ranks, really killed ----------------------------------------------------------------------------------


def run_of(folder: Path, **lora: Any) -> PipelineConfig:
    """Long enough to be met in the middle."""
    model = folder.parent / "model"
    if not model.exists():
        write_model(model)
    settings = {
        "base": "int8",
        "strategy": "zero2",
        "num_processes": 2,
        "bins_per_step": 3,
        "lora": {"dropout": 0.1, **lora},
        "checkpoint_every_steps": 7,
    }
    config = tiny_run(folder, epochs=20, train=settings, model={"path": str(model)})
    (config.run_root / "config.json").write_text(config.model_dump_json())
    return config


class Launched:
    """`python -m trainer.launch train` of several ranks."""

    def __init__(self, config: PipelineConfig) -> None:
        self.metrics = plan_job(config).folder / "metrics.jsonl"
        self.stderr = config.run_root / "stderr.txt"
        command = ["-m", "trainer.launch", "train", "--config", str(config.run_root / "config.json")]
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def ranks(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def num_steps(self) -> int:
        return self.metrics.read_bytes().count(b'"loss"') if self.metrics.exists() else 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert self.process.poll() is None, self.words()
            assert time.monotonic() < deadline, "nothing happened in time"
            time.sleep(0.001)

    def end(self) -> int:
        """Its exit code, once no process of its session is left."""
        code = self.process.wait(WAIT_SECONDS)
        deadline = time.monotonic() + 30
        while session := [p for p in psutil.process_iter() if _session_of(p) == self.process.pid]:
            assert time.monotonic() < deadline, session
            time.sleep(0.05)
        return code

    def words(self) -> str:
        return self.stderr.read_text()


def _session_of(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return -1


@contextmanager
def launched(config: PipelineConfig) -> Iterator[Launched]:
    found = Launched(config)
    try:
        yield found
    finally:
        with suppress(ProcessLookupError):
            os.killpg(found.process.pid, signal.SIGKILL)
        found.process.wait()


def finished(config: PipelineConfig) -> tuple[TrainingResult, list[tuple[int, float]]]:
    """With the digests of all output files, and each step's loss."""
    job = plan_job(config)
    result = read_result(job)
    assert result is not None
    lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    return result, [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.stress
def test_ranks_that_are_stopped_and_killed_go_on_to_the_same_bytes(tmp_path: Path) -> None:
    unbroken = run_of(tmp_path / "unbroken")
    with launched(unbroken) as training:
        assert training.end() == 0, training.words()
    broken = run_of(tmp_path / "broken")

    with launched(broken) as training:
        training.wait_for(lambda: training.num_steps() >= 5)
        # All of them at once, and again, as Slurm does it; a scheduler that asked for it sees 0.
        os.killpg(training.process.pid, signal.SIGUSR1)
        os.killpg(training.process.pid, signal.SIGTERM)
        assert training.end() == 0, training.words()
    assert "stopped by SIGUSR1 after step" in training.words()
    assert read_result(plan_job(broken)) is None
    newest = checkpoint.step_folders(plan_job(broken).folder)[0]
    stopped_at = int(newest.name.removeprefix("step-"))
    assert f"checkpoint in {newest}" in training.words()
    assert training.num_steps() == stopped_at >= 5

    with launched(broken) as training:
        training.wait_for(lambda: training.num_steps() >= stopped_at + 10)
        training.ranks()[1].kill()
        assert training.end() == 1, training.words()
    last = training.words().splitlines()[-1]
    assert last.startswith("error: process 1 of 2 was ended by SIGKILL")
    assert training.words().count("error: ") == 1

    with launched(broken) as training:
        training.wait_for(lambda: len(training.ranks()) == 2)
        time.sleep(0.5)
        training.process.kill()  # its ranks end by themselves
        assert training.end() == -signal.SIGKILL

    with launched(broken) as training:
        assert training.end() == 0, training.words()
    assert finished(broken) == finished(unbroken)
    assert not list(plan_job(broken).folder.glob(".tmp-*"))


@pytest.mark.stress
def test_what_all_ranks_refuse_is_said_once(tmp_path: Path) -> None:
    config = run_of(tmp_path / "run", modules_to_save=["q_prj"])
    with launched(config) as training:
        assert training.end() == 2
    assert training.words().splitlines() == [
        "error: train.lora.modules_to_save: 'q_prj' is the end of no module's name; nearest: q_proj, v_proj, o_proj"
    ]


LITTLE_MEMORY = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "trainer.stepping":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_plant(module):
            load(module)
            original = module.summed_loss

            def summed_loss(model, batch, **options):
                if batch.num_tokens > 64:
                    raise module.torch.OutOfMemoryError("CUDA out of memory")
                return original(model, batch, **options)

            module.summed_loss = summed_loss

        spec.loader.exec_module = load_and_plant
        return spec

sys.meta_path.insert(0, Finder())
"""
"""As Python starts: a row of more than 64 tokens, one bin, does not fit."""


@pytest.mark.stress
def test_sharded_ranks_that_run_out_of_memory_are_started_again_with_a_smaller_micro_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(LITTLE_MEMORY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    settings = {
        "strategy": "fsdp2",
        "num_processes": 2,
        "bins_per_step": 4,
        "bins_per_micro_step": 2,
        "max_steps": 3,
    }
    config = tiny_run(tmp_path, train=settings)
    (config.run_root / "config.json").write_text(config.model_dump_json())
    with launched(config) as training:
        assert training.end() == 0, training.words()
    assert "starting again with bins_per_micro_step 1" in training.words()
    assert finished(config)[0].num_steps == 3
