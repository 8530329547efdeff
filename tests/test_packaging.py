"""The wheel holds the four rooms and nothing else, and the core install runs the data stages without torch."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"schemas", "pipelines", "trainer", "flows"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    for name in (*ROOMS, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run([*command, "--wheel-dir", str(source / "dist")], cwd=source, check=True)
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_four_rooms_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for folder, _, found in os.walk(ROOT / room, followlinks=True)  # flows/recipes is configs/recipes
        for path in (Path(folder) / name for name in found)
        if path.suffix in (".py", ".j2", ".jinja", ".yaml") or path.name == "py.typed"
    }
    assert names == expected


@pytest.mark.slow
@pytest.mark.smollm
def test_the_core_install_runs_stages_1_to_7_and_has_no_torch(
    wheel: Path, tmp_path: Path, smollm: Path
) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    uv = Path(sys.executable).parent / "uv"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", python, "--constraint", ROOT / "constraints.txt"]
    environment = os.environ | {"UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", "")}
    subprocess.run([*install, wheel], check=True, env=environment)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run_root: run\nsources: [{{name: alpaca, path: {ROOT / 'examples' / 'alpaca.json'}}}]\n"
        f"model: {{path: {smollm}}}\n"
    )
    command = [tmp_path / "venv" / "bin" / "sft-pipeline", "run", config, "--until", "pack"]
    subprocess.run(
        command, check=True, cwd=tmp_path, env=os.environ | {"PREFECT_HOME": str(tmp_path / "prefect")}
    )
    absent = subprocess.run([python, "-c", "import torch"], capture_output=True, text=True)
    assert "No module named 'torch'" in absent.stderr
    assert json.loads((tmp_path / "run" / "07_plan" / "manifest.json").read_text())["num_rows_out"] > 100
