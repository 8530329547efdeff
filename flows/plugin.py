"""Plugin of Prefect: `prefect deployment run sft-pipeline` as it is typed, without `sft-pipeline/sft-pipeline`.

Prefect's command line wants FLOW/DEPLOYMENT and no setting changes that; flow and deployment share one name here,
so a bare name of ours is written twice before the command line is parsed. Loaded by every `prefect` command where
`[tool.prefect.plugins] enabled = true` holds (this project's folder): nothing heavy is imported, and a command
line that is not one of the three below, or names no deployment of ours, is left as it is.
"""

import sys
from pathlib import Path
from typing import Any

from prefect.plugins import register_hook

STEP_NAMES = ("merge", "clean", "filter", "dedup", "holdout", "split", "pack")
DEPLOYMENTS = frozenset(
    {"sft-pipeline", "train", "evaluate-promote", *(f"step-{name}" for name in STEP_NAMES)}
)
COMMANDS = frozenset({"deployment", "deployments"})
VERBS = frozenset({"run", "inspect", "delete"})
FLAGS_WITHOUT_VALUE = frozenset({"--watch", "--no-watch"})


@register_hook
def setup_environment(*, ctx: Any) -> None:
    """Called by Prefect at its import, before it reads the arguments."""
    if is_prefect_command(sys.argv[0], sys.orig_argv):
        sys.argv[1:] = with_full_name(sys.argv[1:])


def is_prefect_command(program: str, original: list[str]) -> bool:
    """True for `prefect ...` and `python -m prefect ...`, where argv[0] is still "-m" at this point."""
    return Path(program).name in ("prefect", "prefect.exe") or original[1:3] == ["-m", "prefect"]


def with_full_name(arguments: list[str]) -> list[str]:
    """The same arguments, the first bare name of ours after `deployment run|inspect|delete` written in full.

    >>> with_full_name(["deployment", "run", "sft-pipeline", "--watch"])
    ['deployment', 'run', 'sft-pipeline/sft-pipeline', '--watch']
    """
    for place in range(len(arguments) - 1):
        if arguments[place] in COMMANDS and arguments[place + 1] in VERBS:
            return [*arguments[: place + 2], *_named_in_full(arguments[place + 2 :])]
    return arguments


def _named_in_full(arguments: list[str]) -> list[str]:
    for place, argument in enumerate(arguments):
        before = arguments[place - 1] if place else ""
        is_value = before.startswith("-") and "=" not in before and before not in FLAGS_WITHOUT_VALUE
        if argument in DEPLOYMENTS and not is_value:
            return [*arguments[:place], f"{argument}/{argument}", *arguments[place + 1 :]]
    return arguments
