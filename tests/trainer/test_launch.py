"""The trainer's door: light, alone on its run root, its errors one line and an exit code."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import run_lock
from schemas.errors import BusyError, ConfigError, ForeignPackageError
from schemas.pipeline_config import PipelineConfig
from tests.trainer.tiny_models import tiny_run
from trainer.launch import COMMANDS, check_packages, main, read_config

ROOT = Path(__file__).parent.parent.parent
KEPT_OUT = ("polars", "datasets", "fasttext", "prefect", "pandas", "deepspeed")


def launched(*arguments: str, folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "trainer.launch", *arguments], cwd=folder, capture_output=True, text=True
    )


def written(config: PipelineConfig) -> str:
    path = config.run_root / "config.json"
    path.write_text(config.model_dump_json())
    return str(path)


def test_help_names_every_command_and_comes_at_once() -> None:
    started_at = time.monotonic()
    done = launched("--help")
    assert done.returncode == 0
    assert time.monotonic() - started_at < 2  # torch alone takes longer
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.slow
def test_training_loads_neither_prefect_nor_polars_nor_datasets(tmp_path: Path) -> None:
    config = tiny_run(tmp_path, train={"max_steps": 1})
    program = (
        "import sys; from trainer.launch import main; main(sys.argv[1:]);"
        f"print([name for name in {KEPT_OUT!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "train", "--config", written(config)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    output = Path(done.stdout.strip())
    assert output == config.run_root / "checkpoints" / output.parent.name / "adapter"
    assert (output.parent / "training.json").is_file()
    assert "Loading weights" not in done.stderr


def test_errors_of_ours_are_one_line_and_their_exit_code(tmp_path: Path) -> None:
    done = launched("train", "--config", str(tmp_path / "absent.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no config at ")
    assert done.stderr.count("\n") == 1


def test_called_as_a_function_it_raises(tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    path = Path(written(config))
    assert read_config(path) == config
    path.write_text(path.read_text().replace('"epochs":1', '"epochs":-1'))
    with pytest.raises(ConfigError, match=r"first 'train\.epochs'"):
        main(["train", "--config", str(path)])
    path.write_text("{")
    with pytest.raises(ConfigError, match="1 wrong values"):
        main(["train", "--config", str(path)])


def test_a_held_run_root_is_not_trained_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(run_lock.LOCK_FD_VARIABLE, raising=False)
    config = tiny_run(tmp_path, engine={"lock_wait_seconds": 0})
    with (
        run_lock.hold_run_root(config.run_root, wait_seconds=0),
        pytest.raises(BusyError, match=str(os.getpid())),
    ):
        main(["train", "--config", written(config)])


def test_ours_are_found_side_by_side() -> None:
    check_packages()


def test_a_foreign_package_in_front_of_ours_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flows", raising=False)
    with pytest.raises(ForeignPackageError, match=f"'flows' is found in {tmp_path / 'flows'}"):
        check_packages()


def test_a_foreign_schemas_is_refused_although_our_errors_live_there(tmp_path: Path) -> None:
    for name in ("pipelines", "trainer", "flows"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "elsewhere" / "schemas").mkdir(parents=True)
    (tmp_path / "elsewhere" / "schemas" / "__init__.py").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "elsewhere")}
    done = subprocess.run(
        [sys.executable, "-m", "trainer.launch", "train", "--config", "config.json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "package 'schemas' is found in" in done.stderr
