"""The command line: fast help, one line for an error, the right exit code, nothing loaded that isn't needed."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from flows import command_options
from flows.packages import OUR_PACKAGES, foreign_package
from flows.preflight import ALL_STAGES, chosen_stages
from schemas.errors import ConfigError
from schemas.run import STAGE_FOLDERS, STAGES
from schemas.training_config import BaseForm
from tests.integration import toy

ROOT = Path(__file__).parent.parent.parent
COMMANDS = (
    "init run step train evaluate promote rollback consolidate generate chat export harness show doctor schema "
    "deploy bench"
).split()
CONFIG = """\
run_root: run
sources:
  - {name: toy, path: toy.json}
"""


def sft_pipeline(
    *arguments: str, folder: Path = ROOT, path: str = str(ROOT)
) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own; `path` is what PYTHONPATH holds."""
    return subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    (tmp_path / "toy.json").write_text('[{"id": "1", "conversations": [{"from": "human", "value": "hi"}]}]')
    return path


def test_help_answers_in_well_under_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = sft_pipeline("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert all(f"{command} " in result.stdout for command in COMMANDS)
    # Time of the processor: on an idle machine that is what one waits, and a busy one does not fail the test.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 0 < seconds < 0.7


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    result = sft_pipeline(command, "--help")
    assert result.returncode == 0
    assert f"sft-pipeline {command}" in result.stdout


def test_version_is_printed() -> None:
    result = sft_pipeline("--version")
    assert result.returncode == 0
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "part_of_the_message"),
    [
        (["rnu"], "rnu"),
        (["run"], "CONFIG"),
        (["run", "no-such.yaml"], "no config file at no-such.yaml"),
        (["run", "{config}", "--form", "merge"], "--form"),
        (["run", "{config}", "--from", "marge"], "marge"),
        (["run", "{config}", "--from", "train", "--until", "merge"], "comes after"),
        (["run", "{config}", "--set", "train.max_step=5"], "train.max_steps"),
        (["step", "merge", "{config}", "--set", "clean.image=keep"], "clean.images"),
        (["step", "merge", "{config}", "--set", "clean.images"], "section.key=value"),
        (["step", "train", "{config}"], "train"),
        (["train", "{config}"], "model.path"),
        (["run", "{config}", "--dry-run", "--set", "filter.max_turns=many"], "many"),
        (["run", "{config}"], "model.path"),
        (["generate", "{config}", "x", "--device", "tpu"], "--device"),
        (["export", "{config}"], "--out"),
        (["export", "{config}", "--out", "x", "--form", "whole"], "--form"),
        (["harness"], "CONFIG"),
    ],
)
def test_wrong_usage_is_told_on_one_line_with_exit_code_2(
    config: Path, arguments: list[str], part_of_the_message: str
) -> None:
    result = sft_pipeline(*(argument.format(config=config) for argument in arguments))
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("sft-pipeline: error: ")
    assert result.stderr.count("\n") == 1
    assert part_of_the_message in result.stderr


def test_a_traceback_is_shown_when_asked_for(config: Path) -> None:
    result = sft_pipeline("--debug", "step", "merge", str(config), "--set", "clean.image=keep")
    assert result.returncode == 2
    assert "Traceback" in result.stderr
    assert "sft-pipeline: error: " in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("package", OUR_PACKAGES[:3])
@pytest.mark.parametrize("shape", ["package", "namespace", "module"])
def test_a_foreign_package_in_place_of_ours_is_named_and_refused(
    tmp_path: Path, package: str, shape: str
) -> None:
    intruder = tmp_path / (f"{package}.py" if shape == "module" else package)
    if shape == "module":
        intruder.write_text("raise RuntimeError('imported')")
    else:
        intruder.mkdir()
        (intruder / ("__init__.py" if shape == "package" else "other.py")).write_text(
            "raise RuntimeError('imported')"
        )
    result = sft_pipeline("run", "x.yaml", folder=tmp_path, path=f"{tmp_path}{os.pathsep}{ROOT}")
    if shape == "namespace":  # Python itself prefers a real package wherever it stands on the path
        assert "no config file at x.yaml" in result.stderr
        return
    assert result.returncode == 2
    assert result.stderr.startswith(f"sft-pipeline: error: package {package!r} is imported from {intruder}")
    assert result.stderr.count("\n") == 1


def test_choices_of_the_command_line_are_those_of_the_config() -> None:
    assert get_args(command_options.BaseForm) == get_args(BaseForm)
    assert get_args(command_options.DataStage) == STAGES
    assert get_args(command_options.Stage) == ALL_STAGES


