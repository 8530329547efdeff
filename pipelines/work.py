"""What a worker does with one part: read it, run the stage's pure function, write what is kept and dropped."""

import hashlib
import importlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.part_files import feature_entry, features_name, write_sidecar
from pipelines.parts import PartTask
from pipelines.storage import (
    check_file,
    durable_file,
    file_entry,
    parquet_file,
    read_arrow,
    read_metas,
    read_rows,
    read_table,
    write_arrow,
    write_drops,
    write_rows,
)
from schemas.conversation import Conversation, Drop
from schemas.dataset import DROPS, ROWS, SPLITS
from schemas.errors import WorkerError
from schemas.run import FileEntry, PartEntry, first_record

Dropped = list[tuple[Conversation, Drop]]


def merge_part(task: PartTask) -> PartEntry:
    """Raw records -> rows. Payload: (PartRange, ordinal offsets)."""
    from pipelines import merge

    part, offsets = task.payload
    dropped: Dropped = []
    rows = _sift(merge.read_part(part, task.config, ordinal_offsets=offsets), dropped)
    return _write_part(task, rows, dropped, num_rows_in=part.num_records)


def step_part(task: PartTask) -> PartEntry:
    """Rows -> rows by the stage's row step. Payload: (input folder, FileEntry)."""
    folder, entry = task.payload
    step = prepared(task)
    dropped: Dropped = []
    rows = _sift(((row, _apply(step, row, task)) for row in read_rows(check_file(folder, entry))), dropped)
    return _write_part(task, rows, dropped)


def features_part(task: PartTask) -> PartEntry:
    """Rows -> the table that the stage decides by. Payload: (input folder, FileEntry)."""
    folder, file = task.payload
    module = importlib.import_module(f"pipelines.{task.stage}")
    return _write_features(task, module.features(read_rows(check_file(folder, file)), task.config))


def holdout_features_part(task: PartTask) -> PartEntry:
    """The same for stage 5, out of what stage 4 knows. Payload: (folder of stage 4, FileEntry, its features)."""
    from pipelines import holdout

    folder, file, dedup_file = task.payload
    path = check_file(folder, file)
    dedup = read_arrow(check_file(folder, dedup_file))
    table = holdout.features_by_dedup(*read_metas(path), dedup, task.config)
    return _write_features(task, holdout.features(read_rows(path), task.config) if table is None else table)


def _write_features(task: PartTask, table: pa.Table) -> PartEntry:
    path = task.folder / features_name(task.key)
    num_rows = write_arrow(path, table)
    entry = feature_entry(task.key, task.label, file_entry(path, folder=task.folder, num_rows=num_rows))
    write_sidecar(task.folder, entry)
    return entry


def verdict_part(task: PartTask) -> PartEntry:
    """Rows -> sides and drops. Payload: (input folder, FileEntry, sides, packed_drops).

    `sides` is None (all stay) or for each row its place in SPLITS, below 0 where dropped; no row is parsed on the way.
    """
    folder, entry, sides, packed = task.payload
    path, drops = check_file(folder, entry), _unpacked_drops(packed)
    if not drops and (sides is None or (len(sides) and sides[0] >= 0 and (sides == sides[0]).all())):
        kept_whole = (_copied(task, path, entry, "" if sides is None else SPLITS[sides[0]]),)
        return _entry(task, kept_whole, None, entry.num_rows, {})
    table = read_table(path)
    kept = tuple(
        _write_table(task, side, _on_side(table, sides, drops, side))
        for side in ([""] if sides is None else SPLITS)
    )
    dropped = _write_dropped(task, table, drops)
    # Without sides a part has one file, also where every row of it was dropped.
    files = tuple(file for file in kept if file.num_rows or sides is None)
    return _entry(task, files, dropped, table.num_rows, Counter(drop.reason for drop in drops.values()))


