"""Whole commands where things are not as usual: odd names, read-only dumps, a clock that jumps back, a second run at
the same time, an 8-bit base on two processes.
"""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipelines.storage import read_record
from schemas.run import STAGE_FOLDERS, STAGES
from tests.integration import toy
from tests.integration.faults.warm import compile_shim
from tests.integration.servers import wait_for

ROOT = Path(__file__).parent.parent.parent
DAY_SECONDS = 86_400
pytestmark = pytest.mark.stress


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Prefect's records lie beside the run roots."""
    own = {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(folder / ".prefect"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **more}


def begin(config: Path, *options: str, **more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "flows.cli", "run", config.name, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    env = environment(config.parent, **more)
    return subprocess.Popen(command, cwd=config.parent, env=env, text=True, **pipes)  # type: ignore[call-overload]


def end(process: "subprocess.Popen[str]", *, code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def results(run_root: Path) -> dict[str, str]:
    """What a run is there for: all stages, and the newest adapter without its config, which names the base's place."""
    folders = [run_root / STAGE_FOLDERS[stage] for stage in STAGES]
    if (newest := run_root / "checkpoints" / "current").exists():
        folders.append(newest.parent / newest.read_text().strip() / "adapter")
    return {
        f"{folder.name}/{path}": digest
        for folder in folders
        for path, digest in toy.folder_digests(folder).items()
        if path != "adapter_config.json"
    }


def made_at(run_root: Path) -> dict[Path, int]:
    files = [path for path in run_root.glob("0*/**/*") if path.is_file() and path.name != "timing.json"]
    return {path: path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps, a model, and a finished run that others are compared with."""
    folder = tmp_path_factory.mktemp("usual")
    toy.write_dumps(folder / "dumps")
    toy.write_model(folder / "model")
    end(begin(toy.write_config(folder, run_root="reference")))
    return folder


@pytest.fixture
def read_only_dumps(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """An odd folder with everything for a run."""
    odd = tmp_path / "Größe & 日本 “a b”"
    odd.mkdir()
    for name in ("dumps", "model"):
        shutil.copytree(folder / name, odd / name)
    dumps = odd / "dumps"
    entries = [dumps, *dumps.iterdir()]
    for path in entries:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    yield odd
    dumps.chmod(0o700)


def test_odd_names_and_read_only_dumps_make_no_difference(folder: Path, read_only_dumps: Path) -> None:
    dumps = read_only_dumps / "dumps"
    before = {path: path.stat().st_mtime_ns for path in [dumps, *dumps.iterdir()]}
    end(begin(toy.write_config(read_only_dumps, run_root="Lauf 1 ☃ 50%")))
    assert results(read_only_dumps / "Lauf 1 ☃ 50%") == results(folder / "reference")
    # root may write everywhere, so the folder is asked too: its time changes with every file made in it.
    assert {path: path.stat().st_mtime_ns for path in [dumps, *dumps.iterdir()]} == before


def test_a_clock_that_jumps_back_changes_nothing(folder: Path, tmp_path: Path) -> None:
    shim = compile_shim(tmp_path, "clock")
    behind = {"LD_PRELOAD": str(shim), "CLOCK_BACK_SECONDS": str(DAY_SECONDS)}
    shown = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time())"],
        env={**os.environ, **behind},
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "now").touch()
    assert float(shown.stdout) < (folder / "now").stat().st_mtime - DAY_SECONDS + 60, (
        "the shim is not at work"
    )
    config = toy.write_config(folder, run_root="clock")
    end(begin(config, "--until", "dedup"))
    end(begin(config, **behind))
    assert results(folder / "clock") == results(folder / "reference")
    before = made_at(folder / "clock")
    end(begin(config, "--until", "pack"))
    assert made_at(folder / "clock") == before


def test_a_second_command_is_refused_or_waits_and_another_run_root_is_free(folder: Path) -> None:
    config = toy.write_config(folder, run_root="wanted")
    first = begin(config, "--until", "pack")
    run_root = folder / "wanted"
    wait_for(
        lambda: (run_root / STAGE_FOLDERS["merge"]).exists() or first.poll() is not None, "the first run"
    )
    holder = psutil.Process(first.pid)
    holder.suspend()
    refused = end(begin(config, "--until", "pack", "--set", "engine.lock_wait_seconds=0"), code=2)
    assert f"process {first.pid}" in refused
    waiting = begin(config, "--until", "pack", "--set", "engine.lock_wait_seconds=200")
    end(begin(toy.write_config(folder, run_root="other"), "--until", "pack"))
    assert waiting.poll() is None, "it did not wait"
    holder.resume()
    end(first)
    told = end(waiting)
    assert told.count("unchanged, skipped") == len(STAGES), told
    reference = {name: digest for name, digest in results(folder / "reference").items() if name[0] == "0"}
    assert results(run_root) == results(folder / "other") == reference


def test_an_8_bit_base_on_two_processes_is_trained_as_the_flows_last_work(folder: Path) -> None:
    """deepspeed's ZeRO-2 over gloo, then the gate with the same base."""
    config = toy.write_config(folder, run_root="zero2")
    wanted = {"base": "int8", "strategy": "zero2", "num_processes": "2"}
    told = end(begin(config, *(f"--set=train.{key}={value}" for key, value in wanted.items())))
    assert "base int8" in told
    assert "zero2 over 2 processes" in told
    run_root = folder / "zero2"
    key = (run_root / "checkpoints" / "current").read_text().strip()
    assert read_record(run_root / "checkpoints" / key / "training.json")["num_steps"] == 12
    evaluation = read_record(run_root / "evaluation.json")
    assert (evaluation["candidate"]["training_key"], evaluation["base_form"]) == (key, "int8")
    assert (run_root / "promoted.json").exists()
