"""Kill it anywhere, run it again: the same adapter, bit for bit, and each step once in the metrics."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.training import parent_pipe
from pipelines.run_lock import PARENT_FD_VARIABLE
from schemas.pipeline_config import PipelineConfig
from schemas.training_result import TrainingResult
from tests.trainer.tiny_models import tiny_run, write_model
from trainer import checkpoint, out_of_memory
from trainer import train as train_module
from trainer.job import plan_job
from trainer.metrics import Metrics, keep_steps
from trainer.train import train

ROOT = Path(__file__).parent.parent.parent
SETTINGS: dict[str, Any] = {"lora": {"dropout": 0.1}, "checkpoint_every_steps": 3, "evaluate_every_steps": 5}


def run_of(folder: Path, *, epochs: int = 2, dtype: str = "float32", **train_settings: Any) -> PipelineConfig:
    """Run roots in one folder share the model beside them."""
    model_folder = folder.parent / "model"
    if not model_folder.exists():
        write_model(model_folder)
    return tiny_run(
        folder,
        epochs=epochs,
        train=SETTINGS | train_settings,
        model={"path": str(model_folder), "dtype": dtype},
    )


def losses(config: PipelineConfig) -> list[tuple[int, str, float]]:
    """(step, kind, loss) of each line of metrics.jsonl."""
    lines = [
        json.loads(line) for line in (plan_job(config).folder / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        (line["step"], kind, line[kind])
        for line in lines
        for kind in ("loss", "validation_loss")
        if kind in line
    ]


def assert_same_training(config: PipelineConfig, expected: tuple[TrainingResult, Any]) -> None:
    assert train(config) == expected[0]  # names every output file with its sha256
    assert losses(config) == expected[1]
    assert not list(plan_job(config).folder.glob(".tmp-*"))


def unbroken(folder: Path, **settings: Any) -> tuple[TrainingResult, Any]:
    config = run_of(folder, **settings)
    return train(config), losses(config)


class Crash(BaseException):
    """The process ends here, as far as training can see."""


@pytest.mark.parametrize(
    ("crash_at", "dtype"), [(1, "float32"), (3, "float32"), (4, "bfloat16"), (11, "float32")]
)
def test_a_run_that_ended_anywhere_goes_on_to_the_same_bytes(
    tmp_path: Path, crash_at: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = unbroken(tmp_path / "unbroken", dtype=dtype)
    config = run_of(tmp_path / "broken", dtype=dtype)
    with monkeypatch.context() as patch:
        original = Metrics.log_step

        def crash(self: Metrics, record: dict[str, Any]) -> None:
            original(self, record)
            if record["step"] == crash_at:
                raise Crash

        patch.setattr(Metrics, "log_step", crash)
        with pytest.raises(Crash):
            train(config)
    assert_same_training(config, expected)


@pytest.mark.parametrize("step", ["write_output", "write_result", "mark_current"])
def test_a_run_that_ended_while_finishing_finishes(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = unbroken(tmp_path / "unbroken")
    config = run_of(tmp_path / "broken")

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(train_module, step, crash)
        with pytest.raises(Crash):
            train(config)
    assert_same_training(config, expected)


def test_with_a_damaged_newest_checkpoint_the_one_before_is_taken_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = unbroken(tmp_path / "unbroken")
    config = run_of(tmp_path / "broken", keep_checkpoints=3)

    def crash(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "write_output", crash)
        with pytest.raises(Crash):
            train(config)
    newest, second, third = checkpoint.step_folders(plan_job(config).folder)
    (newest / "index.json").write_bytes(b"")
    path = second / "pieces-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(bytes(data))
    capsys.readouterr()
    assert_same_training(config, expected)
    said = capsys.readouterr().err
    assert f"checkpoint {newest.name} can't be used" in said
    assert f"checkpoint {second.name} can't be used" in said
    assert f"going on after step {int(third.name.removeprefix('step-'))}" in said


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on(
    tmp_path: Path,
    number: signal.Signals,
    exit_code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = unbroken(tmp_path / "unbroken")
    config = run_of(tmp_path / "broken")
    handler = signal.getsignal(number)
    original = out_of_memory.run_step

    def with_signal(job: Any, model: Any, optimizer: Any, step: Any, **more: Any) -> Any:
        if step.number == 4:
            os.kill(os.getpid(), number)
        return original(job, model, optimizer, step, **more)

    with monkeypatch.context() as patch:
        patch.setattr(out_of_memory, "run_step", with_signal)
        with pytest.raises(SystemExit) as exit:
            train(config)
    assert exit.value.code == exit_code
    assert f"stopped by {number.name} after step 5 of" in capsys.readouterr().err
    assert (plan_job(config).folder / "latest").read_text() == "step-00000005\n"
    assert signal.getsignal(number) == handler
    assert_same_training(config, expected)


def test_metrics_of_steps_after_the_checkpoint_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    keep_steps(path, 3)
    assert path.read_text() == "".join(lines[:4])
    keep_steps(path, 3)
    assert path.read_text() == "".join(lines[:4])
    keep_steps(path, 0)
    assert path.read_text() == ""


# Real processes, really killed --------------------------------------------------------------------------------


def start(config: PipelineConfig, *, parent: int | None = None) -> "subprocess.Popen[bytes]":
    """`python -m trainer.launch train` by hand, or with the pipe of a flow."""
    path = config.run_root / "config.json"
    path.write_text(config.model_dump_json())
    # Sums depend on the number of threads, so the child has as many as we.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    if parent is not None:
        environment[PARENT_FD_VARIABLE] = str(parent)
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.launch", "train", "--config", str(path)],
        cwd=ROOT,
        env=environment,
        pass_fds=[] if parent is None else [parent],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for(process: "subprocess.Popen[bytes]", condition: Any, *, timeout_seconds: float = 120) -> bool:
    """True when it holds; False when the process ended before."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    raise AssertionError("nothing happened in time")


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_process_killed_in_mid_training_is_gone_on_with_to_the_same_bytes(tmp_path: Path) -> None:
    expected = unbroken(tmp_path / "unbroken", epochs=4)
    config = run_of(tmp_path / "broken", epochs=4)
    metrics_path = plan_job(config).folder / "metrics.jsonl"
    with start(config) as process:
        was_seen = wait_for(process, lambda: num_lines(metrics_path) >= 8)
        process.kill()
        assert was_seen, process.communicate()[1].decode()
    assert process.returncode == -signal.SIGKILL
    assert_same_training(config, expected)


