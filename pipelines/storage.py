"""Bytes on disk: durable writes, digests, rows as Parquet, manifests.

Each file is written aside, flushed, fsynced and renamed, and its folder fsynced; only then may a manifest name it.
Without the first fsync a power cut leaves a synced manifest over a part of 0 bytes (ext4 and xfs, measured).
Parts leave the fsync of their folder to the manifest's writer, which needs one for all of them.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from pipelines.disk_errors import disk_errors, is_disk_error, storage_error
from pipelines.row_columns import drops_table, rows_of, rows_table
from pipelines.sealed import json_bytes, sealed, unsealed
from schemas.conversation import Conversation, Drop
from schemas.dataset import DROPS, ROWS
from schemas.errors import InputError, IntegrityError
from schemas.run import FORMAT_VERSION, MANIFEST_NAME, TEMPORARY_PREFIX, FileEntry, Manifest

ROWS_PER_GROUP = 4096
Item = TypeVar("Item")

# Durable writes ---------------------------------------------------------------------------------------------


@contextmanager
def durable_file(path: Path, *, sync_bytes: bool = True, sync_name: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is on the disk under its final name.

    Without `sync_name` a power cut may take the name back, until somebody calls `sync_folder`; without `sync_bytes`
    the file may be there without its bytes.
    When the block raises, the temporary file is removed and `path` is what it was; after a failure of the very last
    step, the folder's fsync, `path` is the new file. Raises StorageError when the disk refuses.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        make_folder(path.parent)
        yield temporary
        if sync_bytes:
            sync_file(temporary)
        os.replace(temporary, path)
        if sync_name:
            sync_folder(path.parent)
    except Exception as error:
        num_bytes = _discard(temporary)
        if not is_disk_error(error):
            raise
        raise storage_error(error, str(path), num_bytes=num_bytes) from error
    except BaseException:
        _discard(temporary)
        raise


def make_folder(folder: Path) -> None:
    """mkdir -p, with the new names on the disk too."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _discard(temporary: Path) -> int:
    """Remove what was written aside, if the disk lets us; else the next run will. Its size."""
    with suppress(OSError):
        num_bytes = temporary.stat().st_size
        temporary.unlink()
        return num_bytes
    return 0


def sync_file(path: Path) -> None:
    """fsync a closed file. A failure is never retried: the kernel reports it once and forgets the pages."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable: without it a power cut may bring the old name back.

    Raises StorageError when the disk refuses.
    """
    with disk_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Durably replace `path` by `data`."""
    with durable_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Durably replace `path` by JSON with sorted keys: equal values give equal bytes."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Raises InputError when absent and IntegrityError when it is not JSON."""
    try:
        return json.loads(_read_bytes(path))
    except ValueError as error:
        raise IntegrityError(f"{path} is not valid JSON ({error}); delete it and run again") from None


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Durably replace `path` by a JSON record that carries its own digest: see pipelines/sealed.py."""
    write_bytes(path, sealed(record))


def write_passing_record(path: Path, record: Mapping[str, Any]) -> None:
    """As write_record, for what may be lost by a power cut, or be there without its bytes: read_record finds out."""
    with durable_file(path, sync_bytes=False, sync_name=False) as temporary:
        temporary.write_bytes(sealed(record))


def read_record(path: Path, *, cure: str = "delete it and run again") -> dict[str, Any]:
    """What write_record wrote, byte for byte. Raises InputError when absent, IntegrityError when it is anything else."""
    return unsealed(_read_bytes(path), path, cure=cure)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise storage_error(error, str(path)) from error


# Digests ----------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """sha256 as hex; about 2 GB/s."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def file_entry(path: Path, *, folder: Path, num_rows: int = 0) -> FileEntry:
    """What a manifest says of a file that was just written."""
    return FileEntry(
        path=path.relative_to(folder).as_posix(),
        num_bytes=path.stat().st_size,
        sha256=file_sha256(path),
        num_rows=num_rows,
    )


