"""Who takes part, and what of each is tried before the rounds: its fastest way on this card takes part, no other.

The first value of each dimension is the safe one, with which the search begins. Dimensions are searched one after
the other, each with the best of those before it.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.bench.options import BenchOptions
from flows.packages import OUR_FOLDER
from schemas.errors import ConfigError

PEERS_FOLDER = OUR_FOLDER / "trainer" / "bench" / "peers"
OURS = "ours"

Variant = dict[str, Any]
Dimensions = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Contestant:
    name: str
    command: tuple[str, ...]
    """Without the request, its last argument."""
    dimensions: Dimensions


def contestants_of(options: BenchOptions) -> list[Contestant]:
    """Ours first. Raises ConfigError for a peer that nobody knows."""
    unknown = sorted((set(options.peers) | set(options.peer_pythons or {})) - PEERS.keys())
    if unknown:
        raise ConfigError(f"peer {unknown[0]!r} is not known, expected one of {', '.join(sorted(PEERS))}")
    return [ours(options), *(PEERS[name](options) for name in dict.fromkeys(options.peers))]


def ours(options: BenchOptions) -> Contestant:
    kinds = ("full", "none") if options.checkpointing == "auto" else (options.checkpointing,)
    command = (sys.executable, str(OUR_FOLDER / "flows" / "child.py"), "trainer.bench.ours")
    return Contestant(OURS, command, {"checkpointing": kinds})


def trl(options: BenchOptions) -> Contestant:
    dimensions: Dimensions = {
        "checkpointing": _checkpointing(options, "full", "selective"),
        "attention": ("sdpa", "varlen", "flash_attention_2"),
        "liger": (False, True),
        "adapters": ("float32", "bfloat16") if options.method == "lora" else ("float32",),
        "compile": (False, True),
        "packing": (True, False),
        "micro_steps": (1, options.bins_per_step) if options.bins_per_step > 1 else (1,),
    }
    return Contestant("trl", _command(options, "trl"), dimensions)


def unsloth(options: BenchOptions) -> Contestant:
    dimensions: Dimensions = {
        "checkpointing": _checkpointing(options, "unsloth", "unsloth"),
        "packing": (True, False),
    }
    return Contestant("unsloth", _command(options, "unsloth"), dimensions)


def padded(options: BenchOptions) -> Contestant:
    return Contestant("padded", _command(options, "padded"), {})


PEERS = {"trl": trl, "unsloth": unsloth, "padded": padded}


def _checkpointing(options: BenchOptions, full: str, selective: str) -> tuple[str, ...]:
    """As much memory as ours may take, a peer may take as well."""
    if options.checkpointing == "full":
        return (full,)
    if options.checkpointing == "selective":
        return tuple(dict.fromkeys((full, selective)))
    return (full, "none")


def _command(options: BenchOptions, name: str) -> tuple[str, ...]:
    """A peer's program, in the interpreter that was given for it. Raises ConfigError for one that is not there."""
    python = options.python_of(name) or sys.executable
    if not Path(python).is_file():
        raise ConfigError(f"--peer-python {name}={python}: there is no such interpreter")
    return (python, str(PEERS_FOLDER / f"run_{name}.py"))
