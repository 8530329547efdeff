"""Who takes part, and what of each is tried before the rounds: its fastest way on this card takes part, no other.

The first value of each dimension is the safe one, with which the search begins. Dimensions are searched one after
the other, each with the best of those before it.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.bench.options import BenchOptions, is_known
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
    missing: tuple[str, ...] = ()
    """Modules without which it can't take part at all."""
    not_tried: tuple[str, ...] = ()
    """Modules without which some values of its dimensions can't be tried."""


def contestants_of(options: BenchOptions) -> list[Contestant]:
    """Ours first. Raises ConfigError for a peer that nobody knows."""
    told = (options.peers, options.peer_pythons or {}, options.steps_of or {}, options.rounds_of or {})
    unknown = sorted(set().union(*told) - PEERS.keys())
    if unknown:
        raise ConfigError(f"peer {unknown[0]!r} is not known, expected one of {', '.join(sorted(PEERS))}")
    return [ours(options), *(peer(name, options) for name in dict.fromkeys(options.peers))]


def ours(options: BenchOptions) -> Contestant:
    all_kinds = tuple(kind for kind in ("full", "selective", "none") if is_known(kind))
    kinds = all_kinds if options.checkpointing == "auto" else (options.checkpointing,)
    command = (sys.executable, str(OUR_FOLDER / "flows" / "child.py"), "trainer.bench.ours")
    return Contestant(OURS, command, {"checkpointing": kinds})


# Peers ------------------------------------------------------------------------------------------------------


def peer(name: str, options: BenchOptions) -> Contestant:
    """In the interpreter that was given for it. Raises ConfigError for one that is not there."""
    python = options.python_of(name) or sys.executable
    if not Path(python).is_file():
        raise ConfigError(f"--peer-python {name}={python}: there is no such interpreter")
    dimensions = PEERS[name](options)
    here = installed(python, {*MODULES[name], *VALUE_MODULES.values()})
    possible = {
        dimension: tuple(v for v in values if VALUE_MODULES.get((dimension, v)) in (None, *here))
        for dimension, values in dimensions.items()
    }
    wanted = [VALUE_MODULES.get((dimension, v)) for dimension, values in dimensions.items() for v in values]
    return Contestant(
        name,
        (python, str(PEERS_FOLDER / f"run_{name}.py")),
        possible,
        missing=tuple(module for module in MODULES[name] if module not in here),
        not_tried=tuple(module for module in wanted if module is not None and module not in here),
    )


def installed(python: str, modules: Iterable[str]) -> set[str]:
    """Which of these modules an interpreter would find; none is imported."""
    code = "import importlib.util, sys; print(*[m for m in sys.argv[1:] if importlib.util.find_spec(m)])"
    found = subprocess.run([python, "-c", code, *modules], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise ConfigError(f"{python} is no working Python: {found.stderr.strip()[-200:]}")
    return set(found.stdout.split())


def trl_dimensions(options: BenchOptions) -> Dimensions:
    return {
        "checkpointing": _checkpointing(options, "full", "selective"),
        "attention": ("sdpa", "varlen", "flash_attention_2"),
        "liger": (False, True),
        "adapters": ("float32", "bfloat16") if options.method == "lora" else ("float32",),
        "packing": (True, False),
        "micro_steps": (1, options.bins_per_step) if options.bins_per_step > 1 else (1,),
        "compile": (False, True),
    }


def unsloth_dimensions(options: BenchOptions) -> Dimensions:
    return {"checkpointing": _checkpointing(options, "unsloth", "unsloth"), "packing": (True, False)}


def padded_dimensions(options: BenchOptions) -> Dimensions:
    """A fixed recipe."""
    return {}


PEERS: Mapping[str, Callable[[BenchOptions], Dimensions]] = {
    "trl": trl_dimensions,
    "unsloth": unsloth_dimensions,
    "padded": padded_dimensions,
}
MODULES = {"trl": ("trl", "peft"), "unsloth": ("unsloth", "trl"), "padded": ("transformers", "peft")}
VALUE_MODULES = {("liger", True): "liger_kernel", ("attention", "flash_attention_2"): "flash_attn"}
"""What a value of a dimension needs beside the peer itself."""


def _checkpointing(options: BenchOptions, full: str, selective: str) -> tuple[str, ...]:
    """As much memory as ours may take, a peer may take as well."""
    if options.checkpointing == "full":
        return (full,)
    if options.checkpointing == "selective":
        return tuple(dict.fromkeys((full, selective)))
    return (full, "none")
