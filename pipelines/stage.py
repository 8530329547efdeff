"""The stages 1-7 in the order of the journey. Each driver reads one folder and writes the next.

A driver lists parts, names by a key what shapes each one's bytes, has the missing ones worked on, and finishes
with the manifest. Stage modules hold pure functions; pipelines/parts.py and pipelines/work.py do the rest.
"""

import importlib
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipelines.parts import (
    PartsToRun,
    PartTask,
    Progress,
    StageResult,
    StageRun,
    remove_temporary_files,
)
from pipelines.storage import (
    check_file,
    check_manifest,
    file_entry,
    file_sha256,
    json_digest,
    parquet_file,
    read_arrow,
    read_manifest,
    read_table,
    write_arrow,
    write_bytes,
)
from pipelines.work import (
    features_part,
    merge_part,
    row_ids,
    rows_digest,
    split_part,
    step_part,
    verdict_part,
)
from schemas.conversation import Drop
from schemas.dataset import SPLITS
from schemas.errors import InputError
from schemas.pipeline_config import PipelineConfig
from schemas.run import HOLDOUT_LEDGER_NAME, STAGE_FOLDERS, FileEntry, Manifest, PartEntry

if TYPE_CHECKING:
    from pipelines.containers import PartRange

# The config sections that shape a stage's bytes; others may change without making it run again.
SECTIONS: dict[str, tuple[str, ...]] = {
    "merge": ("merge",),
    "clean": ("clean",),
    "filter": ("filter",),
    "dedup": ("dedup",),
    "holdout": ("holdout",),
    "split": ("split",),
    "pack": ("pack",),
}


def run_stage(name: str, config: PipelineConfig, *, progress: Progress | None = None) -> StageResult:
    """Run one stage, or find that nothing has changed. The caller holds the run root.

    Raises InputError (stage before is missing), LimitError, IntegrityError, WorkerError.
    """
    run, module = _stage_run(name, config, progress)
    remove_temporary_files(run.folder)
    return _DRIVERS[name](run, module)


def plan_stages(names: Sequence[str], config: PipelineConfig) -> Iterator[tuple[str, str]]:
    """For each stage, whether it would run and why. Writes nothing in the run root."""
    changed = ""
    for name in names:
        if changed:
            yield name, f"runs: {changed} changes"
            continue
        text = _plan_stage(name, config)
        changed = "" if text == UNCHANGED else name
        yield name, text


UNCHANGED = "unchanged, would be skipped"


def _plan_stage(name: str, config: PipelineConfig) -> str:
    run, module = _stage_run(name, config)
    run.dry = True
    try:
        _DRIVERS[name](run, module)
    except PartsToRun as plan:
        return f"runs: {plan.num_parts_to_run} parts changed or new, {plan.num_parts_reused} taken over"
    except InputError as error:
        return f"can't be planned: {error}"
    return UNCHANGED


def _stage_run(
    name: str, config: PipelineConfig, progress: Progress | None = None
) -> tuple[StageRun, ModuleType]:
    module = importlib.import_module(f"pipelines.{name}")
    sections = {section: getattr(config, section).model_dump(mode="json") for section in SECTIONS[name]}
    return StageRun(name, config, module.STAGE_VERSION, sections, module.versions(config), progress), module


def _merge(run: StageRun, module: ModuleType) -> StageResult:
    config = run.config
    # A dry run writes nothing into the run root.
    spool = Path(tempfile.mkdtemp()) if run.dry else config.run_root / ".spool"
    try:
        sources = sorted(config.sources, key=lambda source: source.name)
        parts = [
            part
            for source in sources
            for part in module.plan_parts(source, config=config, spool_folder=spool)
        ]
        inputs = _merge_inputs(parts)
        key = run.key(inputs, [source.model_dump(exclude={"path"}) for source in sources])
        if (result := run.skip(key)) is not None:
            return result
        entries = run.run_parts(merge_part, [_merge_task(run, part, {}) for part in parts])
        return run.finish(key, _renumber(run, module, parts, entries), inputs=inputs)
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def _merge_inputs(parts: Sequence["PartRange"]) -> dict[str, str]:
    digests: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        digests[f"{part.source_name}/{part.file}"].append(part.digest)
    return {file: json_digest(digest) for file, digest in digests.items()}


