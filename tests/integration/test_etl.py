"""Stages 1-7 on real files: nothing lost, same bytes whatever the workers, the order and the kills."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.run import STAGE_FOLDERS, STAGES
from tests.conservation import check_run_root
from tests.integration import toy

ROOT = Path(__file__).parent.parent.parent

RUN = """
import sys
from pathlib import Path
from pipelines.stage import run_stage
from schemas.config_file import load_config
from schemas.run import STAGES

if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    for stage in STAGES:
        result = run_stage(stage, config)
        print(stage, result.num_parts_run, result.num_parts_reused)
"""

# Killed at the n-th rename of a file into the stage's folder, while its temporary file is complete and open.
KILLED_RUN = """
import os, signal
from pipelines import storage

rename, left = os.replace, [int(os.environ["KILL_AT"])]

def rename_or_die(source, target):
    if os.environ["KILL_IN"] in str(target):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)

storage.os.replace = rename_or_die
"""


def run(
    config: Path, *overrides: str, program: str = RUN, **environment: str
) -> subprocess.CompletedProcess[str]:
    script = config.parent / "run_stages.py"
    script.write_text(program)
    command = [sys.executable, str(script), str(config), *overrides]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=config.parent)


def run_well(config: Path, *overrides: str) -> list[tuple[str, int, int]]:
    result = run(config, *overrides)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    return [(stage, int(parts_run), int(reused)) for stage, parts_run, reused in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dumps, tokenizer and a finished run that others are compared with."""
    folder = tmp_path_factory.mktemp("etl")
    toy.write_dumps(folder / "dumps")
    toy.write_tokenizer(folder / "model")
    run_well(toy.write_config(folder))
    return folder


def test_rows_in_and_pieces_cut_are_rows_out_and_drops(folder: Path) -> None:
    counts = check_run_root(folder / "run")
    assert counts["01_merged"]["dropped"] == 2
    assert counts["06_shards"]["pieces_cut"] > 0
    assert all(counts[name]["kept"] > 100 for name in counts)


def test_a_second_run_does_nothing_and_changes_nothing(folder: Path) -> None:
    before = toy.folder_digests(folder / "run")
    assert all(parts_run == 0 for _, parts_run, _ in run_well(folder / "run.yaml"))
    assert toy.folder_digests(folder / "run") == before


def stage_digests(run_root: Path, first: str = "clean") -> dict[str, str]:
    names = list(STAGES)[list(STAGES).index(first) :]
    return {
        f"{name}/{path}": digest
        for name in names
        for path, digest in toy.folder_digests(run_root / STAGE_FOLDERS[name]).items()
    }


def test_two_workers_write_the_same_bytes(folder: Path) -> None:
    run_well(toy.write_config(folder, run_root="two"), "engine.workers=2")
    assert stage_digests(folder / "two", "merge") == stage_digests(folder / "run", "merge")


def test_sources_in_another_order_give_the_same_bytes(folder: Path) -> None:
    config = toy.write_config(folder, run_root="turned")
    lines = config.read_text().splitlines()
    first = lines.index("sources:") + 1
    lines[first], lines[first + 1] = lines[first + 1], lines[first]
    config.write_text("\n".join(lines))
    run_well(config)
    assert stage_digests(folder / "turned", "dedup") == stage_digests(folder / "run", "dedup")


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_a_stage_and_run_again_it_ends_with_the_same_bytes(
    folder: Path, stage: str, kill_at: int
) -> None:
    name = f"killed-{stage}-{kill_at}"
    config = toy.write_config(folder, run_root=name)
    killed = run(config, program=KILLED_RUN + RUN, KILL_IN=f"/{STAGE_FOLDERS[stage]}/", KILL_AT=str(kill_at))
    assert killed.returncode == -9, killed.stderr
    assert not (folder / name / STAGE_FOLDERS[stage] / "manifest.json").exists()
    run_well(config)
    assert stage_digests(folder / name, "merge") == stage_digests(folder / "run", "merge")
    shutil.rmtree(folder / name)


def test_one_added_file_makes_only_its_own_parts_run(folder: Path) -> None:
    config = toy.write_config(folder, run_root="grown")
    run_well(config)
    text = config.read_text().replace("alpaca.jsonl}", "alpaca.jsonl}\n  - {name: more, path: more.jsonl}")
    config.write_text(text)
    lines = [f'{{"instruction": "Say {n}", "output": "number {n} it is"}}' for n in range(5)]
    (folder / "more.jsonl").write_text("\n".join(lines))
    parts = {stage: (parts_run, reused) for stage, parts_run, reused in run_well(config)}
    assert parts["merge"][0] == parts["clean"][0] == parts["filter"][0] == 1
    assert parts["clean"][1] > 1
    check_run_root(folder / "grown")


def test_a_file_whose_rows_all_stand_elsewhere_leaves_an_empty_part(folder: Path) -> None:
    config = toy.write_config(folder, run_root="copied")
    first = (folder / "dumps" / "alpaca.jsonl").read_text().splitlines()[0]
    (folder / "copy.jsonl").write_text(first + "\n")
    config.write_text(
        config.read_text().replace("alpaca.jsonl}", "alpaca.jsonl}\n  - {name: z, path: copy.jsonl}")
    )
    run_well(config)
    check_run_root(folder / "copied")
