"""Checkpoints that are there whole or not at all, and that any strategy on any number of processes can read.

    step-00000100/
      pieces-00001-of-00002.safetensors   fp32 masters of the trained weights and the optimiser's moments, as runs
      pieces-00002-of-00002.safetensors   of numbers: what computes is cast from them. One file a process
      index.json                          shapes, and by kind and name where each run of numbers lies
      state.json                          cursor, counters, seeds
      manifest.json                       size and sha256 of them all, written last

Written into a hidden folder, each file fsynced, renamed, and only then named by `latest`. No random state is
stored: every draw is keyed by (seed, step, bin). No pickle.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError

from pipelines import storage
from pipelines.disk_errors import disk_errors
from schemas.errors import SftPipelineError, TrainingError
from schemas.run import MANIFEST_NAME, FileEntry
from trainer import folders
from trainer.piece_files import Index, MakePieces, Part, PieceFiles, check_covered, index_of, write_pieces
from trainer.pieces import ReadPiece, Shapes
from trainer.ranks import ALONE, Ranks

FORMAT_VERSION = 2
"""1: whole tensors in weights.safetensors and moments.safetensors."""
LATEST_NAME, BEST_NAME = "latest", "best"
INDEX_NAME, STATE_NAME = "index.json", "state.json"
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is; `num_steps` optimiser steps are done, skipped ones counted."""

    num_steps: int = 0
    num_updates: int = 0
    num_nonfinite_steps: int = 0
    num_overflow_steps: int = 0
    """Skipped because the loss was multiplied by too much (trainer/loss_scale.py)."""
    loss_scale: float | None = None
    num_steps_at_scale: int = 0
    num_spike_steps: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None
    validation_token_accuracy: float | None = None
    best_value: float | None = None
    best_step: int | None = None
    num_validations_since_best: int = 0
    recent_losses: tuple[float, ...] = ()
    recent_grad_norms: tuple[float, ...] = ()


class _State(BaseModel):
    """state.json."""

    model_config = ConfigDict(extra="forbid")

    progress: Progress
    facts: dict[str, Any]


class _Manifest(BaseModel):
    """manifest.json; another format_version is another format."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    stage: str = "train"
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """One that was found whole; `read` gives the numbers."""

    folder: Path
    progress: Progress
    facts: dict[str, Any]
    shapes: Shapes
    read: ReadPiece


def step_name(num_steps: int) -> str:
    return f"step-{num_steps:08d}"


def step_folders(training_folder: Path) -> list[Path]:
    """Folders of finished checkpoints, newest first."""
    return sorted(training_folder.glob("step-????????"), reverse=True)


# Writing ----------------------------------------------------------------------------------------------------


def write_part(aside: Path, shapes: Shapes, make_pieces: MakePieces, ranks: Ranks = ALONE) -> None:
    """This rank's numbers into the hidden folder that all share, and a record that they are there."""
    with disk_errors(aside):
        storage.make_folder(aside)
        entry, runs = write_pieces(aside / _part_name(ranks.number, ranks.count, "safetensors"), make_pieces)
    part = Part(file=entry, shapes={name: tuple(shape) for name, shape in shapes.items()}, runs=runs)
    record = aside / _part_name(ranks.number, ranks.count, "json")
    storage.write_record(record, part.model_dump(mode="json"))


def complete(
    aside: Path,
    final: Path,
    progress: Progress,
    *,
    facts: dict[str, Any],
    num_parts: int = 1,
    is_given_up: Callable[[], bool] = lambda: False,
) -> bool:
    """Once all parts are there, publish them as one checkpoint: the first rank alone. False if given up."""
    records = [aside / _part_name(number, num_parts, "json") for number in range(num_parts)]
    while not all(record.exists() for record in records):
        if is_given_up():
            return False
        time.sleep(POLL_SECONDS)
    parts = [Part.model_validate(storage.read_record(record)) for record in records]
    with disk_errors(final):
        storage.write_json(aside / INDEX_NAME, index_of(parts).model_dump(mode="json"))
        state = _State(progress=progress, facts=facts)
        storage.write_json(aside / STATE_NAME, state.model_dump(mode="json"))
        for record in records:
            record.unlink()
        small = (storage.file_entry(aside / name, folder=aside) for name in (INDEX_NAME, STATE_NAME))
        manifest = _Manifest(files=(*(part.file for part in parts), *small))
        storage.write_record(aside / MANIFEST_NAME, manifest.model_dump(mode="json"))
        folders.publish(aside, final)
    return True


def settle(training_folder: Path, *, newest: Path, keep: int, best_step: int | None = None) -> None:
    """Point `latest` at the newest, `best` at the best if one is to be kept, and drop all other ones but `keep`.

    A resume does so too, for a run that was killed here.
    """
    best = training_folder / step_name(best_step) if best_step is not None else None
    with disk_errors(training_folder):
        if best is not None and best.exists():
            _point(training_folder / BEST_NAME, best)
        _point(training_folder / LATEST_NAME, newest)
        _drop_old(training_folder, newest=newest, keep=keep, best=best)


