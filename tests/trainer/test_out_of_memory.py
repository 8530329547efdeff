"""Too little memory: the step is done again with fewer bins, the result is what it would have been."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import TrainingError
from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer.tiny_models import tiny_run, write_model
from trainer import stepping
from trainer.job import plan_job
from trainer.optimizers import MasterOptimizer
from trainer.out_of_memory import OutOfMemoryError, _cure, lowered
from trainer.rank_processes import MICRO_STEP_VARIABLE
from trainer.stepping import is_out_of_memory
from trainer.train import train

ROOT = Path(__file__).parent.parent.parent


def run_of(folder: Path, **settings: Any) -> PipelineConfig:
    model = folder.parent / "model"
    if not model.exists():
        write_model(model)
    common: dict[str, Any] = {"bins_per_step": 4, "lora": {"dropout": 0.1}, "max_steps": 4}
    return tiny_run(folder, train=common | settings, model={"path": str(model)})


def losses(config: PipelineConfig) -> list[float]:
    lines = (plan_job(config).folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A row of more than 64 tokens, one bin, fails near the end of its backward pass. Tokens of the rows tried."""
    tried: list[int] = []
    original = stepping.summed_loss

    def with_little_memory(model: Any, batch: Any, **options: Any) -> torch.Tensor:
        tried.append(batch.num_tokens)
        if batch.num_tokens > 64:
            first = next(p for p in model.parameters() if p.requires_grad)
            hook = first.register_hook(lambda _: fail(hook))
        return original(model, batch, **options)

    def fail(hook: Any) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(stepping, "summed_loss", with_little_memory)
    return tried


def test_a_step_that_does_not_fit_is_done_again_with_fewer_bins_to_the_same_bytes(
    tmp_path: Path, small_memory: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train(run_of(tmp_path / "small", bins_per_micro_step=1))
    small_memory.clear()
    config = run_of(tmp_path / "large", bins_per_micro_step=4)
    capsys.readouterr()
    found = train(config)
    assert max(small_memory) > 64
    assert max(small_memory[2:]) <= 64  # what was learnt holds for the steps that follow
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert [line.rpartition("; ")[2] for line in said] == [
        "going on with 2 bins at once",
        "going on with 1 bins at once",
    ]
    assert "CUDA out of memory. Tried to allocate 2.00 GiB" in said[0]
    assert "weights 0.0 GiB, optimiser 0.0, micro-step and the rest" in said[0]
    assert outputs(found) == outputs(expected)
    assert losses(config) == losses(run_of(tmp_path / "small", bins_per_micro_step=1))


def outputs(result: TrainingResult) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in result.files if entry.path.endswith(".safetensors")}


def test_other_micro_steps_are_the_same_training(tmp_path: Path) -> None:
    """Same key; losses differ by rounding alone, dropout is on."""
    one, three = (run_of(tmp_path / f"{n}", bins_per_micro_step=n) for n in (1, 3))
    assert train(one).key == train(three).key
    assert losses(three) == pytest.approx(losses(one), abs=1e-5)


def test_when_even_one_bin_does_not_fit_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 8 bytes. Error code 12 (Cannot allocate memory)"
        )

    monkeypatch.setattr(stepping, "summed_loss", fail)
    with pytest.raises(
        OutOfMemoryError, match=r"with 1 bins at once .*; set train.gradient_checkpointing: true"
    ):
        train(run_of(tmp_path / "run", bins_per_micro_step=2))


def test_an_update_that_does_not_fit_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MasterOptimizer, "step", fail)
    with pytest.raises(OutOfMemoryError, match="out of memory with 4 bins"):
        train(run_of(tmp_path / "run", bins_per_micro_step=4))
    assert calls == [1]


def test_other_errors_are_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(TrainingError("nothing is trainable"))
    assert is_out_of_memory(MemoryError())
    monkeypatch.setattr(stepping, "summed_loss", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(run_of(tmp_path / "run"))


def test_a_model_that_does_not_fit_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("trainer.building.load_base_model", fail)
    with pytest.raises(OutOfMemoryError, match=r"before the first step \(CUDA .*; set train.base: int8"):
        train(run_of(tmp_path / "run"))


@pytest.mark.parametrize(
    ("bins", "shares", "settings", "said"),
    [
        (4, (1, 1, 9), {}, "train.bins_per_micro_step"),
        (1, (1, 1, 9), {}, "train.gradient_checkpointing"),
        (1, (1, 1, 9), {"gradient_checkpointing": True}, "split.max_tokens"),
        (1, (9, 1, 1), {}, "train.base: int8"),
        (1, (9, 1, 1), {"method": "full"}, "train.strategy"),
        (1, (1, 9, 1), {"method": "full"}, "train.method: lora"),
    ],
)
def test_the_cure_is_for_what_took_most(
    tmp_path: Path, bins: int, shares: tuple[int, int, int], settings: dict[str, Any], said: str
) -> None:
    assert said in _cure(run_of(tmp_path / "run", **settings).train, bins, *shares)


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from trainer.launch import read_config
from trainer.train import train
import torch.distributed, peft, transformers.models.llama.modeling_llama

torch.set_num_threads(1)
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 400 * 2**20,) * 2)
train(read_config(Path(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_process_that_really_runs_out_of_memory_goes_on_with_fewer_bins(tmp_path: Path) -> None:
    """The kernel gives it 400 MiB more than it has; the logits of 64 bins at once take more than that."""
    model = write_model(tmp_path / "model", vocab_size=60_000)
    settings = {"bins_per_step": 64, "bins_per_micro_step": 64, "max_steps": 2}
    config = tiny_run(tmp_path, num_documents=200, train=settings, model={"path": str(model)})
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    ended = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert ended.returncode == 0, ended.stderr
    assert "out of memory with 64 bins at once ([enforce fail" in ended.stderr
    assert "going on with 32 bins at once" in ended.stderr
    assert "trained weights in" in ended.stderr


def test_ranks_that_are_started_again_take_the_micro_step_of_their_starter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(tmp_path / "run", bins_per_micro_step=4)
    assert lowered(config) == config
    monkeypatch.setenv(MICRO_STEP_VARIABLE, "2")
    assert lowered(config).train.bins_per_micro_step == 2
