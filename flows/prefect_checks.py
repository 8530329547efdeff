"""Checks of `sft-pipeline doctor` on Prefect: the server that runs would report to, port 4200, Prefect's folder.

`sft-pipeline run` needs no server of the user's: it starts one of its own on a free port. One that was named, by
PREFECT_API_URL or a profile, must answer.
"""

import base64
import os
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from flows.machine import NETWORK_FILE_SYSTEMS, Finding, ask_child, file_system, nearest_existing
from flows.prefect_home import open_home_problem

DEFAULT_PORT = 4200
ANSWER_SECONDS = 5
CHILD_TIMEOUT_SECONDS = 120
START_SERVER = "`prefect server start` starts one; unset PREFECT_API_URL to do without"


@dataclass(frozen=True, slots=True)
class Settings:
    """What Prefect itself makes of environment, profiles and files; `api_url` "" is a server of our own."""

    api_url: str
    home: Path
    has_own_database: bool
    auth: str = field(default="", repr=False)
    api_key: str = field(default="", repr=False)


def check_prefect(run_root: Path) -> Iterator[Finding]:
    """Server or port, then the folder."""
    settings = read_settings(run_root)
    if isinstance(settings, str):
        remedy = "pip install --upgrade 'sft-pipeline' in a fresh environment, or mend Prefect's settings"
        yield Finding("fails", "prefect", f"does not start: {settings}", "`import prefect` works", remedy)
        return
    yield check_server(settings) if settings.api_url else check_port(server_port())
    yield from check_home(settings)


# Settings are asked for in a child: Prefect takes a second to import, and makes its folder by being imported.
_ASK_PREFECT = """
import json
from prefect.settings import get_current_settings
found = get_current_settings()
secret = lambda value: value.get_secret_value() if value is not None else ""
print("FOUND", json.dumps([
    found.api.url or "", str(found.home), secret(found.api.auth_string), secret(found.api.key),
    bool(found.server.database.connection_url) and not secret(found.server.database.connection_url).startswith("sqlite"),
]))
"""


def read_settings(run_root: Path) -> Settings | str:
    """What a run under `run_root` would use, or why Prefect does not start."""
    from flows.local_prefect import has_own_server

    if not has_own_server(os.environ, Path.home()):
        home = Path(os.environ.get("PREFECT_HOME") or run_root.parent / ".prefect")
        return Settings("", home, has_own_database=False)
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | ({} if home.exists() else {"PREFECT_HOME": scratch})
        found = ask_child(_ASK_PREFECT, timeout_seconds=CHILD_TIMEOUT_SECONDS, environment=environment)
    if isinstance(found, str):
        return found
    url, _, auth, key, own_database = found
    return Settings(url, home, own_database, auth, key)


# Server and port --------------------------------------------------------------------------------------------

Answer = Literal["prefect", "unauthorized", "other", "none"]


def check_server(settings: Settings) -> Finding:
    """The server that was named answers as Prefect's API, and lets us in."""
    url = settings.api_url
    answer, detail = ask_server(url, auth=settings.auth, api_key=settings.api_key)
    if answer == "prefect":
        return Finding("ok", "server", f"Prefect's API answers at {url}")
    if answer == "unauthorized":
        remedy = "set PREFECT_API_AUTH_STRING to the server's PREFECT_SERVER_API_AUTH_STRING"
        return Finding("fails", "server", f"{url} refuses us ({detail})", "to be let in", remedy)
    if answer == "other":
        remedy = f"PREFECT_API_URL ends in /api and names Prefect's port; {START_SERVER}"
        return Finding(
            "fails", "server", f"what answers at {url} is not Prefect ({detail})", "its API", remedy
        )
    expected = "a Prefect server, since PREFECT_API_URL or a profile names one"
    return Finding("fails", "server", f"nothing answers at {url} ({detail})", expected, START_SERVER)


def check_port(port: int) -> Finding:
    """Where `prefect server start` would listen. A run does not need it, so a taken port only warns."""
    if not _is_open(port):
        return Finding("ok", "port", f"{port} is free for `prefect server start`; a run needs none")
    answer, _ = ask_server(f"http://127.0.0.1:{port}/api")
    if answer in ("prefect", "unauthorized"):
        found = f"a Prefect server is on port {port}; runs report to it once PREFECT_API_URL names it"
        return Finding("ok", "port", found)
    found = f"{port} is taken by a program that is not Prefect"
    remedy = (
        f"`ss -ltnp 'sport = :{port}'` names it; to start a server set PREFECT_SERVER_API_PORT to a free port. "
        "`sft-pipeline run` works without"
    )
    return Finding("warns", "port", found, f"{port} free, or a Prefect server on it", remedy)


def server_port() -> int:
    """The port that `prefect server start` would take."""
    text = os.environ.get("PREFECT_SERVER_API_PORT", "")
    return int(text) if text.isdigit() else DEFAULT_PORT


def ask_server(url: str, *, auth: str = "", api_key: str = "") -> tuple[Answer, str]:
    """Who answers at an API's address; and how, in words."""
    headers = {"Authorization": f"Basic {base64.b64encode(auth.encode()).decode()}"} if auth else {}
    if api_key:
        headers = {"Authorization": f"Bearer {api_key}"}
    try:
        # The first is open to all; the second one is not where the server wants to know who asks.
        if _fetch(f"{url.rstrip('/')}/health", headers).strip() != b"true":
            return "other", "its /health is not Prefect's"
        _fetch(f"{url.rstrip('/')}/admin/version", headers)
    except urllib.error.HTTPError as error:
        return ("unauthorized" if error.code in (401, 403) else "other"), f"HTTP {error.code}"
    except (OSError, ValueError) as error:  # URLError is an OSError; a reply that is no HTTP a ValueError
        reason = getattr(error, "reason", error)
        refused = isinstance(reason, ConnectionRefusedError | socket.gaierror | TimeoutError)
        return ("none" if refused else "other"), " ".join(str(reason).split()) or type(reason).__name__
    except Exception as error:  # noqa: BLE001 - http.client has errors of its own for what is no HTTP
        return "other", f"{type(error).__name__}: no HTTP"
    return "prefect", "HTTP 200"


def _fetch(url: str, headers: dict[str, str]) -> bytes:
    # Not through a proxy when the server is this machine.
    local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    handlers = [urllib.request.ProxyHandler({})] if local else []
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener(*handlers).open(request, timeout=ANSWER_SECONDS) as answer:
        body: bytes = answer.read(1 << 16)
        return body


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(ANSWER_SECONDS)
        return probe.connect_ex(("127.0.0.1", port)) == 0


# The folder -------------------------------------------------------------------------------------------------


def check_home(settings: Settings) -> Iterator[Finding]:
    """Prefect's folder holds parameters and logs in a database that wants a local disk."""
    home, place = settings.home, nearest_existing(settings.home)
    kind = file_system(place)
    holds_database = not settings.api_url and not settings.has_own_database
    if kind in NETWORK_FILE_SYSTEMS and holds_database:
        remedy = "set PREFECT_HOME to a folder on a local disk, or use PostgreSQL"
        found = f"PREFECT_HOME {home} is on a network file system ({kind})"
        yield Finding("fails", "prefect home", found, "a local disk: its SQLite database needs one", remedy)
        return
    problem = open_home_problem({"PREFECT_HOME": str(home)})
    if problem is None:
        yield Finding("ok", "prefect home", f"{home} ({kind})")
    else:
        found, _, remedy = problem.partition("; ")
        yield Finding("warns", "prefect home", found, "mode 700", remedy)
