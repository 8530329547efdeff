"""The flow `sft-pipeline` on a real, embedded Prefect: whole, cut short, refused; what is left in Prefect's records."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.preflight import ALL_STAGES
from flows.progress import reasons_text, stage_line
from pipelines.parts import StageResult
from pipelines.storage import read_manifest
from schemas.errors import BusyError, ConfigError, InputError, LimitError, RefusedError, UsageError
from schemas.run import STAGE_FOLDERS, Manifest, PartEntry
from tests.integration import toy

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy.write_dumps(folder / "dumps", num_chats=60, num_records=40)
    toy.write_model(folder / "model")
    return folder


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A server and a database for this test session alone."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def artifacts() -> dict[str, list[dict[str, Any]]]:
    """The newest table of each key, as the server has it."""
    import json

    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return {found.key: json.loads(str(found.data)) for found in client.read_artifacts() if found.key}


@pytest.mark.slow
def test_each_stage_leaves_a_table_whose_counts_are_those_of_its_manifest(
    prefect_server: None, toy_folder: Path
) -> None:
    from flows.sft_pipeline import sft_pipeline

    config = toy.write_config(toy_folder, run_root="tables")
    sft_pipeline(str(config), {"filter.min_chars": 3}, until="dedup")
    tables = artifacts()
    for stage in ("merge", "clean", "filter", "dedup"):
        manifest = read_manifest(toy_folder / "tables" / STAGE_FOLDERS[stage])
        assert manifest is not None
        counts = {row["what"]: row["rows"] for row in tables[stage]}
        assert counts["rows in"] == manifest.num_rows_in > 0
        assert counts["rows out"] == manifest.num_rows_out > 0
        assert {
            f"dropped: {reason}": number for reason, number in manifest.drops.items()
        }.items() <= counts.items()
    assert not (toy_folder / "tables" / STAGE_FOLDERS["holdout"]).exists()


@pytest.mark.slow
def test_the_flow_raises_our_own_errors(prefect_server: None, toy_folder: Path) -> None:
    from flows.sft_pipeline import sft_pipeline
    from flows.steps import step_dedup

    config = toy.write_config(toy_folder, run_root="refused")
    with pytest.raises(ConfigError, match=r"clean\.images"):
        sft_pipeline(str(config), ["clean.image=keep"])
    with pytest.raises(LimitError, match="no row"):
        sft_pipeline(str(config), ["filter.max_chars=1"], until="filter")
    with pytest.raises(InputError, match="run the stage 'filter' first"):
        step_dedup(str(toy.write_config(toy_folder, run_root="nothing-yet")))


def clean_environment(home: Path) -> dict[str, str]:
    """Of a user who has set nothing about Prefect."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | {"PYTHONPATH": str(ROOT), "HOME": str(home)}


def sft_pipeline_command(*arguments: str, home: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *arguments],
        cwd=ROOT,
        env=clean_environment(home),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.slow
