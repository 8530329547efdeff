"""The files behind a source: a file, a folder or a glob, in an order that hangs on their names alone."""

import glob
import os
from pathlib import Path

from schemas.errors import InputError
from schemas.pipeline_config import SourceConfig

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")
"""What a folder or glob is searched for, also with .gz or .zst behind it."""


def find_files(
    source: SourceConfig, *, base_folder: Path = Path()
) -> tuple[list[tuple[str, Path]], list[str]]:
    """(label, path) of a source's files in the order of their labels, and notes on what was ignored.

    A label is the file's path inside the source: inside the folder, or inside the part of a glob without wildcards.
    """
    path = base_folder / source.path
    if path.is_file():
        return [(path.name, path)], []
    root, found = (path, _walk(path)) if path.is_dir() else _glob(path)
    labelled = sorted((file.relative_to(root).as_posix(), file) for file in found)
    known = [(label, file) for label, file in labelled if _has_known_suffix(label)]
    if not known:
        wanted = ", ".join(SUFFIXES)
        what = f"{len(labelled)} files of other kinds" if labelled else "nothing"
        raise InputError(f"source {source.name}: found {what} at {path}, expected files {wanted} (.gz, .zst)")
    ignored = [label for label, _ in labelled if not _has_known_suffix(label)]
    notes = [f"source {source.name}: ignored {len(ignored)} files, such as {ignored[0]}"] if ignored else []
    return known, notes


def _walk(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _glob(pattern: Path) -> tuple[Path, list[Path]]:
    parts = pattern.parts
    num_fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    found = (Path(name) for name in glob.glob(str(pattern), recursive=True))
    return Path(*parts[:num_fixed]), [path for path in found if path.is_file()]


def _has_known_suffix(label: str) -> bool:
    return label.lower().removesuffix(".gz").removesuffix(".zst").endswith(SUFFIXES)
