"""The folder of a model: which files it must have, what they may not ask for, and the digest that names it.

Light: no torch. Safetensors only, no remote code.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from pipelines.hub_cache import model_folder
from schemas.errors import InputError
from schemas.training_config import ModelConfig

WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"


def check_model_folder(model: ModelConfig) -> Path:
    """The model's folder, once it holds a config and every safetensors file that is needed. Raises InputError."""
    folder = model_folder(model.path, model.revision)
    refuse_remote_code(folder, ("config.json",))
    if model.init == "files":
        weight_files(folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model's weights. Raises InputError when one is missing."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    index = folder / WEIGHTS_INDEX_NAME
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt*")
        )
        found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "no weights"
        raise InputError(
            f"{folder}: found {found}; expected {WEIGHTS_NAME} or {WEIGHTS_INDEX_NAME}: save the model with "
            "save_pretrained of a recent transformers"
        )
    names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: {missing[0]} of {len(names)} weight files is missing; download it again")
    return [folder / name for name in names]


def refuse_remote_code(folder: Path, names: tuple[str, ...]) -> None:
    """Raises InputError where one of its files names code to run."""
    for name in names:
        path = folder / name
        settings: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
        unsafe = sorted(key for key in settings if key == "auto_map" or key.endswith("_internal"))
        if unsafe:
            raise InputError(
                f"{path} has {unsafe[0]!r}, which makes transformers run code from the model's folder; "
                "use a model that transformers knows itself"
            )


# Identity ---------------------------------------------------------------------------------------------------

FULLY_READ_BYTES = 256 * 2**20
NUM_SAMPLED_BLOCKS = 256
SAMPLED_BLOCK_BYTES = 64 * 2**10


def base_digest(model: ModelConfig) -> str:
    """Of the model as the settings have it: drawn weights hang on its config alone."""
    folder = check_model_folder(model)
    return model_digest(folder) if model.init == "files" else _digest(_states([folder / "config.json"]))


def model_digest(folder: Path) -> str:
    """32 hex digits over config.json and the weights; computed once per process and file state.

    Files up to 256 MiB are read whole. Of larger ones the size, the header and 256 evenly spaced blocks count:
    it names a model (another fine-tune differs all over), it does not prove that no bit has flipped.
    """
    return _digest(_states([folder / "config.json", *weight_files(folder)]))


def _states(files: list[Path]) -> tuple[tuple[Path, int, int], ...]:
    return tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@functools.cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path, num_bytes, _ in files:
        digest.update(f"{path.name}:{num_bytes}:".encode())
        with path.open("rb") as file:
            for first, count in _blocks(num_bytes):
                file.seek(first)
                digest.update(file.read(count))
    return digest.hexdigest()


def _blocks(num_bytes: int) -> list[tuple[int, int]]:
    if num_bytes <= FULLY_READ_BYTES:
        step = 1 << 24
        return [(first, step) for first in range(0, num_bytes, step)]
    last = num_bytes - SAMPLED_BLOCK_BYTES
    spaced = [last * block // NUM_SAMPLED_BLOCKS for block in range(1, NUM_SAMPLED_BLOCKS + 1)]
    return [(0, 1 << 20), *((first, SAMPLED_BLOCK_BYTES) for first in spaced)]
