"""Checkpoints that are there whole or not at all, and that any strategy can read.

    step-00000100/
      weights.safetensors   fp32 masters of the trained weights, by parameter name; what computes is cast from them
      moments.safetensors   the optimiser's running means
      state.json            cursor, counters, seeds, digests
      manifest.json         size and sha256 of the three, written last

Written into a hidden folder, each file fsynced, renamed, and only then named by `latest`. No random state is
stored: every draw is keyed by (seed, step, bin). No pickle.
"""

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import getpid
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipelines import storage
from pipelines.disk_errors import disk_errors
from schemas.errors import SftPipelineError
from schemas.run import MANIFEST_NAME, TEMPORARY_PREFIX, FileEntry

LATEST_NAME = "latest"
WEIGHTS_NAME, MOMENTS_NAME, STATE_NAME = "weights.safetensors", "moments.safetensors", "state.json"
FILE_NAMES = (WEIGHTS_NAME, MOMENTS_NAME, STATE_NAME)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is; `num_steps` optimiser steps are done, skipped ones counted."""

    num_steps: int = 0
    num_updates: int = 0
    num_nonfinite_steps: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None


class _State(BaseModel):
    """state.json."""

    model_config = ConfigDict(extra="forbid")

    progress: Progress
    facts: dict[str, Any]


class _Manifest(BaseModel):
    """manifest.json; another format_version is another format."""

    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1] = 1
    stage: Literal["train"] = "train"
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    progress: Progress
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def write_checkpoint(
    training_folder: Path, checkpoint: Checkpoint, *, facts: dict[str, Any], keep: int
) -> Path:
    """Write one, point `latest` at it, drop all but the newest `keep`. `facts` must be equal to be resumed."""
    final = training_folder / step_name(checkpoint.progress.num_steps)
    with built_aside(final) as temporary:
        _write_files(temporary, checkpoint, facts)
    settle(training_folder, newest=final, keep=keep)
    return final


def settle(training_folder: Path, *, newest: Path, keep: int) -> None:
    """Point `latest` at the newest and drop all but `keep`; a resume does so too, for a run that was killed here."""
    pointer, line = training_folder / LATEST_NAME, f"{newest.name}\n".encode()
    with disk_errors(training_folder):
        if not pointer.exists() or pointer.read_bytes() != line:
            storage.write_bytes(pointer, line)
        _drop_old(training_folder, newest=newest, keep=keep)


def read_newest(
    training_folder: Path, *, facts: dict[str, Any], report: Callable[[str], None]
) -> Checkpoint | None:
    """The newest checkpoint whose every byte is what was written; those that are not are reported."""
    for folder in step_folders(training_folder):
        try:
            return read_checkpoint(folder, facts=facts)
        except (SftPipelineError, SafetensorError, OSError, ValueError) as error:
            report(f"checkpoint {folder.name} can't be used, taking the one before it: {_line(error)}")
    return None


def read_checkpoint(folder: Path, *, facts: dict[str, Any]) -> Checkpoint:
    """Raises IntegrityError when a file is not the one written, ValueError for another training's checkpoint."""
    manifest = _Manifest.model_validate(storage.read_record(folder / MANIFEST_NAME))
    paths = {entry.path: storage.check_file(folder, entry) for entry in manifest.files}
    if set(paths) != set(FILE_NAMES):
        raise ValueError(f"its manifest names {sorted(paths)}, expected {sorted(FILE_NAMES)}")
    state = _State.model_validate(storage.read_json(paths[STATE_NAME]))
    if state.facts != facts:
        raise ValueError("it was written with other settings")
    weights, moments = load_file(paths[WEIGHTS_NAME]), load_file(paths[MOMENTS_NAME])
    return Checkpoint(state.progress, weights, moments)


def step_name(num_steps: int) -> str:
    return f"step-{num_steps:08d}"


def step_folders(training_folder: Path) -> list[Path]:
    """Folders of finished checkpoints, newest first."""
    return sorted(training_folder.glob("step-????????"), reverse=True)


# Folders that appear whole ----------------------------------------------------------------------------------


@contextmanager
def built_aside(final: Path) -> Iterator[Path]:
    """Yield an empty folder beside `final`; when the block ends well it is on the disk under that name.

    Raises StorageError when the disk refuses; what was written is removed then, as far as it lets us.
    """
    temporary = hidden(final)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(final):
            storage.make_folder(temporary)
            yield temporary
            publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def hidden(final: Path) -> Path:
    """The place beside `final` where it is built."""
    return final.with_name(f"{TEMPORARY_PREFIX}{getpid()}-{final.name}")


def publish(temporary: Path, final: Path) -> None:
    """Make a folder durable and give it its name; one that stood there, refused or stale, makes way."""
    for path in sorted(temporary.rglob("*"), reverse=True):
        if path.is_file():
            storage.sync_file(path)
        else:
            storage.sync_folder(path)
    storage.sync_folder(temporary)
    if final.exists():
        _remove(final)
    temporary.rename(final)
    storage.sync_folder(final.parent)


def remove_leftovers(training_folder: Path) -> None:
    """What a killed run was writing. Only under the run root's lock: nobody else writes here."""
    for path in training_folder.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    # Renamed first: a kill in the middle leaves no half folder under a name that counts.
    away = folder.with_name(f"{TEMPORARY_PREFIX}removed-{getpid()}-{folder.name}")
    folder.rename(away)
    shutil.rmtree(away)


def _write_files(folder: Path, checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
    save_file(_on_cpu(checkpoint.weights), folder / WEIGHTS_NAME)
    save_file(_on_cpu(checkpoint.moments), folder / MOMENTS_NAME)
    state = _State(progress=checkpoint.progress, facts=facts)
    storage.write_json(folder / STATE_NAME, state.model_dump(mode="json"))
    manifest = _Manifest(files=tuple(storage.file_entry(folder / name, folder=folder) for name in FILE_NAMES))
    storage.write_record(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _drop_old(training_folder: Path, *, newest: Path, keep: int) -> None:
    # Later ones than the newest were refused on the way here; they are replaced when training passes them.
    older: Iterator[Path] = (folder for folder in step_folders(training_folder) if folder <= newest)
    for folder in itertools.islice(older, keep, None):
        _remove(folder)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
