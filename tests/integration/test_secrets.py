"""Secrets that are planted everywhere a user may have one are found nowhere but where they belong."""

import base64
import json
import os
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from flows.training import PID_NAME, read_pid
from tests.integration import toy
from tests.integration.planted import found_in, texts_of
from tests.integration.postgres import Postgres, database, needs_postgres
from tests.integration.servers import (
    BIN,
    ROOT,
    Server,
    needs_plugin,
    running,
    serving,
    wait_for,
    write_project,
)

pytestmark = [pytest.mark.stress, needs_plugin]

CHAT_TEXT = "Is List<String> right?"
"""In every user turn of a toy chat."""


def planted(name: str, odd: str = "") -> str:
    """A token that is written differently in JSON, URLs and base64."""
    return f"{name}-{secrets.token_hex(8)}+{odd}{secrets.token_hex(8)}="


@dataclass(frozen=True)
class Planted:
    """A server behind a password, and the secrets it must keep."""

    server: Server
    postgres: Postgres | None
    secrets: Mapping[str, str]

    def everything(self) -> dict[str, bytes]:
        """All that the server, its worker and the runs have written."""
        texts = texts_of(self.server.home) | texts_of(self.server.folder)
        if self.postgres is not None:
            texts["PostgreSQL's log"] = self.postgres.log.read_bytes()
            texts["PostgreSQL's rows"] = self.postgres.dump()
        return texts


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=needs_postgres)])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planted]:
    """The worker and its runs log all they can: what a level hides is no proof.

    Not so the server: at DEBUG its web library writes each client's password, which the documentation tells.
    """
    tokens = {name: planted(name) for name in ("file", "parameter")}
    tokens |= {name: planted(name, odd='/"é" ') for name in ("environment", "block")}
    tokens["password"] = secrets.token_hex(16)
    environment = {
        "GITHUB_TOKEN": tokens["environment"],
        "PREFECT_LOGGING_LEVEL": "DEBUG",
    }
    folder = write_project(tmp_path_factory.mktemp("project"))
    add_secret_env(folder / "configs" / "demo.yaml")
    with database(request.param) as postgres:
        url = None
        if postgres is not None:
            url, tokens["database"] = postgres.url, postgres.password
        with serving(
            tmp_path_factory.mktemp("prefect"),
            database_url=url,
            auth=f"admin:{tokens['password']}",
            folder=folder,
            environment=environment,
        ) as server:
            yield Planted(server, postgres, tokens)


def add_secret_env(config: Path) -> None:
    text = config.read_text()
    config.write_text(text.replace("engine: {", "engine: {secret_env: {HF_TOKEN: hf-token}, "))


@pytest.fixture(scope="module")
def whole_run(site: Planted) -> Path:
    """A run to its end with a secret out of a block, watched on its way into the trainer."""
    server = site.server
    save = "import os; from prefect.blocks.system import Secret; Secret(value=os.environ['VALUE']).save('hf-token')"
    saved = server.type("python -c", save, environment={"VALUE": site.secrets["block"]})
    assert saved.returncode == 0, saved.stdout + saved.stderr
    run_root = server.folder / "configs" / "demo"
    literal = [str(BIN / "prefect"), "deployment", "run", "sft-pipeline", "--watch"]
    with running(literal, server, server.home / "client.log") as client:
        child = wait_for(lambda: read_pid(run_root / PID_NAME), "the start of the training")
        trainer = psutil.Process(child.pid)
        flow = trainer.parent()
        assert flow is not None
        assert trainer.environ()["HF_TOKEN"] == site.secrets["block"]
        assert "HF_TOKEN" not in flow.environ()
        assert client.wait() == 0, (server.home / "client.log").read_text()
    return run_root


def test_a_secret_block_reaches_the_trainer_and_no_secret_anything_else(
    site: Planted, whole_run: Path, tmp_path: Path
) -> None:
    refuse_url_in_file(site, tmp_path)
    refuse_url_in_parameter(site)
    everything = site.everything()
    assert found_in(everything, site.secrets.values()) == []
    kept = [place for place in found_in(everything, ["configs/demo.yaml"]) if "rows" in place]
    assert kept, "the search does not see what Prefect keeps"
    assert any("train" in place for place in everything), "the search does not see the run root"


