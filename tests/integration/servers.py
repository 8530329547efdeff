"""Real Prefect servers for tests: each with a port, a home and a database of its own, and a worker beside it.

    with serving(folder) as server:                                  # SQLite in server.home
        server.type("prefect deployment run sft-pipeline --watch")   # a line of the README

`serving(folder, database_url=url, auth="user:password")` is the same on PostgreSQL and behind a password.
"""

import base64
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from tests.integration import toy

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 240.0

needs_plugin = pytest.mark.skipif(
    "sft-pipeline" not in {point.name for point in entry_points(group="prefect.plugins")},
    reason="sft-pipeline is not installed here, so Prefect can't find its plugin: make install",
)


@contextmanager
def serving(
    home: Path,
    *,
    database_url: str | None = None,
    auth: str | None = None,
    folder: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Iterator["Server"]:
    """A server with everything deployed, and a worker; logs are server.log and worker.log in `home`.

    `folder` is where every line is typed: it holds prefect.yaml and pyproject.toml. `environment` is that of
    server, worker and clients.
    """
    server = Server(home, database_url=database_url, auth=auth, folder=folder)
    server.environment.update(environment or {})
    with serving_alone(server):
        for line in (
            "prefect work-pool create sft-pipeline --type process",
            "prefect --no-prompt deploy --all",
        ):
            done = server.type(line)
            assert done.returncode == 0, line + done.stdout + done.stderr
        with working(server):
            yield server


@contextmanager
def serving_alone(server: "Server") -> Iterator["subprocess.Popen[bytes]"]:
    """The server's process, until it answers; nothing deployed, no worker."""
    words = [str(BIN / "prefect"), "server", "start", "--port", str(server.port)]
    with running(words, server, server.home / "server.log", server.secrets) as process:
        wait_for(server.is_up, "the start of the server")
        yield process


@contextmanager
def working(
    server: "Server", environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker of the pool, whose flow runs have `environment` too."""
    words = [str(BIN / "prefect"), "worker", "start", "--pool", "sft-pipeline"]
    with running(words, server, server.home / "worker.log", environment) as process:
        yield process


def wait_for(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.25)
    return result


class Server:
    """The environment of its clients, and what they type."""

    def __init__(
        self,
        home: Path,
        *,
        database_url: str | None = None,
        auth: str | None = None,
        folder: Path = ROOT,
    ) -> None:
        self.port = free_port()
        self.home = home
        self.folder = folder
        self.auth = auth
        self.api = f"http://127.0.0.1:{self.port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = kept | {
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            # Asked every 10 seconds otherwise, waited for 30: tests would only sleep longer.
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "5",
        }
        self.secrets: dict[str, str] = {}
        """What the server's own process has in its environment, and its clients have not."""
        if auth is not None:
            self.environment["PREFECT_API_AUTH_STRING"] = auth
            self.secrets["PREFECT_SERVER_API_AUTH_STRING"] = auth
        if database_url is not None:
            self.secrets["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url

    def type(
        self, line: str, *more: str, environment: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """A line as it stands in the README, typed in the project's folder."""
        program, *words = shlex.split(line)
        return subprocess.run(
            [str(BIN / program), *words, *more],
            cwd=self.folder,
            env=self.environment | dict(environment or {}),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def ask(self, path: str, items: Any = None, *, method: str = "POST", **body: Any) -> Any:
        """The server's own answer, as JSON; the request holds `items` or else the keywords."""
        headers = {"Content-Type": "application/json"}
        if self.auth is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(self.auth.encode()).decode()
        content = (
            None if method in ("GET", "DELETE") else json.dumps(body if items is None else items).encode()
        )
        request = urllib.request.Request(f"{self.api}/{path}", content, headers, method=method)
        text = wait_for(lambda: answer_to(request), f"an answer to {path}")
        return json.loads(text) if text != b"-" else None

    def deployment(self, name: str) -> dict[str, Any]:
        """One of ours: flow and deployment share a name."""
        found: dict[str, Any] = self.ask(f"deployments/name/{name}/{name}", method="GET")
        return found

    def create_run(self, deployment: str, **parameters: Any) -> str:
        """Start a run now, as the interface does; its id."""
        found = self.ask(
            f"deployments/{self.deployment(deployment)['id']}/create_flow_run", parameters=parameters
        )
        return str(found["id"])

    def finished(self, flow_run_id: str) -> dict[str, Any]:
        """A run, once it has ended in whatever state."""

        def ended() -> dict[str, Any] | None:
            run: dict[str, Any] = self.ask(f"flow_runs/{flow_run_id}", method="GET")
            return run if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

        run: dict[str, Any] = wait_for(ended, f"the end of run {flow_run_id}")
        return run

    def flow_runs(self, **filters: Any) -> list[dict[str, Any]]:
        """Runs that the server's filters leave, newest first."""
        found: list[dict[str, Any]] = self.ask("flow_runs/filter", sort="EXPECTED_START_TIME_DESC", **filters)
        return found

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api}/health"):
                return True
        except (urllib.error.URLError, ConnectionError):
            return False


def answer_to(request: urllib.request.Request) -> bytes | None:
    """b"-" for an empty answer; None where SQLite was busy: Prefect's own clients ask again too."""
    try:
        with urllib.request.urlopen(request) as answer:
            return bytes(answer.read()) or b"-"
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return None
        raise


@contextmanager
def running(
    arguments: list[str], server: Server, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in a session of its own, killed with its group when the block ends; `log` has its output."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            arguments,
            cwd=server.folder,
            env=server.environment | dict(environment or {}),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            # A worker may ignore SIGTERM for minutes; the group is ours alone.
            kill_group(process.pid)
            process.wait()


def kill_group(group: int) -> None:
    """SIGKILL to a group that may be gone already."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def write_project(folder: Path) -> Path:
    """A folder to deploy from, like the repository's own: what `prefect` reads there, and a toy configs/demo.yaml."""
    configs = folder / "configs"
    for name in ("prefect.yaml", "pyproject.toml"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder)
    toy.write_dumps(configs / "dumps", num_chats=60, num_records=40)
    toy.write_model(configs / "model")
    toy.write_config(configs, run_root="demo")
    return folder
