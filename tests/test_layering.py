"""Imports point left only: schemas <- pipelines <- trainer <- flows."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("schemas", "pipelines", "trainer", "flows")
FORBIDDEN = {
    "schemas": {"torch", "prefect", "polars", "pyarrow.parquet", "transformers", "datasets"},
    "pipelines": {"torch", "prefect", "peft", "deepspeed"},
    "trainer": {"prefect", "polars", "datasets", "fasttext"},
    "flows": {"torch", "peft", "polars", "datasets"},
}
PROGRAMS_OF_OTHERS = ROOT / "trainer" / "bench" / "peers"
"""They run by their path in interpreters that may have none of ours: they import what the peer needs."""
BANNED_FILES = {"utils", "core", "common", "base", "registry", "callbacks"}


def python_files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_to_its_left(room: str) -> None:
    to_the_right = set(ROOMS[ROOMS.index(room) + 1 :])
    for path in python_files(room):
        wrong = {module for module in imported_modules(path) if module.split(".")[0] in to_the_right}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_keeps_out_what_it_must_run_without(room: str) -> None:
    for path in python_files(room):
        if path.parent == PROGRAMS_OF_OTHERS:
            continue
        wrong = {
            module
            for module in imported_modules(path)
            for package in FORBIDDEN[room]
            if module == package or module.startswith(package + ".")
        }
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_programs_of_other_trainers_import_nothing_of_ours_and_are_not_imported() -> None:
    programs = {path.stem for path in PROGRAMS_OF_OTHERS.glob("run_*.py")}
    assert len(programs) >= 3
    for path in PROGRAMS_OF_OTHERS.glob("*.py"):
        assert {module.split(".")[0] for module in imported_modules(path)}.isdisjoint(ROOMS), path
    for room in ROOMS:
        for path in python_files(room):
            if path.parent != PROGRAMS_OF_OTHERS:
                assert {module.split(".")[-1] for module in imported_modules(path)}.isdisjoint(programs), path


@pytest.mark.parametrize("room", ROOMS)
def test_files_have_names_that_say_what_is_inside(room: str) -> None:
    assert {path.stem for path in python_files(room)}.isdisjoint(BANNED_FILES)


def test_nothing_reads_or_writes_pickle() -> None:
    for room in ROOMS:
        for path in python_files(room):
            assert imported_modules(path).isdisjoint({"pickle", "cloudpickle", "dill", "marshal"}), path
            text = path.read_text()
            if (
                path.name == "meta_weights.py"
            ):  # Meta gave its weights away as pickles: tensors alone come out of them
                assert text.count("torch.load(") == text.count("weights_only=True") == 1
                text = text.replace("torch.load(", "")
            for call in ("torch.load(", "torch.save(", "trust_remote_code=True"):
                assert call not in text, f"{path}: {call}"


def test_the_data_stages_run_without_importing_torch_or_prefect() -> None:
    program = (
        "import sys, pipelines.stage, pipelines.merge, pipelines.clean, pipelines.filter, pipelines.dedup, "
        "pipelines.holdout, pipelines.split, pipelines.pack, pipelines.shards; "
        "print(sorted({'torch', 'prefect', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
