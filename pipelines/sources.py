"""The files behind a source: a file, a folder or a glob, in an order that hangs on their names alone."""

import glob
import os
from pathlib import Path
from typing import Any

import orjson

from schemas.errors import InputError
from schemas.source_config import SourceConfig

SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".zip")
"""What a folder or glob is searched for, also with the suffix of a compression behind it."""
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".tex", ".rst")
"""Searched for too where the source says that its files are texts: folders of dumps have readmes beside them."""
_MAX_STATE_BYTES = 16 << 20


def find_files(
    source: SourceConfig, *, base_folder: Path = Path()
) -> tuple[list[tuple[str, Path]], list[str]]:
    """(label, path) of a source's files in the order of their labels, and notes on what was ignored.

    A label is the file's path inside the source: inside the folder, or inside the part of a glob without wildcards.
    """
    path = base_folder / source.path
    if path.is_file():
        return [(path.name, path)], []
    root, found = (path, files_below(path)) if path.is_dir() else _glob(path)
    labelled = sorted((file.relative_to(root).as_posix(), file) for file in found)
    known = [(label, file) for label, file in labelled if has_known_suffix(label, source)]
    if not known:
        raise nothing_found(source, str(path), len(labelled))
    return known, ignored_note(source, [name for name, _ in labelled if not has_known_suffix(name, source)])


def nothing_found(source: SourceConfig, where: str, num_others: int) -> InputError:
    """The error of a source without a file that is read."""
    wanted = ", ".join(_suffixes(source))
    what = f"{num_others} files of other kinds" if num_others else "nothing"
    packed = ", ".join(COMPRESSED_SUFFIXES)
    return InputError(f"source {source.name}: found {what} at {where}, expected files {wanted} ({packed})")


def ignored_note(source: SourceConfig, ignored: list[str]) -> list[str]:
    """What a person should hear of files that are not read."""
    return [f"source {source.name}: ignored {len(ignored)} files, such as {ignored[0]}"] if ignored else []


def is_dump(name: str) -> bool:
    """Whether a file is read by its name, whatever its source says."""
    return unpacked_name(name).endswith(SUFFIXES)


def unpacked_name(name: str) -> str:
    """In lower case, without the suffix of a compression."""
    for suffix in COMPRESSED_SUFFIXES:
        name = name.lower().removesuffix(suffix)
    return name


def files_below(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, and what `datasets` puts beside its data."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in _data_files(Path(parent), files) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _data_files(folder: Path, files: list[str]) -> list[str]:
    """All files, but of a folder that `datasets` saved only those that it names itself: no caches, no indexes."""
    if {"state.json", "dataset_info.json"} <= set(files):
        named = _read_state(folder / "state.json").get("_data_files")
        entries = named if isinstance(named, list) else []
        names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
        return [name for name in files if name in names]
    return [name for name in files if name not in ("dataset_dict.json", "dataset_infos.json")]


def _read_state(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_STATE_BYTES:
        return {}
    try:
        state = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError:
        return {}
    return state if isinstance(state, dict) else {}


def _glob(pattern: Path) -> tuple[Path, list[Path]]:
    parts = pattern.parts
    num_fixed = next((n for n, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    found = (Path(name) for name in glob.glob(str(pattern), recursive=True))
    return Path(*parts[:num_fixed]), [path for path in found if path.is_file()]


def has_known_suffix(label: str, source: SourceConfig) -> bool:
    """Whether a file of a folder or an archive is read, by its name."""
    return unpacked_name(label).endswith(_suffixes(source))


def _suffixes(source: SourceConfig) -> tuple[str, ...]:
    is_text = source.format == "text" or source.container in ("text", "text_lines")
    return SUFFIXES + TEXT_SUFFIXES if is_text else SUFFIXES
