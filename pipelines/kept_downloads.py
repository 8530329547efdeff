"""Copies of files behind URLs that stay in the run root, so that a file is fetched again only when it has changed.

A copy is taken when the store names the same version of the file as when it was fetched (a strong ETag, a blob's id)
and its bytes are still those that came. Files of stores that name no version are fetched each time.
"""

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.downloads import RemoteFile, download, remote_version
from pipelines.storage import file_sha256, read_record, write_passing_record
from schemas.conversation import blake2b_128
from schemas.errors import InputError, IntegrityError
from schemas.run import TEMPORARY_PREFIX
from schemas.source_config import SourceConfig


@dataclass(frozen=True, slots=True)
class KeptDownloads:
    """A folder of copies, each with a record beside it. Nothing is written into it where it is `read_only`."""

    folder: Path
    read_only: bool = False
    _used: set[str] = field(default_factory=set)

    def fetch(self, file: RemoteFile, spool_path: Path, source: SourceConfig) -> Path:
        """A copy of the file as it is now: the kept one, or a new one, in `spool_path` where it can't be kept."""
        copy = self.folder / f"{source.name}-{blake2b_128(os.fsencode(file.path))}"
        version = remote_version(file, source)
        if version and _is_copy_of(copy, file, version):
            self._used.update((copy.name, _record_path(copy).name))
            return copy
        if not version or self.read_only:
            download(file, spool_path, source)
            return spool_path
        self._used.update((copy.name, _record_path(copy).name))
        _fetch_into(copy, file, source)
        return copy

    def sweep(self) -> None:
        """Remove the copies that were not asked for since this began."""
        if self.folder.is_dir() and not self.read_only:
            for path in self.folder.iterdir():
                if path.name not in self._used:
                    path.unlink()
            if not self._used:
                self.folder.rmdir()


def remove_copies(folder: Path) -> None:
    """What earlier runs kept, once nothing is to be kept any more."""
    shutil.rmtree(folder, ignore_errors=True)


def _record_path(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.json")


def _is_copy_of(copy: Path, file: RemoteFile, version: str) -> bool:
    try:
        record = read_record(_record_path(copy))
    except (InputError, IntegrityError):
        return False  # it is fetched again
    named = {key: record.get(key) for key in ("path", "version")}
    if named != {"path": file.path, "version": version} or not copy.is_file():
        return False
    return copy.stat().st_size == record.get("num_bytes") and file_sha256(copy) == record.get("sha256")


def _fetch_into(copy: Path, file: RemoteFile, source: SourceConfig) -> None:
    """The record goes first and comes last: there is never one beside bytes that it does not name."""
    temporary = copy.with_name(f"{TEMPORARY_PREFIX}{copy.name}")
    _record_path(copy).unlink(missing_ok=True)
    version = download(file, temporary, source)
    os.replace(temporary, copy)
    record = {"path": file.path, "version": version, "num_bytes": copy.stat().st_size}
    # Without fsync, as the copy itself: both are checked before anybody believes them.
    write_passing_record(_record_path(copy), record | {"sha256": file_sha256(copy)})