def test_the_command_runs_the_whole_story_and_tells_it_in_counts(toy_folder: Path, tmp_path: Path) -> None:
    config = toy.write_config(toy_folder, run_root="whole")
    result = sft_pipeline_command("run", str(config), home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{toy_folder / 'whole'}\n"
    told = [line.split(" ")[0] for line in result.stderr.splitlines()]
    assert [word for word in told if word in ALL_STAGES] == list(STAGE_FOLDERS)
    assert "bits per byte" in result.stderr
    for noise in ("prefect.", "Traceback", "Flow run", "INFO", "WARNING", "ERROR"):
        assert noise not in result.stderr
    for name in ("config.json", "evaluation.json", "checkpoints/current"):
        assert (toy_folder / "whole" / name).exists()
    assert not (toy_folder / "whole" / "train.pid").exists()
    check_records_of_prefect(toy_folder / ".prefect")

    again = sft_pipeline_command("run", str(config), "--from", "clean", "--until", "pack", home=tmp_path)
    assert again.returncode == 0
    assert [line.split()[1] for line in again.stderr.splitlines()[1:]] == ["unchanged,"] * 6


def check_records_of_prefect(home: Path) -> None:
    """Counts, never chat text; for the user's eyes alone; every task completed, none cached or retried."""
    assert home.stat().st_mode & 0o077 == 0
    content = b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
    for said in (b"Is List<String> right?", b"Repeat word 3", b"hljs language-python"):
        assert said not in content
    with sqlite3.connect(home / "prefect.db") as database:
        tasks = dict(database.execute("select name, state_name from task_run").fetchall())
        keys = {key for (key,) in database.execute("select key from artifact")}
    assert {name.rpartition("-")[0] for name in tasks} == set(ALL_STAGES)
    assert set(tasks.values()) == {"Completed"}
    assert keys == set(ALL_STAGES)


@pytest.mark.slow
def test_a_failure_is_one_line_and_a_refusal_needs_no_prefect(toy_folder: Path, tmp_path: Path) -> None:
    config = str(toy.write_config(toy_folder, run_root="fails"))
    failed = sft_pipeline_command(
        "run", config, "--until", "filter", "--set", "filter.max_chars=1", home=tmp_path
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.splitlines()[-1].startswith("sft-pipeline: error: filter: no row of ")
    assert "Traceback" not in failed.stderr
    refused = sft_pipeline_command("run", config, "--set", "split.max_tokens=4096", home=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("sft-pipeline: error: ")
    assert refused.stderr.count("\n") == 1
    assert "2048 positions" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGKILL", -9), ("SIGINT", 130), ("SIGTERM", 143)])
def test_a_run_that_is_ended_in_its_training_leaves_no_process_and_goes_on_when_run_again(
    toy_folder: Path, tmp_path: Path, number: str, code: int
) -> None:
    config = str(toy.write_config(toy_folder, run_root=f"ended-{number}"))
    run_root = toy_folder / f"ended-{number}"
    long = ["--set", "train.epochs=6", "--set", "train.max_steps=null", "--set", "engine.workers=2"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from flows.cli import main; main()", "run", config, *long],
            env=clean_environment(tmp_path),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    wait_for(
        lambda: process.poll() is not None or list(run_root.glob("checkpoints/*/latest")), "a checkpoint"
    )
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("trainer.launch" in " ".join(member.cmdline()) for member in family), (
        tmp_path / "log"
    ).read_text()
    assert any("flows.local_server" in " ".join(member.cmdline()) for member in family)
    # As a terminal does it for Ctrl-C: the whole group of the command, workers too.
    os.killpg(process.pid, getattr(signal, number))
    assert process.wait(60) == code
    wait_for(lambda: not any(map(still_runs, family)), "the end of all processes")
    told = (tmp_path / "log").read_text()
    assert "Traceback" not in told
    assert ("sft-pipeline: error: interrupted" in told) == (number == "SIGINT")
    again = sft_pipeline_command("run", config, *long, "--from", "train", "--until", "train", home=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "step 1/" not in again.stderr, "it goes on, it does not begin anew"


def still_runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within 200 s"
        time.sleep(0.1)


def test_training_is_refused_without_a_model_before_anything_is_written(toy_folder: Path) -> None:
    from flows.preflight import open_run

    config = toy.write_config(toy_folder, run_root="unwritten")
    for overrides, error in (
        ({"model": None}, ConfigError),
        ({"train.bins_per_micro_step": 64}, RefusedError),
        ({"model.path": "no-such-folder"}, InputError),
    ):
        with pytest.raises(error), open_run(config, overrides, first="train", last="train"):
            pass
    assert not (toy_folder / "unwritten" / "config.json").exists()


def test_a_second_run_on_the_same_root_is_refused_by_name_of_the_first(toy_folder: Path) -> None:
    from flows.preflight import open_run

    config = toy.write_config(toy_folder, run_root="held")
    with open_run(config, {}, first="merge", last="merge") as run:
        assert run.stages == ("merge",)
        with (
            pytest.raises(BusyError, match=str(os.getpid())),
            open_run(config, {"engine.lock_wait_seconds": 0}, first="merge", last="merge"),
        ):
            pass
    with open_run(config, {}, last="merge"):
        pass
    assert issubclass(BusyError, UsageError)


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "stage": "merge",
        "stage_version": 1,
        "key": "k",
        "inputs": {},
        "config": {},
        "versions": {},
        "parts": (),
        "num_rows_in": 412,
        "num_rows_out": 398,
        "num_pieces_cut": 0,
        "drops": {"unknown_role": 5, "invalid_json": 9},
    }
    return Manifest(**values | changes)


def test_the_line_of_a_stage_says_what_came_in_and_why_rows_left() -> None:
    result = StageResult(manifest(), 3, 0, 1.23)
    assert (
        stage_line(result)
        == "merge      in 412  kept 398  dropped 14  (invalid_json 9, unknown_role 5)  1.2 s"
    )
    assert stage_line(StageResult(manifest(), 0, 3, 0.1)) == "merge      unchanged, skipped"
    part = PartEntry(key="k", label="l", kept=(), dropped=None, num_rows_in=1, num_rows_out=1, drops={})
    cut = manifest(stage="split", num_pieces_cut=7, num_rows_out=419, drops={}, parts=(part, part, part))
    assert stage_line(StageResult(cut, 1, 2, 0.5, 1400, 2)) == (
        "split      in 412  kept 419  cut 7 more  dropped 0  2 of 3 parts unchanged  1,400 rows worked on  0.5 s"
    )


def test_many_reasons_are_told_by_the_commonest_and_their_number() -> None:
    drops = {f"reason_{number}": number for number in range(1, 8)}
    assert reasons_text(drops) == "reason_7 7, reason_6 6, reason_5 5, reason_4 4, 3 more reasons"