_checked: set[tuple[str, int, int, int, int, str]] = set()


def check_file(folder: Path, entry: FileEntry, *, cure: str = "delete it and run its stage again") -> Path:
    """The path of an entry, once its size and sha256 are the manifest's.

    Checked once per process and file state: Arrow streams cut at a message border read short without an
    error, and one flipped bit reads as other data in every format of ours.
    """
    path = folder / entry.path
    try:
        status = path.stat()
    except FileNotFoundError:
        raise IntegrityError(f"{path} is named by its manifest but missing; {cure}") from None
    seen = (str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, entry.sha256)
    if seen in _checked:
        return path
    if status.st_size != entry.num_bytes or file_sha256(path) != entry.sha256:
        raise IntegrityError(
            f"{path} ({status.st_size} bytes) is not the file its manifest names "
            f"({entry.num_bytes} bytes, sha256 {entry.sha256[:12]}...); {cure}"
        )
    _checked.add(seen)
    return path


# Rows as Parquet --------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Conversation]) -> int:
    """Durably write rows; returns how many. Bytes depend on the rows alone."""
    with parquet_file(path, ROWS) as write:
        return sum(write(rows_table(group)) for group in _groups(rows, ROWS_PER_GROUP))


def write_drops(path: Path, drops: Iterable[tuple[Conversation, Drop]], *, stage: str) -> int:
    """Durably write dropped rows, each as it was when it left, with its reason."""
    with parquet_file(path, DROPS) as write:
        return sum(write(drops_table(group, stage=stage)) for group in _groups(drops, ROWS_PER_GROUP))


def read_rows(path: Path) -> Iterator[Conversation]:
    """Rows of a part in order; page checksums are verified on the way."""
    with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
        for batch in parquet.iter_batches(batch_size=1024, columns=ROWS.names):
            yield from rows_of(batch)


def read_metas(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Row ids and meta of a part, in order, without its messages."""
    table = pq.read_table(path, columns=["row_id", "meta"], page_checksum_verification=True)
    return table["row_id"].to_pylist(), [json.loads(meta) for meta in table["meta"].to_pylist()]


@contextmanager
def parquet_file(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], int]]:
    """A part as Parquet with page checksums; the yielded function appends a table and returns its rows."""
    with (
        durable_file(path, sync_name=False) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):

        def write(table: pa.Table) -> int:
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
            return int(table.num_rows)

        yield write


def read_table(path: Path) -> pa.Table:
    """A whole part as a table, page checksums verified."""
    return pq.read_table(path, page_checksum_verification=True)


def write_arrow(path: Path, table: pa.Table, *, is_part: bool = True) -> int:
    """Durable Arrow IPC stream of a table, but for the name of a part; returns its rows."""
    with (
        durable_file(path, sync_name=not is_part) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    return int(table.num_rows)


def read_arrow(path: Path) -> pa.Table:
    """An Arrow IPC stream, memory-mapped. The caller has checked its digest: a cut stream reads short."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all()


def _groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


# Manifests --------------------------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last write of a stage: from now on the folder exists."""
    write_record(folder / MANIFEST_NAME, manifest.model_dump(mode="json"))


def read_manifest(folder: Path, name: str = MANIFEST_NAME) -> Manifest | None:
    """None when the folder was never finished. Raises IntegrityError for one that is not as it was written."""
    path = folder / name
    if not path.exists():
        return None
    record = read_record(path)
    found = record.get("format_version")
    if found != FORMAT_VERSION:
        raise IntegrityError(
            f"{path} has format_version {found!r}, this version reads {FORMAT_VERSION}; use a new run_root"
        )
    try:
        return Manifest.model_validate(record)
    except ValidationError as error:
        raise IntegrityError(
            f"{path} is not a manifest ({error.error_count()} wrong fields); delete it"
        ) from error


def check_manifest(folder: Path, *, stage: str) -> Manifest:
    """The manifest that a later stage needs. Raises InputError naming the stage to run first."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} is not finished: run the stage {stage!r} first")
    return manifest