def _merge_task(run: StageRun, part: "PartRange", offsets: dict[str, int]) -> PartTask:
    source = next(s for s in run.config.sources if s.name == part.source_name)
    identity = [part.file, part.first_record, part.num_records, part.digest, sorted(offsets.items())]
    key = run.key(source.model_dump(exclude={"path"}), identity)
    label = f"{part.source_name}/{part.file}:{part.first_record}"
    return PartTask(run.name, run.config, run.folder, key, label, (part, offsets))


def _renumber(
    run: StageRun, module: ModuleType, parts: Sequence["PartRange"], entries: list[PartEntry]
) -> list[PartEntry]:
    """Equal records in several parts of one file: the later parts count on where the earlier ended."""
    files: dict[str, list[int]] = defaultdict(list)
    for number, part in enumerate(parts):
        files[f"{part.source_name}/{part.file}"].append(number)
    todo: dict[int, dict[str, int]] = {}
    for numbers in files.values():
        if len(numbers) > 1:
            ids = [_ids_of(run, entries[number]) for number in numbers]
            offsets = module.resolve_ordinals(ids)
            todo |= {n: offset for n, offset in zip(numbers, offsets, strict=True) if offset}
    again = run.run_parts(merge_part, [_merge_task(run, parts[n], todo[n]) for n in todo])
    renumbered = dict(zip(todo, again, strict=True))
    return [renumbered.get(number, entry) for number, entry in enumerate(entries)]


def _ids_of(run: StageRun, entry: PartEntry) -> list[str]:
    files = [*entry.kept, *([entry.dropped] if entry.dropped else [])]
    return [row for file in files for row in row_ids(run.folder, file)]


def _row_step(run: StageRun, module: ModuleType) -> StageResult:
    folder, before = _before(run)
    tasks = [
        PartTask(
            run.name, run.config, run.folder, run.key(part.kept[0].sha256), part.label, (folder, part.kept[0])
        )
        for part in before.parts
    ]
    key = run.key([task.key for task in tasks])
    if (result := run.skip(key)) is not None:
        return result
    entries = run.run_parts(step_part, tasks)
    return run.finish(key, entries, inputs=_inputs(before))


def _dedup(run: StageRun, module: ModuleType) -> StageResult:
    folder, before = _before(run)
    key = run.key([part.kept[0].sha256 for part in before.parts])
    if (result := run.skip(key)) is not None:
        return result
    features, files = _features(run, folder, before)
    table = _concat(features)
    verdicts = module.decide(table, run.config)
    drops = {
        row["row_id"]: Drop(row["reason"], row["detail"], row["survivor"]) for row in verdicts.to_pylist()
    }
    seen: set[str] = set()
    tasks = [
        _verdict_task(run, folder, part, None, _drops_by_row(ids, drops, seen))
        for part, ids in zip(before.parts, _ids_by_part(features), strict=True)
    ]
    clusters = module.largest_clusters(verdicts)
    counts = {f"cluster_{number + 1}_rows": int(rows) + 1 for number, (_, rows) in enumerate(clusters[:3])}
    entries = run.run_parts(verdict_part, tasks)
    return run.finish(key, entries, inputs=_inputs(before), files=files, counts=counts)


def _drops_by_row(ids: list[str], drops: dict[str, Drop], seen: set[str]) -> dict[int, Drop]:
    """Verdicts by row number. The same row id again is the same record in another file of its source."""
    by_row = {}
    for number, row_id in enumerate(ids):
        if row_id in seen:
            by_row[number] = Drop("duplicate", "same record in an earlier file of this source", row_id)
        elif row_id in drops:
            by_row[number] = drops[row_id]
        seen.add(row_id)
    return by_row