@pytest.mark.slow
# bfloat16 in the long form only: what differs, the masters in a checkpoint, is tested by the crashes above.
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.hard)])
def test_a_process_killed_again_and_again_also_while_it_writes_checkpoints(
    tmp_path: Path, dtype: str
) -> None:
    """Half of the kills come at a random moment, half when a checkpoint is seen being written."""
    expected = unbroken(tmp_path / "unbroken", epochs=10, dtype=dtype, checkpoint_every_steps=1)
    config = run_of(tmp_path / "broken", epochs=10, dtype=dtype, checkpoint_every_steps=1)
    folder = plan_job(config).folder
    draws = random.Random(0)
    kills = 0
    while kills < 6:
        num_before = num_lines(folder / "metrics.jsonl")
        with start(config) as process:
            if wait_for(process, lambda before=num_before: num_lines(folder / "metrics.jsonl") > before + 3):
                if kills % 2:
                    wait_for(process, lambda: any(folder.glob(".tmp-*-step-*")))
                else:
                    time.sleep(draws.uniform(0, 0.1))
                process.kill()
                kills += 1
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert_same_training(config, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "has_parent", "exit_code"),
    [(signal.SIGTERM, True, 143), (signal.SIGUSR1, False, 0)],
    ids=["under a flow", "under a scheduler"],
)
def test_the_module_ends_after_a_signal_with_a_checkpoint_and_a_code_for_who_started_it(
    tmp_path: Path, number: signal.Signals, has_parent: bool, exit_code: int
) -> None:
    config = run_of(tmp_path / "run", epochs=20)
    metrics_path = plan_job(config).folder / "metrics.jsonl"
    with parent_pipe() as pipe, start(config, parent=pipe if has_parent else None) as process:
        wait_for(process, lambda: num_lines(metrics_path) >= 3)
        for _ in range(3):  # a group's signal comes again from who started us
            process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == exit_code, errors.decode()
    assert b"run the same command to go on" in errors
    assert output == b""
    newest = checkpoint.step_folders(plan_job(config).folder)[0]
    state = json.loads((newest / "state.json").read_text())
    assert state["progress"]["num_steps"] == int(newest.name.removeprefix("step-"))