def packed_drops(drops: Mapping[int, Drop]) -> pa.Table:
    """Drops by row number as columns: tasks of millions of them wait at the same time."""
    rows = sorted(drops)
    columns = {
        "row": pa.array(rows, pa.int64()),
        "reason": pa.array([drops[row].reason for row in rows], pa.large_string()),
        "detail": pa.array([drops[row].detail for row in rows], pa.large_string()),
        "survivor": pa.array([drops[row].survivor for row in rows], pa.large_string()),
    }
    return pa.table(columns)


def _unpacked_drops(packed: pa.Table) -> dict[int, Drop]:
    names = ("row", "reason", "detail", "survivor")
    lines = zip(*(packed[name].to_pylist() for name in names), strict=True)
    return {row: Drop(reason, detail, survivor) for row, reason, detail, survivor in lines}


def split_part(task: PartTask) -> PartEntry:
    """Rows of one side -> examples. Payload: (input folder, FileEntry, side, entry of the part before or None)."""
    from pipelines.split_results import known_results, result_key, write_results

    folder, entry, side, before = task.payload
    rows = list(read_rows(check_file(folder, entry)))
    keys = [result_key(row) for row in rows]
    results = known_results(task.folder, before)
    new = {key: row for key, row in zip(keys, rows, strict=True) if key not in results}
    if new:
        step = prepared(task).proved_on(list(new.values()))  # type: ignore[attr-defined]
        results |= {key: _apply(step, row, task) for key, row in new.items()}
    in_order = [results[key] for key in keys]
    kept = write_results(task.folder, f"{side}-{task.key[:32]}", keys, in_order)
    dropped = [(row, found) for row, found in zip(rows, in_order, strict=True) if isinstance(found, Drop)]
    counts: Counter[str] = Counter()
    for result in in_order:
        counts.update({} if isinstance(result, Drop) else result.counts)
    return _entry(
        task,
        kept,
        _dropped_file(task, dropped),
        len(rows),
        Counter(drop.reason for _, drop in dropped),
        num_pieces_cut=kept[0].num_rows - (len(rows) - len(dropped)),
        counts=dict(counts),
    )


def prepared(task: PartTask) -> Callable[[Conversation], Any]:
    """The stage's row step, prepared once per worker: it may hold a language model or a tokenizer."""
    what = (task.stage, task.config.model_dump_json())
    if what not in _prepared:
        _prepared.clear()
        _prepared[what] = importlib.import_module(f"pipelines.{task.stage}").prepare(task.config)
    return _prepared[what]


_prepared: dict[tuple[str, str], Callable[[Conversation], Any]] = {}


def _apply(step: Callable[[Conversation], Any], row: Conversation, task: PartTask) -> Any:
    try:
        return step(row)
    except Exception as error:
        place = f"{row.source} record {first_record(task.label) + row.record}"
        raise WorkerError(
            f"{task.stage}: row {row.row_id} ({place}): {type(error).__name__}: {error}"
        ) from error


def _sift(
    results: Iterable[tuple[Conversation, Conversation | Drop | None]], dropped: Dropped
) -> Iterable[Conversation]:
    for row, result in results:
        if isinstance(result, Drop):
            dropped.append((row, result))
        else:
            yield row if result is None else result


def _write_part(
    task: PartTask, rows: Iterable[Conversation], dropped: Dropped, *, num_rows_in: int | None = None
) -> PartEntry:
    """`num_rows_in` where it is not what comes out: a record of a tree is a row for each of its chats."""
    repairs: Counter[str] = Counter()
    path = task.folder / f"part-{task.key[:32]}.parquet"
    num_rows = write_rows(path, _counted(rows, repairs))
    kept = file_entry(path, folder=task.folder, num_rows=num_rows)
    drops = Counter(drop.reason for _, drop in dropped)
    num_rows_found = num_rows + len(dropped)
    num_rows_in = num_rows_found if num_rows_in is None else num_rows_in
    return _entry(
        task,
        (kept,),
        _dropped_file(task, dropped),
        num_rows_in,
        drops,
        num_pieces_cut=num_rows_found - num_rows_in,
        counts=dict(repairs),
    )