def _holdout(run: StageRun, module: ModuleType) -> StageResult:
    folder, before = _before(run)
    ledger_path = run.config.run_root / HOLDOUT_LEDGER_NAME
    ledger_digest = file_sha256(ledger_path) if ledger_path.exists() else "none"
    rows_key = run.key([part.kept[0].sha256 for part in before.parts])
    if (result := _skip_holdout(run, rows_key, ledger_digest, ledger_path)) is not None:
        return result
    features, files = _features(run, folder, before)
    ledger = read_table(ledger_path) if ledger_path.exists() else module.LEDGER.empty_table()
    decision = module.decide(_concat(features), ledger, run.config)
    sides = dict(zip(*(decision.sides[name].to_pylist() for name in ("row_id", "side")), strict=True))
    drops = {
        row["row_id"]: Drop(row["reason"], row["detail"], row["survivor"])
        for row in decision.drops.to_pylist()
    }
    tasks = [
        _verdict_task(run, folder, part, [sides.get(i) for i in ids], _drops_by_row(ids, drops, set()))
        for part, ids in zip(before.parts, _ids_by_part(features), strict=True)
    ]
    entries = run.run_parts(verdict_part, tasks)
    ledger_file = _write_ledger(run, decision.ledger)
    counts = {
        f"{side}_rows": sum(f.num_rows for e in entries for f in side_files(e, side)) for side in SPLITS
    }
    result = run.finish(
        run.key(rows_key, ledger_digest),
        entries,
        inputs=_inputs(before) | {HOLDOUT_LEDGER_NAME: ledger_digest},
        files=(*files, ledger_file),
        counts=counts,
    )
    _publish_ledger(run, ledger_file, ledger_path)
    return result


def _skip_holdout(run: StageRun, rows_key: str, ledger_digest: str, ledger_path: Path) -> StageResult | None:
    """Nothing to do when the rows are the same and the ledger is the one before or after that work."""
    manifest = read_manifest(run.folder)
    if manifest is None:
        return None
    ledger_file = next(file for file in manifest.files if file.path == HOLDOUT_LEDGER_NAME)
    if ledger_digest not in (manifest.inputs[HOLDOUT_LEDGER_NAME], ledger_file.sha256):
        return None
    result = run.skip(run.key(rows_key, manifest.inputs[HOLDOUT_LEDGER_NAME]))
    if result is not None and ledger_digest != ledger_file.sha256:
        _publish_ledger(run, ledger_file, ledger_path)
    return result


def _write_ledger(run: StageRun, ledger: pa.Table) -> FileEntry:
    path = run.folder / HOLDOUT_LEDGER_NAME
    with parquet_file(path, ledger.schema) as write:
        num_rows = write(ledger)
    return file_entry(path, folder=run.folder, num_rows=num_rows)


def _publish_ledger(run: StageRun, ledger_file: FileEntry, ledger_path: Path) -> None:
    # After the manifest: a kill in between is healed by _skip_holdout of the next run.
    write_bytes(ledger_path, check_file(run.folder, ledger_file).read_bytes())


def side_files(entry: PartEntry, side: str) -> list[FileEntry]:
    """The files of one side of the hold-out."""
    return [file for file in entry.kept if file.path.startswith(f"{side}/")]


def _split(run: StageRun, module: ModuleType) -> StageResult:
    from pipelines.shards import write_dataset

    folder, before = _before(run)
    sides = [
        (side, part, file) for side in SPLITS for part in before.parts for file in side_files(part, side)
    ]
    tasks = [
        PartTask(
            run.name,
            run.config,
            run.folder,
            run.key(side, file.sha256),
            f"{side} {part.label}",
            (folder, file, side),
        )
        for side, part, file in sides
    ]
    key = run.key([task.key for task in tasks])
    if (result := run.skip(key)) is not None:
        return result
    entries = run.run_parts(split_part, tasks)
    tables = {
        side: [
            read_arrow(check_file(run.folder, e.kept[0]))
            for e, (s, _, _) in zip(entries, sides, strict=True)
            if s == side
        ]
        for side in SPLITS
    }
    paths = write_dataset(run.folder, tables, batch_rows=run.config.split.shard_rows)
    files = tuple(file_entry(path, folder=run.folder, num_rows=rows) for path, rows in paths)
    return run.finish(key, entries, inputs=_inputs(before), files=files)