def test_our_own_packages_lie_side_by_side() -> None:
    assert foreign_package(ROOT) is None
    assert "expected /elsewhere/schemas" in (foreign_package(Path("/elsewhere")) or "")


def test_stages_are_chosen_from_first_to_last_with_both_ends() -> None:
    assert chosen_stages(None, None) == ALL_STAGES
    assert chosen_stages("clean", "dedup") == ("clean", "filter", "dedup")
    assert chosen_stages("train", "train") == ("train",)
    with pytest.raises(ConfigError, match="did you mean 'filter'"):
        chosen_stages("filtre", None)
    with pytest.raises(ConfigError, match="expected one of merge, clean"):
        chosen_stages(None, "x")


def test_an_interrupt_ends_with_130(tmp_path: Path) -> None:
    program = (
        "import os, signal, flows.commands as c, flows.cli as cli, flows.exit_codes as e\n"
        "c.run_step = lambda *a, **k: os.kill(os.getpid(), signal.{name})\n"
        "import sys; sys.exit(e.exit_code_of(cli.run_command, ['step', 'merge', 'x.yaml']))"
    )
    for name, code in (("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)):
        result = subprocess.run(
            [sys.executable, "-c", program.format(name=name)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr


def loaded_modules(*arguments: str) -> set[str]:
    program = (
        "import sys\nfrom flows.cli import run_command\nfrom flows.exit_codes import exit_code_of\n"
        f"code = exit_code_of(run_command, {list(arguments)!r})\n"
        "print('MODULES', code, *sorted(name for name in sys.modules if '.' not in name))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(next(line for line in result.stdout.splitlines() if line.startswith("MODULES")).split())


def test_help_loads_no_library_of_the_work() -> None:
    heavy = {
        "prefect",
        "pydantic",
        "polars",
        "pyarrow",
        "torch",
        "transformers",
        "datasets",
        "numpy",
        "ruamel",
    }
    assert loaded_modules("--help") & heavy == set()


def test_a_step_starts_no_prefect_and_no_torch(config: Path) -> None:
    assert loaded_modules("step", "merge", str(config)) & {"prefect", "torch"} == set()


@pytest.fixture(scope="module")
def toy_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config with its data stages done, by the command itself."""
    folder = tmp_path_factory.mktemp("toy")
    toy.write_dumps(folder / "dumps", num_chats=60, num_records=40)
    toy.write_model(folder / "model")
    config = toy.write_config(folder)
    for stage in STAGES:
        result = sft_pipeline("step", stage, str(config))
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{folder / 'run' / STAGE_FOLDERS[stage]}\n"
        assert result.stderr.startswith(f"{stage:<10} in ")
    return config


@pytest.mark.slow
def test_a_dry_run_says_what_would_run_and_why_and_writes_nothing(toy_config: Path) -> None:
    before = toy.folder_digests(toy_config.parent)
    result = sft_pipeline("run", str(toy_config), "--dry-run", "--until", "pack")
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == list(STAGES)
    assert all("unchanged" in line for line in result.stdout.splitlines())
    changed = sft_pipeline(
        "run", str(toy_config), "--dry-run", "--until", "pack", "--set", "filter.min_chars=3"
    )
    lines = changed.stdout.splitlines()
    assert ["unchanged" in line for line in lines] == [True, True, False, False, False, False, False]
    assert "filter changes" in lines[3]
    assert toy.folder_digests(toy_config.parent) == before


@pytest.mark.slow
def test_training_loads_neither_the_data_libraries_nor_prefect(toy_config: Path) -> None:
    loaded = loaded_modules("train", str(toy_config))
    assert "torch" in loaded
    assert loaded & {"polars", "datasets", "fasttext", "prefect"} == set()
    assert (toy_config.parent / "run" / "checkpoints" / "current").is_file()


@pytest.mark.slow
def test_the_commands_of_the_model_follow_one_another(toy_config: Path) -> None:
    for command, written in (("train", "checkpoints/current"), ("evaluate", "evaluation.json")):
        result = sft_pipeline(command, str(toy_config))
        assert result.returncode == 0, result.stderr
        assert (toy_config.parent / "run" / written).is_file()
    promoted = sft_pipeline("promote", str(toy_config))
    assert promoted.returncode == 0, promoted.stderr
    assert "bits per byte" in promoted.stdout
    answered = sft_pipeline(
        "generate", str(toy_config), "Which word?", "--adapter", "current", "--max-new-tokens", "4"
    )
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.endswith("\n")
    rolled_back = sft_pipeline("rollback", str(toy_config))
    assert rolled_back.returncode == 1, "there is nothing before the first promotion"
    assert rolled_back.stderr.startswith("sft-pipeline: error: ")
