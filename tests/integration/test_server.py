"""A real Prefect server, worker and deployments: the commands of the README, typed literally, in a project's folder."""

import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from flows.plugin import DEPLOYMENTS
from tests.integration import toy
from tests.integration.postgres import database, needs_postgres
from tests.integration.servers import BIN, Server, needs_plugin, serving, wait_for, write_project

pytestmark = [pytest.mark.stress, needs_plugin]

# What each deployment makes in a run root: taken away before it runs alone.
MADE_BY = {
    "step-merge": ["01_merged"],
    "step-clean": ["02_cleaned"],
    "step-filter": ["03_filtered"],
    "step-dedup": ["04_deduplicated"],
    "step-holdout": ["05_held_out", "holdout.parquet"],  # a ledger there would be given to the step
    "step-split": ["06_shards"],
    "step-pack": ["07_plan"],
    "train": ["checkpoints"],
    "evaluate-promote": ["evaluation.json", "promoted.json"],
}


@pytest.fixture(
    scope="module",
    params=["sqlite", pytest.param("postgresql", marks=[pytest.mark.hard, needs_postgres])],
)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Server and worker, with everything deployed from a project's folder."""
    folder = write_project(tmp_path_factory.mktemp("project"))
    with database(request.param) as postgres:
        url = None if postgres is None else postgres.url
        with serving(tmp_path_factory.mktemp("prefect"), database_url=url, folder=folder) as server:
            yield server


@pytest.fixture(scope="module")
def whole_run(server: Server) -> Path:
    """The run root of the deployment run that everybody types first."""
    result = server.type("prefect deployment run sft-pipeline --watch")
    assert result.returncode == 0, result.stdout + result.stderr + (server.home / "worker.log").read_text()
    assert "finished successfully" in " ".join(result.stdout.split())
    return server.folder / "configs" / "demo"


def test_the_short_name_typed_literally_runs_the_whole_pipeline_to_its_end(
    server: Server, whole_run: Path
) -> None:
    assert json.loads((whole_run / "promoted.json").read_text())
    log = (server.home / "worker.log").read_text()
    assert "Finished in state Completed()" in log
    assert "<|im_start|>" not in log, "chat text in a log"
    assert "Is List<String> right?" not in log


def test_parameters_are_given_by_the_full_name_and_overrides_are_merged_key_by_key(
    server: Server, whole_run: Path
) -> None:
    result = server.type(
        "prefect deployment run sft-pipeline/sft-pipeline --watch --param config_path=configs/demo.yaml "
        """--param overrides='{"train.max_steps": 5}'"""
    )
    assert result.returncode == 0, result.stdout + result.stderr
    resolved = json.loads((whole_run / "config.json").read_text())
    assert resolved["train"]["max_steps"] == 5
    assert resolved["train"]["bins_per_step"] == 4, "the other keys of the section are those of the file"
    steps = [
        json.loads(path.read_text())["num_steps"] for path in whole_run.glob("checkpoints/*/training.json")
    ]
    assert sorted(steps) == [5, 12]


def test_a_key_that_does_not_exist_fails_with_the_nearest_one(server: Server) -> None:
    result = server.type(
        "prefect deployment run sft-pipeline --watch --param config_path=configs/demo.yaml "
        """--param overrides='{"train.steps": 5}'"""
    )
    assert result.returncode == 1
    failed = server.flow_runs(flow_runs={"state": {"type": {"any_": ["FAILED"]}}})
    assert "unknown key 'train.steps', did you mean 'train.max_steps'?" in failed[0]["state"]["message"]


def test_every_step_is_deployed_and_makes_its_folder_again_alone(server: Server, whole_run: Path) -> None:
    assert set(MADE_BY) | {"sft-pipeline"} == DEPLOYMENTS
    # All at once, each in a copy of the run root: one after the other would be mostly imports.
    runs = {
        name: (copy := copy_without(whole_run, name, made), start_step(server, name, copy))
        for name, made in MADE_BY.items()
    }
    for name, (copy, flow_run_id) in runs.items():
        ended = server.finished(flow_run_id)
        assert ended["state"]["type"] == "COMPLETED", (name, ended["state"])
        for made in same_training(copy, MADE_BY[name]):
            assert contents(copy / made) == contents(whole_run / made), name


def copy_without(whole_run: Path, name: str, made: list[str]) -> Path:
    copy = whole_run.parent / f"alone-{name}"
    shutil.copytree(whole_run, copy)
    for path in (copy / entry for entry in made):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return copy


def start_step(server: Server, name: str, run_root: Path) -> str:
    config = toy.write_config(run_root.parent, run_root=run_root.name)
    return server.create_run(name, config_path=f"configs/{config.name}")


def same_training(copy: Path, made: list[str]) -> list[str]:
    """Paths to compare: of all trainings, which the run root keeps side by side, the adapter of the newest."""
    newest = copy / "checkpoints" / "current"
    return [f"checkpoints/{newest.read_text().strip()}/adapter"] if made == ["checkpoints"] else made


def contents(made: Path) -> Any:
    """What may not hang on when and where it was made."""
    if made.suffix == ".json":
        return sorted(json.loads(made.read_text()))
    if made.is_file():
        return made.read_bytes()
    return toy.folder_digests(made)


def test_a_schedule_of_one_minute_starts_a_run_and_no_two_runs_overlap(
    server: Server, whole_run: Path
) -> None:
    deployment = server.deployment("sft-pipeline")["id"]
    every_minute = {"active": True, "schedule": {"cron": "* * * * *"}, "parameters": {"until": "merge"}}
    assert server.deployment("sft-pipeline")["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    (schedule,) = server.ask(f"deployments/{deployment}/schedules", [every_minute])
    try:
        at_once = [server.create_run("sft-pipeline", until="merge") for _ in range(2)]
        scheduled = wait_for(lambda: auto_scheduled(server, deployment), "the start of a scheduled run")
    finally:
        server.ask(f"deployments/{deployment}/schedules/{schedule['id']}", method="DELETE")
    runs = [server.finished(name) for name in (*at_once, scheduled)]
    assert [run["state"]["type"] for run in runs] == ["COMPLETED"] * 3
    waited = [run for run in runs if "AwaitingConcurrencySlot" in state_names(server, run)]
    assert waited, "none had to wait: nothing was shown"
    runs.sort(key=lambda run: str(run["start_time"]))
    for before, after in pairwise(runs):
        assert moment(after["start_time"]) >= moment(before["end_time"])


def auto_scheduled(server: Server, deployment: str) -> str | None:
    """A run that the schedule made and that has begun."""
    found = server.flow_runs(deployments={"id": {"any_": [deployment]}})
    return next((run["id"] for run in found if run["auto_scheduled"] and run["start_time"]), None)


def state_names(server: Server, run: dict[str, Any]) -> list[str]:
    states = server.ask(f"flow_run_states/?flow_run_id={run['id']}", method="GET")
    return [state["name"] for state in states]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def test_deploying_again_changes_nothing(server: Server) -> None:
    before = {found["name"]: found["id"] for found in server.ask("deployments/filter")}
    result = server.type(
        "sft-pipeline deploy" if (BIN / "sft-pipeline").exists() else "python -m flows.cli deploy"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "prefect deployment run sft-pipeline/sft-pipeline\n"
    after = {found["name"]: found["id"] for found in server.ask("deployments/filter")}
    assert before == after
    assert len(after) == 10
