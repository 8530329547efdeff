"""`prefect deployment run sft-pipeline` as it is typed: the real command, against a server that takes notes."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.plugin import DEPLOYMENTS, is_prefect_command, with_full_name

ROOT = Path(__file__).parent.parent.parent
installed = pytest.mark.skipif(
    "sft-pipeline" not in {point.name for point in entry_points(group="prefect.plugins")},
    reason="sft-pipeline is not installed here, so Prefect can't find its plugin: make install",
)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("deployment run sft-pipeline", "deployment run sft-pipeline/sft-pipeline"),
        ("deployment run sft-pipeline --watch", "deployment run sft-pipeline/sft-pipeline --watch"),
        ("deployment run --watch sft-pipeline", "deployment run --watch sft-pipeline/sft-pipeline"),
        ("--no-prompt deployments run train", "--no-prompt deployments run train/train"),
        ("--profile x deployment inspect step-merge", "--profile x deployment inspect step-merge/step-merge"),
        ("deployment delete evaluate-promote", "deployment delete evaluate-promote/evaluate-promote"),
        ("deployment run --tag train sft-pipeline", "deployment run --tag train sft-pipeline/sft-pipeline"),
        ("deployment run --tag=train train", "deployment run --tag=train train/train"),
        ("deployment run train -p a=1 --tag train", "deployment run train/train -p a=1 --tag train"),
    ],
)
def test_a_bare_name_of_ours_is_written_in_full(typed: str, read: str) -> None:
    assert with_full_name(typed.split()) == read.split()


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "deployment",
        "deployment run",
        "deployment ls",
        "deployment run --help",
        "deployment run sft-pipeline/sft-pipeline",
        "deployment run somebody-elses",
        "deployment run other/train",
        "deployment run --id 7d3a",
        "deployment run --tag train other/flow",
        "deployment schedule ls sft-pipeline",
        "flow serve train",
        "deploy -n train",
        "work-pool create sft-pipeline --type process",
        "version",
    ],
)
def test_every_other_command_line_is_left_as_it_is(typed: str) -> None:
    assert with_full_name(typed.split()) == typed.split()


@pytest.mark.parametrize(
    ("program", "original", "expected"),
    [
        ("/usr/bin/prefect", ["python", "/usr/bin/prefect"], True),
        ("-m", ["python", "-m", "prefect", "deployment"], True),
        ("-m", ["python", "-m", "pytest", "deployment"], False),
        ("-c", ["python", "-c", "import prefect"], False),
        ("/home/me/train.py", ["python", "/home/me/train.py", "deployment", "run", "train"], False),
    ],
)
def test_only_prefects_own_command_is_touched(program: str, original: list[str], expected: bool) -> None:
    assert is_prefect_command(program, original) is expected


def test_the_names_are_those_of_the_deployments() -> None:
    deployments = YAML(typ="safe", pure=True).load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {deployment["name"] for deployment in deployments} == DEPLOYMENTS


class NoteTaker(BaseHTTPRequestHandler):
    """Answers 404 to everything and remembers what was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(404)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[ThreadingHTTPServer]:
    NoteTaker.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), NoteTaker)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def prefect(
    *arguments: str, api: ThreadingHTTPServer, home: Path, folder: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {
        "PREFECT_API_URL": f"http://127.0.0.1:{api.server_port}/api",
        "PREFECT_HOME": str(home),
        "DO_NOT_TRACK": "1",
    }
    command = (
        [sys.executable, "-m", "prefect"]
        if arguments[0] == "-m"
        else [str(Path(sys.executable).parent / "prefect")]
    )
    rest = [argument for argument in arguments if argument != "-m"]
    return subprocess.run(
        [*command, *rest],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@installed
@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["-m"]])
def test_the_literal_command_asks_the_server_for_our_deployment(
    how: list[str], api: ThreadingHTTPServer, tmp_path: Path
) -> None:
    result = prefect(*how, "deployment", "run", "sft-pipeline", api=api, home=tmp_path)
    assert "/api/deployments/name/sft-pipeline/sft-pipeline" in NoteTaker.asked, result.stdout + result.stderr
    assert "Deployment 'sft-pipeline/sft-pipeline' not found" in result.stdout + result.stderr


@installed
@pytest.mark.slow
def test_other_commands_work_as_without_the_plugin(api: ThreadingHTTPServer, tmp_path: Path) -> None:
    for arguments in (["version"], ["deployment", "--help"], ["config", "view"]):
        here = prefect(*arguments, api=api, home=tmp_path)
        elsewhere = prefect(*arguments, api=api, home=tmp_path, folder=tmp_path)
        assert here.returncode == elsewhere.returncode == 0, here.stdout + here.stderr
        assert "plugin" not in here.stderr.lower()
    assert [line for line in here.stdout.splitlines() if "PREFECT_PLUGINS_ENABLED='True'" in line]


@installed
@pytest.mark.slow
def test_an_unknown_bare_name_still_gets_prefects_own_message(
    api: ThreadingHTTPServer, tmp_path: Path
) -> None:
    result = prefect("deployment", "run", "nobodys", api=api, home=tmp_path)
    assert result.returncode == 1
    assert "Invalid deployment name format: nobodys" in result.stdout + result.stderr
