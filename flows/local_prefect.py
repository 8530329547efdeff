"""Prefect without a server of the user's: a quiet one of our own, that starts and ends with a command.

Prefect starts such a server by itself when it finds none, but leaves it behind when the command is killed, and
starts it only when the flow begins. Ours is a child like the trainer: it dies with us, and comes up while the
config is being checked. What the user has set (server, home, profile) is used as it is.
"""

import atexit
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows.training import child_process, parent_pipe, stop_group
from schemas.errors import SftPipelineError

STARTUP_SECONDS, STOP_SECONDS = 120, 5
QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1", "PREFECT_PLUGINS_ENABLED": "false"}
# Errors are told once, by the command, on one line. Prefect's own record keeps the traceback.
SILENT = {
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
}


def start_local_prefect(run_root: Path, *, debug: bool) -> Callable[[], None]:
    """Set up Prefect before it is first imported; returns what waits until its server answers.

    The server is stopped when this process exits, after Prefect's own threads have sent the last of their
    records. With `debug`, Prefect's own log is shown.
    """
    for name, value in (QUIET if debug else QUIET | SILENT).items():
        os.environ.setdefault(name, value)
    if has_own_server(os.environ, Path.home()):
        return _nothing
    home = Path(os.environ.setdefault("PREFECT_HOME", str(run_root.parent / ".prefect")))
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    home.chmod(0o700)  # its database holds parameters and logs, and Prefect writes it readable by all
    server = ExitStack()
    url = server.enter_context(running_server())
    atexit.register(server.close)
    os.environ["PREFECT_API_URL"] = url

    def wait() -> None:
        sys.stderr.write(f"{'prefect':<10} a local one, its records are in {home}\n")
        _wait_until_it_answers(url)

    return wait


def has_own_server(environment: Mapping[str, str], home: Path) -> bool:
    """True where the user chose a server, by environment or in the profiles of their own Prefect."""
    if environment.get("PREFECT_API_URL") or environment.get("PREFECT_PROFILE"):
        return True
    profiles = Path(environment.get("PREFECT_HOME") or home / ".prefect") / "profiles.toml"
    return profiles.is_file() and "PREFECT_API_URL" in profiles.read_text(encoding="utf-8", errors="replace")


@contextmanager
def running_server() -> Iterator[str]:
    """Prefect's API on a free port of this machine alone; yields its URL, before it answers.

    The port is open from the beginning: no other program can take it, and an early caller is not turned away.
    """
    with socket.socket() as listening, parent_pipe() as pipe:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        descriptor = str(listening.fileno())
        with child_process(
            ["flows.local_server", descriptor],
            pipe=pipe,
            descriptors=[listening.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=None,
        ) as process:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/api"
            stop_group(process.pid, is_gone=lambda: process.poll() is not None, grace_seconds=STOP_SECONDS)


def _wait_until_it_answers(url: str) -> None:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=STARTUP_SECONDS):
            return
    except (urllib.error.URLError, OSError) as error:
        raise SftPipelineError(
            f"the local Prefect server did not answer within {STARTUP_SECONDS} s ({error}); "
            "run again with --debug, or set PREFECT_API_URL to a server of yours"
        ) from None


def _nothing() -> None:
    return