def refuse_url_in_file(site: Planted, folder: Path) -> None:
    """A source with a password fails with our words, and without the password."""
    config = toy.write_config(folder)
    url = f"https://me:{site.secrets['file']}@example.org/a.json?key={site.secrets['file']}"
    config.write_text(config.read_text().replace("dumps/sharegpt.json", json.dumps(url)))
    result = site.server.type(
        "prefect deployment run sft-pipeline --watch", "--param", f"config_path={config}"
    )
    assert result.returncode == 1
    (failed,) = site.server.flow_runs(flow_runs={"state": {"type": {"any_": ["FAILED"]}}})
    assert "'sources.0.path' is 'https://***@" in failed["state"]["message"]


def refuse_url_in_parameter(site: Planted) -> None:
    """Prefect keeps parameters in clear: the server refuses such a one before it makes a run."""
    before = len(site.server.flow_runs())
    overrides = {"sources.0.path": f"https://{site.secrets['parameter']}@example.org/a.json"}
    result = site.server.type(
        "prefect deployment run sft-pipeline", "--param", f"overrides={json.dumps(overrides)}"
    )
    assert result.returncode == 1
    assert "Validation failed for field" in " ".join(result.stdout.split()), result.stdout
    assert len(site.server.flow_runs()) == before


def test_no_chat_text_is_in_a_log_or_in_the_database(site: Planted, whole_run: Path) -> None:
    of_prefect = {
        place: text for place, text in site.everything().items() if str(site.server.folder) not in place
    }
    assert site.server.ask("artifacts/filter"), "no artifacts were made"
    assert found_in(of_prefect, [CHAT_TEXT, "<|im_start|>"]) == []
    dumps = texts_of(site.server.folder / "configs" / "dumps")
    assert found_in(dumps, [CHAT_TEXT]), "the search does not know chat text"


@pytest.mark.parametrize("auth", ["", "admin:wrong"])
def test_without_the_password_the_server_answers_401_and_runs_nothing(site: Planted, auth: str) -> None:
    assert status_of(site.server, auth) == 401
    assert status_of(site.server, site.server.auth or "") == 200
    before = len(site.server.flow_runs())
    result = site.server.type(
        "prefect deployment run sft-pipeline", environment={"PREFECT_API_AUTH_STRING": auth}
    )
    assert result.returncode == 1
    assert "401" in result.stdout + result.stderr
    assert len(site.server.flow_runs()) == before


def status_of(server: Server, auth: str) -> int:
    word = base64.b64encode(auth.encode()).decode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Basic {word}"} if auth else {})
    request = urllib.request.Request(f"{server.api}/flow_runs/filter", b"{}", headers, method="POST")
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_prefect_home_that_others_can_read_is_told_in_the_log_of_each_run(
    site: Planted, whole_run: Path
) -> None:
    site.server.home.chmod(0o755)
    try:
        ended = site.server.finished(site.server.create_run("step-merge"))
    finally:
        site.server.home.chmod(0o700)
    assert ended["state"]["type"] == "COMPLETED", ended["state"]
    of_run = {"logs": {"flow_run_id": {"any_": [ended["id"]]}, "level": {"ge_": 30}}}
    # A run's last lines arrive after its end.
    (warning,) = wait_for(lambda: site.server.ask("logs/filter", **of_run), "the warning")
    assert f"chmod 700 {site.server.home}" in warning["message"]


def test_a_run_without_a_server_closes_its_home_and_keeps_no_secret_either(tmp_path: Path) -> None:
    toy.write_dumps(tmp_path / "dumps", num_chats=20, num_records=10)
    config = toy.write_config(tmp_path)
    token = planted("local", odd='/"é" ')
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    command = [sys.executable, "-m", "flows.cli", "run", str(config), "--until", "merge", "--debug"]
    result = subprocess.run(
        command, cwd=ROOT, env=kept | {"GITHUB_TOKEN": token}, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    home = tmp_path / ".prefect"
    assert home.stat().st_mode & 0o777 == 0o700
    everything = texts_of(tmp_path) | {"stdout": result.stdout, "stderr": result.stderr}
    assert any(place.startswith("rows of") for place in everything)
    assert found_in(everything, [token]) == []
    assert found_in(texts_of(home) | {"stderr": result.stderr}, [CHAT_TEXT]) == []
