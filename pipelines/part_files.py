"""The files of a stage's folder: which a manifest names, how a finished part says so before there is one, what is swept."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from pipelines.storage import check_file, read_record, write_passing_record
from schemas.errors import IntegrityError
from schemas.run import MANIFEST_NAME, TEMPORARY_PREFIX, TIMING_NAME, FileEntry, Manifest, PartEntry


def all_files(manifest: Manifest) -> Iterable[FileEntry]:
    """Every file that a manifest names."""
    for part in manifest.parts:
        yield from part.kept
        if part.dropped is not None:
            yield part.dropped
    yield from manifest.files


def side_files(entry: PartEntry, side: str) -> list[FileEntry]:
    """The files of one side of the hold-out."""
    return [file for file in entry.kept if file.path.startswith(f"{side}/")]


def features_name(key: str) -> str:
    """Where a part's features lie in the stage's folder."""
    return f"features/{key[:32]}.arrow"


def feature_entry(key: str, label: str, file: FileEntry) -> PartEntry:
    """Features as a part: taken over from the manifest's files by their name."""
    rows = file.num_rows
    return PartEntry(
        key=key, label=label, kept=(file,), dropped=None, num_rows_in=rows, num_rows_out=rows, drops={}
    )


def sidecar_path(folder: Path, key: str) -> Path:
    """Where a finished part says so until the manifest does."""
    return folder / f".entry-{key[:32]}.json"


def write_sidecar(folder: Path, entry: PartEntry) -> None:
    """The last write of a part. Without fsync: the files that it names are checked before anybody believes it."""
    write_passing_record(sidecar_path(folder, entry.key), entry.model_dump(mode="json"))


def read_sidecar(folder: Path, key: str) -> PartEntry | None:
    """The entry of a part that was finished by a run which ended before its manifest; None for a damaged one."""
    path = sidecar_path(folder, key)
    try:
        return PartEntry.model_validate(read_record(path)) if path.exists() else None
    except (IntegrityError, ValidationError):
        return None  # the part is made again


def is_whole(folder: Path, entry: PartEntry) -> bool:
    """Whether all files of a part are on the disk as they were written."""
    files = (*entry.kept, entry.dropped) if entry.dropped is not None else entry.kept
    try:
        for file in files:
            check_file(folder, file)
    except IntegrityError:
        return False
    return True


def sweep(folder: Path, manifest: Manifest) -> None:
    """Remove everything in a finished folder that its manifest does not name."""
    named = {entry.path for entry in all_files(manifest)} | {MANIFEST_NAME, TIMING_NAME}
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in named:
            path.unlink(missing_ok=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove what a killed run left half-written; the caller holds the run root."""
    for path in folder.rglob(f"{TEMPORARY_PREFIX}*"):
        path.unlink(missing_ok=True)