def _point(pointer: Path, folder: Path) -> None:
    line = f"{folder.name}\n".encode()
    if not pointer.exists() or pointer.read_bytes() != line:
        storage.write_bytes(pointer, line)


def _part_name(number: int, count: int, suffix: str) -> str:
    return f"pieces-{number + 1:05d}-of-{count:05d}.{suffix}"


def _drop_old(training_folder: Path, *, newest: Path, keep: int, best: Path | None) -> None:
    # Later ones than the newest were refused on the way here; they are replaced when training passes them.
    older = (folder for folder in step_folders(training_folder) if folder <= newest)
    for folder in itertools.islice(older, keep, None):
        if folder != best:
            folders.remove(folder)


# Reading ----------------------------------------------------------------------------------------------------


def read_newest(
    training_folder: Path, *, facts: dict[str, Any], report: Callable[[str], None], ranks: Ranks = ALONE
) -> Checkpoint | None:
    """The newest checkpoint whose every byte is what was written; those that are not are reported.

    All ranks come to the same answer; each reads a share of the files whole, for their digests. Raises
    TrainingError when another rank can't read what the first one can.
    """
    number = _newest_before(training_folder, None, ranks)
    while number:
        folder = training_folder / step_name(number)
        found, problem = _read(folder, facts, ranks)
        if not ranks.largest(int(found is None)):
            return found
        if ranks.is_first and found is not None:  # another one has read the damaged file
            problem = _read(folder, facts, ALONE)[1]
        if not ranks.largest(int(ranks.is_first and bool(problem))):
            raise TrainingError(
                f"process {ranks.number} of {ranks.count}: {folder} can't be read by one process and can by the "
                f"first one{f': {problem}' if problem else ''}; give all of them the same disk"
            )
        if ranks.is_first:
            report(f"checkpoint {folder.name} can't be used, taking the one before it: {problem}")
        number = _newest_before(training_folder, folder.name, ranks)
    return None


def read_checkpoint(folder: Path, *, facts: dict[str, Any] | None, ranks: Ranks = ALONE) -> Checkpoint:
    """Raises IntegrityError when a file is not the one written, ValueError for another training's checkpoint.

    Of the pieces a rank checks its share alone.
    """
    record = storage.read_record(folder / MANIFEST_NAME)
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"it has format_version {record.get('format_version')!r}, this version reads {FORMAT_VERSION}"
        )
    manifest = _Manifest.model_validate(record)
    entries = {entry.path: entry for entry in manifest.files}
    pieces = [name for name in entries if name not in (INDEX_NAME, STATE_NAME)]
    for name in (INDEX_NAME, STATE_NAME, *pieces[ranks.number :: ranks.count]):
        if name not in entries:
            raise ValueError(f"its manifest names {sorted(entries)}, expected {name} among them")
        storage.check_file(folder, entries[name])
    state = _State.model_validate(storage.read_json(folder / STATE_NAME))
    if facts is not None and state.facts != facts:
        raise ValueError("it was written with other settings")
    index = Index.model_validate(storage.read_json(folder / INDEX_NAME))
    check_covered(index)
    if unknown := sorted(_files_of(index) - set(pieces)):  # a rank may have nothing to write
        raise ValueError(f"its index names {unknown[0]}, its manifest only {sorted(pieces)}")
    files = PieceFiles(folder, index)
    return Checkpoint(folder, state.progress, state.facts, files.shapes, files.read)


def read_agreed(folder: Path, *, facts: dict[str, Any], ranks: Ranks) -> Checkpoint:
    """One that is named; all ranks read it or all raise TrainingError."""
    found, problem = _read(folder, facts, ranks)
    if ranks.largest(int(found is None)) or found is None:
        raise TrainingError(
            f"{folder} can't be used: {problem or 'another process can not read it'}; delete it, and "
            "run the same command again"
        )
    return found


def _read(folder: Path, facts: dict[str, Any], ranks: Ranks) -> tuple[Checkpoint | None, str]:
    try:
        return read_checkpoint(folder, facts=facts, ranks=ranks), ""
    except (SftPipelineError, SafetensorError, OSError, ValueError) as error:
        return None, " ".join(str(error).split()) or type(error).__name__


def _files_of(index: Index) -> set[str]:
    return {run.file for tensors in index.runs.values() for runs in tensors.values() for run in runs}


def _newest_before(training_folder: Path, name: str | None, ranks: Ranks) -> int:
    """Steps of the newest checkpoint, before that one if one is named, that any rank sees; 0: there is none."""
    names = (folder.name for folder in step_folders(training_folder))
    newest = next((found for found in names if name is None or found < name), step_name(0))
    return ranks.largest(int(newest.removeprefix("step-")))
