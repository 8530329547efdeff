"""Folders that appear whole or not at all: built under a hidden name beside their own, then renamed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import getpid
from pathlib import Path

from pipelines import storage
from pipelines.disk_errors import disk_errors
from schemas.run import TEMPORARY_PREFIX


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


def hidden(final: Path, *, owner: int | None = None) -> Path:
    """The place beside `final` where it is built, by this process or by a group with an agreed number."""
    return final.with_name(f"{TEMPORARY_PREFIX}{getpid() if owner is None else owner}-{final.name}")


def publish(temporary: Path, final: Path) -> None:
    """Make a folder durable and give it its name; one that stood there, refused or stale, makes way."""
    for path in sorted(temporary.rglob("*"), reverse=True):
        if path.is_file():
            storage.sync_file(path)
        else:
            storage.sync_folder(path)
    storage.sync_folder(temporary)
    if final.exists():
        remove(final)
    temporary.rename(final)
    storage.sync_folder(final.parent)


def remove(folder: Path) -> None:
    """Remove a folder whose name counts. Renamed first: a kill in the middle leaves no half folder under it."""
    away = folder.with_name(f"{TEMPORARY_PREFIX}removed-{getpid()}-{folder.name}")
    folder.rename(away)
    shutil.rmtree(away)


def remove_leftovers(training_folder: Path) -> None:
    """What a killed run was writing. Only under the run root's lock: nobody else writes here."""
    for path in training_folder.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