def _pack(run: StageRun, module: ModuleType) -> StageResult:
    folder, before = _before(run)
    config = run.config
    capacity = config.pack.capacity or config.split.max_tokens
    epochs = {"train": config.train.epochs, "validation": 1, "test": 1}
    key = run.key(before.key, capacity, epochs)
    if (result := run.skip(key)) is not None:
        return result
    if run.dry:
        raise PartsToRun(sum(epochs.values()), 0)
    files, counts = [], Counter[str]()
    for side in SPLITS:
        table = _open_split(folder, before, side)
        lengths, row_keys = table["num_tokens"].to_numpy(), module.row_keys(table)
        for epoch in range(epochs[side]):
            plan = module.plan_epoch(lengths, row_keys, capacity=capacity, seed=config.pack.seed, epoch=epoch)
            path = run.folder / f"{side}-epoch-{epoch:04d}.arrow"
            files.append(file_entry(path, folder=run.folder, num_rows=write_arrow(path, plan)))
            if epoch == 0:
                summary = module.packing_summary(plan, capacity)
                counts[f"{side}_bins"] = int(summary["num_bins"])
                counts[f"{side}_tokens"] = int(np.sum(lengths, dtype=np.int64))
    run.num_parts_run = len(files)
    part = PartEntry(
        key=key,
        label="plan",
        kept=(),
        dropped=None,
        num_rows_in=before.num_rows_out,
        num_rows_out=before.num_rows_out,
        drops={},
    )
    return run.finish(key, [part], inputs=_inputs(before), files=tuple(files), counts=dict(counts))


def _open_split(folder: Path, manifest: Manifest, side: str) -> pa.Table:
    from pipelines.shards import open_split

    for file in manifest.files:
        if file.path.startswith(f"{side}/"):
            check_file(folder, file)
    return open_split(folder, side)


def _before(run: StageRun) -> tuple[Path, Manifest]:
    names = list(STAGE_FOLDERS)
    before = names[names.index(run.name) - 1]
    folder = run.config.run_root / STAGE_FOLDERS[before]
    return folder, check_manifest(folder, stage=before)


def _inputs(before: Manifest) -> dict[str, str]:
    return {STAGE_FOLDERS[before.stage]: before.key}


def _features(run: StageRun, folder: Path, before: Manifest) -> tuple[list[pa.Table], tuple[FileEntry, ...]]:
    tasks = [
        PartTask(
            run.name,
            run.config,
            run.folder,
            run.key("features", part.kept[0].sha256),
            part.label,
            (folder, part.kept[0]),
        )
        for part in before.parts
    ]
    entries = run.run_parts(features_part, tasks)
    tables = [read_arrow(check_file(run.folder, entry.kept[0])) for entry in entries]
    return tables, tuple(entry.kept[0] for entry in entries)


def _concat(tables: list[pa.Table]) -> pa.Table:
    """All features, each row id once, in the order of the row ids: nothing can hang on parts or files."""
    table = pa.concat_tables(tables)
    ids = table["row_id"].to_pylist()
    first = {row_id: number for number, row_id in reversed(list(enumerate(ids)))}
    return table.take(pa.array([first[row_id] for row_id in sorted(first)], pa.int64()))


def _ids_by_part(features: list[pa.Table]) -> list[list[str]]:
    return [table["row_id"].to_pylist() for table in features]


def _verdict_task(
    run: StageRun, folder: Path, part: PartEntry, sides: list[str | None] | None, drops: dict[int, Drop]
) -> PartTask:
    file = part.kept[0]
    verdicts = rows_digest([*(sides or ()), *sorted(drops.items())])
    return PartTask(
        run.name,
        run.config,
        run.folder,
        run.key(file.sha256, verdicts),
        part.label,
        (folder, file, sides, drops),
    )


_DRIVERS: dict[str, Callable[[StageRun, ModuleType], StageResult]] = {
    "merge": _merge,
    "clean": _row_step,
    "filter": _row_step,
    "dedup": _dedup,
    "holdout": _holdout,
    "split": _split,
    "pack": _pack,
}