def _counted(rows: Iterable[Conversation], repairs: Counter[str]) -> Iterable[Conversation]:
    for row in rows:
        repairs.update(row.meta.get("repairs", {}))
        yield row


def _dropped_file(task: PartTask, dropped: Dropped) -> FileEntry | None:
    if not dropped:
        return None
    path = task.folder / f"dropped-{task.key[:32]}.parquet"
    return file_entry(path, folder=task.folder, num_rows=write_drops(path, dropped, stage=task.stage))


def _entry(
    task: PartTask,
    kept: tuple[FileEntry, ...],
    dropped: FileEntry | None,
    num_rows_in: int,
    drops: Mapping[str, int],
    *,
    num_pieces_cut: int = 0,
    counts: dict[str, int] | None = None,
) -> PartEntry:
    entry = PartEntry(
        key=task.key,
        label=task.label,
        kept=kept,
        dropped=dropped,
        num_rows_in=num_rows_in,
        num_rows_out=sum(file.num_rows for file in kept),
        num_pieces_cut=num_pieces_cut,
        drops=dict(sorted(drops.items())),
        counts=dict(sorted((counts or {}).items())),
    )
    write_sidecar(task.folder, entry)
    return entry


def _on_side(
    table: pa.Table, sides: npt.NDArray[np.int8] | None, drops: Mapping[int, Drop], side: str
) -> pa.Table:
    keep = np.ones(table.num_rows, bool) if sides is None else sides == SPLITS.index(side)
    keep[list(drops)] = False
    return table.filter(pa.array(keep))


def _copied(task: PartTask, path: Path, entry: FileEntry, side: str) -> FileEntry:
    """A part of which every row stays: the bytes that writing its rows again would give."""
    copy = task.folder / side / f"part-{task.key[:32]}.parquet"
    with durable_file(copy, sync_name=False) as temporary:
        shutil.copyfile(path, temporary)
    return entry.model_copy(update={"path": copy.relative_to(task.folder).as_posix()})


def _write_table(task: PartTask, side: str, table: pa.Table) -> FileEntry:
    path = task.folder / side / f"part-{task.key[:32]}.parquet"
    if side and not table.num_rows:
        return FileEntry(path=path.relative_to(task.folder).as_posix(), num_bytes=0, sha256="", num_rows=0)
    with parquet_file(path, ROWS) as write:
        write(table.select(ROWS.names).cast(ROWS))
    return file_entry(path, folder=task.folder, num_rows=table.num_rows)


def _write_dropped(task: PartTask, table: pa.Table, drops: Mapping[int, Drop]) -> FileEntry | None:
    if not drops:
        return None
    rows = sorted(drops)
    taken = table.select(ROWS.names).take(pa.array(rows, pa.int64()))
    columns = {
        "stage": [task.stage] * len(rows),
        "reason": [drops[row].reason for row in rows],
        "detail": [drops[row].detail for row in rows],
        "survivor": [drops[row].survivor for row in rows],
    }
    for name, values in columns.items():
        taken = taken.append_column(name, pa.array(values, pa.large_string()))
    path = task.folder / f"dropped-{task.key[:32]}.parquet"
    with parquet_file(path, DROPS) as write:
        num_rows = write(taken.cast(DROPS))
    return file_entry(path, folder=task.folder, num_rows=num_rows)


def rows_digest(values: Iterable[object]) -> str:
    """Digest of verdicts on one part's rows, in row order."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(repr(value).encode() + b"\n")
    return digest.hexdigest()


def row_ids(folder: Path, entry: FileEntry) -> list[str]:
    """The row ids of a written part."""
    table = read_table(check_file(folder, entry))
    return [str(value) for value in pc.cast(table["row_id"], pa.string()).to_pylist()]
