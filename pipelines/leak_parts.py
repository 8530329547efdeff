"""The part of stage 4 that looks for benchmark leaks: parts are searched by workers, hits gathered into one report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import leaks
from pipelines.benchmark_files import ITEMS, read_benchmarks
from pipelines.part_files import feature_entry, features_name, write_sidecar
from pipelines.parts import PartTask, StageRun
from pipelines.storage import (
    check_file,
    file_entry,
    json_digest,
    parquet_file,
    read_arrow,
    read_rows,
    write_arrow,
)
from schemas.conversation import Drop
from schemas.pipeline_config import PipelineConfig
from schemas.run import FileEntry, Manifest, PartEntry, first_record

MAX_REPORTED_HITS = 100_000


@dataclass(frozen=True, slots=True)
class FoundLeaks:
    """What run_dedup needs of the search; `drops` is empty where leaks are only reported."""

    drops: Mapping[str, Drop] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


def benchmark_items(config: PipelineConfig) -> pa.Table:
    """All items of all benchmarks; no lines where none is named."""
    return read_benchmarks(config) if config.benchmarks else ITEMS.empty_table()


def items_digest(items: pa.Table) -> str:
    """Digest of what the benchmarks say, wherever their files lie."""
    return json_digest(items.to_pylist())


def leaks_in_parts(run: StageRun, items: pa.Table, digest: str, folder: Path, before: Manifest) -> FoundLeaks:
    """All leaks in the rows of `before`; `digest` is that of the items. Writes benchmarks-*.arrow and leaks-*.parquet, hits with both texts."""
    if not items.num_rows:
        return FoundLeaks()
    items_file = None if run.dry else _write_items(run, items, digest)
    tasks = [
        run.task(
            run.key("leaks", digest, part.kept[0].sha256), part.label, (folder, part.kept[0], items_file)
        )
        for part in before.parts
    ]
    entries = run.run_parts(leaks_part, tasks)
    found = pa.concat_tables([_hits_in_file(run, entry) for entry in entries])
    assert items_file is not None, "a dry run ends before"
    files = (items_file, *(entry.kept[0] for entry in entries), _write_report(run, found, tasks))
    drops = leaks.leak_drops(found) if run.config.dedup.leaks == "drop" else {}
    return FoundLeaks(drops, files, leaks.counts(found, leaks.build_index(items, run.config)))


def _hits_in_file(run: StageRun, entry: PartEntry) -> pa.Table:
    """The hits of a part, with the numbers that their records have in the file."""
    hits = read_arrow(check_file(run.folder, entry.kept[0]))
    records = pc.add(hits["record"], first_record(entry.label))
    return hits.set_column(hits.schema.get_field_index("record"), leaks.LEAKS.field("record"), records)


def leaks_part(task: PartTask) -> PartEntry:
    """Rows -> hits. Payload: (input folder, FileEntry, FileEntry of the items)."""
    folder, file, items_file = task.payload
    found = leaks.find_leaks(read_rows(check_file(folder, file)), _index(task, items_file))
    path = task.folder / features_name(task.key)
    num_rows = write_arrow(path, found)
    entry = feature_entry(task.key, task.label, file_entry(path, folder=task.folder, num_rows=num_rows))
    write_sidecar(task.folder, entry)
    return entry


_indexes: dict[str, leaks.LeakIndex] = {}


def _index(task: PartTask, items_file: FileEntry) -> leaks.LeakIndex:
    """Built once per worker."""
    what = f"{items_file.sha256} {task.config.dedup.model_dump_json()}"
    if what not in _indexes:
        _indexes.clear()
        items = read_arrow(check_file(task.folder, items_file))
        _indexes[what] = leaks.build_index(items, task.config)
    return _indexes[what]


def _write_items(run: StageRun, items: pa.Table, digest: str) -> FileEntry:
    path = run.folder / f"benchmarks-{digest[:32]}.arrow"
    num_rows = write_arrow(path, items)
    return file_entry(path, folder=run.folder, num_rows=num_rows)


def _write_report(run: StageRun, found: pa.Table, tasks: list[PartTask]) -> FileEntry:
    path = run.folder / f"leaks-{run.key('report', [[task.key, task.label] for task in tasks])[:32]}.parquet"
    with parquet_file(path, leaks.LEAKS) as write:
        num_rows = write(found.slice(0, MAX_REPORTED_HITS))
    return file_entry(path, folder=run.folder, num_rows=num_rows)
