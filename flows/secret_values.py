"""Secrets: from the environment or from Prefect's Secret blocks into the trainer's environment, and nowhere else."""

import os
import re
from collections.abc import Callable, Mapping
from typing import cast

from schemas.credentials import without_credentials
from schemas.errors import ConfigError

SHORTEST_HIDDEN = 6
"""A shorter value stands in many lines by chance."""
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|AUTH_STRING|KEY)$", re.IGNORECASE)

ReadBlock = Callable[[str], str]


def secret_variables(wanted: Mapping[str, str], read_block: ReadBlock | None) -> dict[str, str]:
    """The variables of `engine.secret_env` with their values: from our own environment, or else from the block named.

    Without `read_block` (a command without Prefect) all must be set. Raises ConfigError, which never holds a value.
    """
    return {
        variable: os.environ.get(variable) or _read(variable, block, read_block)
        for variable, block in wanted.items()
    }


def read_secret_block(name: str) -> str:
    """The value of a Secret block. Raises ValueError when there is none, or it holds no text."""
    from prefect.blocks.system import Secret

    value = cast(Secret, Secret.load(name)).get()
    if not isinstance(value, str) or not value:
        raise ValueError("it holds no text")
    return value


def hider(secrets: Mapping[str, str]) -> Callable[[str], str]:
    """What makes a line fit to be shown: *** for those values, those of our own environment, and URL passwords."""
    own = [value for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    lines = {line.strip() for value in (*secrets.values(), *own) for line in value.splitlines()}
    hidden = sorted((line for line in lines if len(line) >= SHORTEST_HIDDEN), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, hidden))) if hidden else None
    return lambda text: without_credentials(pattern.sub("***", text) if pattern else text)


def _read(variable: str, block: str, read_block: ReadBlock | None) -> str:
    if read_block is None:
        raise ConfigError(
            f"engine.secret_env: {variable} is not set, and this command does not ask Prefect for its Secret "
            "block; set it in the environment"
        )
    try:
        return read_block(block)
    except ValueError:
        # The block is not named: who mistook its name for the value would find the secret in the log.
        raise ConfigError(
            f"engine.secret_env.{variable}: Prefect has no Secret block with text by the name that stands there; "
            f"create it (docs/operations.md, Secrets), or set {variable} in the worker's environment"
        ) from None
