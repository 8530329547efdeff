"""A real Prefect server, worker and deployments: the commands of the README, typed literally, in this folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from flows.training import PID_NAME, process_start, read_pid
from pipelines.storage import hold_run_root
from tests.integration import toy

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 240.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "sft-pipeline" not in {point.name for point in entry_points(group="prefect.plugins")},
        reason="sft-pipeline is not installed here, so Prefect can't find its plugin: make install",
    ),
]


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_SECONDS} s"
        time.sleep(0.25)
    return result


class Server:
    """The environment of its clients, and what they type."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.home = home
        self.api = f"http://127.0.0.1:{self.port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = kept | {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }

    def type(self, line: str, *more: str) -> "subprocess.CompletedProcess[str]":
        """A line as it stands in the README, typed in the project's folder."""
        program, *words = line.split()
        return subprocess.run(
            [str(BIN / program), *words, *more],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def ask(self, path: str, **body: Any) -> Any:
        """The server's own answer, as JSON."""
        request = urllib.request.Request(
            f"{self.api}/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method="POST",
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def flow_runs(self) -> list[dict[str, Any]]:
        """All runs, newest first."""
        found: list[dict[str, Any]] = self.ask("flow_runs/filter", sort="EXPECTED_START_TIME_DESC")
        return found

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api}/health"):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False


@contextmanager
def running(arguments: list[str], server: Server, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=server.environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield process
        finally:
            # A worker may ignore SIGTERM for minutes; the group is ours alone.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Server and worker, with everything deployed."""
    home = tmp_path_factory.mktemp("prefect")
    server = Server(home)
    prefect = str(BIN / "prefect")
    with running([prefect, "server", "start", "--port", str(server.port)], server, home / "server.log"):
        wait_for(server.is_up, "the start of the server")
        deployed = server.type("prefect work-pool create sft-pipeline --type process")
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        deployed = server.type("prefect --no-prompt deploy --all")
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        with running([prefect, "worker", "start", "--pool", "sft-pipeline"], server, home / "worker.log"):
            yield server


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    toy.write_dumps(folder / "dumps", num_chats=60, num_records=40)
    toy.write_model(folder / "model")
    return folder


@pytest.mark.parametrize("name", ["sft-pipeline", "sft-pipeline/sft-pipeline"])
def test_the_deployment_runs_to_its_end_by_its_short_and_by_its_full_name(
    server: Server, toy_folder: Path, name: str
) -> None:
    config = toy.write_config(toy_folder, run_root="whole")
    result = server.type(
        f"prefect deployment run {name} --watch", "--param", f"config_path={json.dumps(str(config))}"
    )
    log = (server.home / "worker.log").read_text()
    assert result.returncode == 0, result.stdout + result.stderr + log
    assert "finished successfully" in " ".join(result.stdout.split())
    assert (toy_folder / "whole" / "evaluation.json").exists()
    assert "<|im_start|>" not in log, "chat text in a log"
    assert "Is List<String> right?" not in log


def test_a_step_is_deployed_alone_and_overrides_reach_it(server: Server, toy_folder: Path) -> None:
    config = toy.write_config(toy_folder, run_root="step")
    parameters = {"config_path": str(config), "overrides": {"merge.part_bytes": 1_000_000}}
    result = server.type("prefect deployment run step-merge --watch", "--params", json.dumps(parameters))
    assert result.returncode == 0, result.stdout + result.stderr
    resolved = json.loads((toy_folder / "step" / "config.json").read_text())
    assert resolved["merge"]["part_bytes"] == 1_000_000
    assert sorted(path.name for path in (toy_folder / "step").iterdir()) == [
        "01_merged",
        "config.json",
        "run.lock",
    ]


def test_a_run_that_is_refused_fails_with_our_words(server: Server, toy_folder: Path) -> None:
    config = toy.write_config(toy_folder, run_root="refused")
    parameters = {"config_path": str(config), "overrides": ["clean.image=keep"]}
    result = server.type("prefect deployment run sft-pipeline --watch", "--params", json.dumps(parameters))
    assert result.returncode == 1
    assert "did you mean 'clean.images'?" in server.flow_runs()[0]["state"]["message"]


def test_cancelling_ends_the_training_child_and_frees_the_run_root(server: Server, toy_folder: Path) -> None:
    config = toy.write_config(toy_folder, run_root="cancelled")
    overrides = {"train.epochs": 300, "train.max_steps": None, "train.learning_rate": 1e-6}
    parameters = {"config_path": str(config), "overrides": overrides}
    result = server.type("prefect deployment run sft-pipeline", "--params", json.dumps(parameters))
    assert result.returncode == 0, result.stdout + result.stderr
    run_root = toy_folder / "cancelled"

    def under_way(seen: Any) -> Any:
        assert server.flow_runs()[0]["state"]["type"] in ("SCHEDULED", "PENDING", "RUNNING"), (
            server.flow_runs()[0]
        )
        return seen

    child = wait_for(lambda: under_way(read_pid(run_root / PID_NAME)), "the start of the training")
    wait_for(lambda: under_way(list(run_root.glob("checkpoints/*/step-*"))), "the first checkpoint")
    flow_run = server.flow_runs()[0]
    assert child.owner == flow_run["id"]
    cancelled = server.type("prefect flow-run cancel", flow_run["id"])
    assert cancelled.returncode == 0, cancelled.stdout + cancelled.stderr
    wait_for(lambda: process_start(child.pid) == "", "the end of the training child")
    wait_for(lambda: server.flow_runs()[0]["state"]["type"] == "CANCELLED", "the state Cancelled")
    with hold_run_root(run_root, wait_seconds=PATIENCE_SECONDS):
        assert not (run_root / PID_NAME).exists()


def test_deploying_again_changes_nothing(server: Server) -> None:
    before = {found["name"]: found["id"] for found in server.ask("deployments/filter")}
    result = (
        server.type("sft-pipeline deploy") if (BIN / "sft-pipeline").exists() else deploy_as_module(server)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "prefect deployment run sft-pipeline/sft-pipeline\n"
    after = {found["name"]: found["id"] for found in server.ask("deployments/filter")}
    assert before == after
    assert len(after) == 10


def deploy_as_module(server: Server) -> "subprocess.CompletedProcess[str]":
    return server.type("python -m flows.cli deploy")
