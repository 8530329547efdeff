"""Prefect's folder on this machine: its database holds parameters, logs and encrypted secrets beside their key."""

from collections.abc import Mapping
from pathlib import Path


def open_home_problem(environment: Mapping[str, str]) -> str | None:
    """What is wrong with the permissions of PREFECT_HOME, and the remedy; None where all is well.

    `prefect server start` writes its database readable by all, so the folder must be closed.
    """
    home = Path(environment.get("PREFECT_HOME") or Path.home() / ".prefect").expanduser()
    if not home.is_dir() or not home.stat().st_mode & 0o077:
        return None
    return (
        f"{home} has mode {home.stat().st_mode & 0o777:o}: other users of this machine can read Prefect's database "
        f"there, with parameters and logs; chmod 700 {home}, and start the server with umask 077"
    )
