"""Prefect without a server of the user's: settings for a quiet one that starts and ends with a command.

Only what the user has not set: a server, a home or a profile of theirs is used as it is.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

USERS_OWN = ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE")


def use_local_prefect(run_root: Path, *, debug: bool) -> None:
    """Set this process's environment before Prefect is first imported."""
    settings = quiet_settings(debug=debug)
    if not has_own_prefect(os.environ, Path.home()):
        home = run_root.parent / ".prefect"
        home.mkdir(parents=True, exist_ok=True)
        home.chmod(0o700)  # its database holds parameters and logs, and Prefect writes it readable by all
        settings["PREFECT_HOME"] = str(home)
        sys.stderr.write(f"{'prefect':<10} starting a local one, its records are in {home}\n")
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def quiet_settings(*, debug: bool) -> dict[str, str]:
    """No telemetry ever; with `debug`, Prefect's own log is shown."""
    settings = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_PLUGINS_ENABLED": "false",
        # 7 to 13 seconds here; Prefect's own limit of 20 fails the run on a busier machine.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    }
    if not debug:
        settings["PREFECT_LOGGING_LEVEL"] = "WARNING"
        # Errors are told once, by the command, on one line. Prefect's own record keeps the traceback.
        settings["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
        settings["PREFECT_SERVER_LOGGING_LEVEL"] = "CRITICAL"
    return settings


def has_own_prefect(environment: Mapping[str, str], home: Path) -> bool:
    """True where the user chose a server or home, by environment or in the profiles of their own Prefect."""
    if any(environment.get(name) for name in USERS_OWN):
        return True
    profiles = home / ".prefect" / "profiles.toml"
    return profiles.is_file() and "PREFECT_API_URL" in profiles.read_text(encoding="utf-8", errors="replace")
