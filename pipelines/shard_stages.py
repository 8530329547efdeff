"""Stages 6 and 7: rows become examples in shards, and shards get a packing plan."""

from pathlib import Path
from types import ModuleType

import pyarrow as pa

from pipelines.parts import (
    PartsToRun,
    StageResult,
    StageRun,
    inputs_from,
    side_files,
    stage_before,
    sum_counts,
)
from pipelines.storage import check_file, file_entry, read_arrow, write_arrow
from pipelines.work import split_part
from schemas.dataset import PLAN, SPLITS
from schemas.pipeline_config import PackConfig
from schemas.run import FileEntry, Manifest, PartEntry


def run_split(run: StageRun, module: ModuleType) -> StageResult:
    """05_held_out -> 06_shards."""
    from pipelines.shards import write_dataset

    folder, before = stage_before(run)
    sides = [
        (side, part, file) for side in SPLITS for part in before.parts for file in side_files(part, side)
    ]
    tasks = [
        run.task(run.key(side, file.sha256), f"{side} {part.label}", (folder, file, side))
        for side, part, file in sides
    ]
    key = run.key([task.key for task in tasks])
    if (result := run.skip(key)) is not None:
        return result
    entries = run.run_parts(split_part, tasks)
    files_of = {
        side: [
            check_file(run.folder, e.kept[0])
            for e, (s, _, _) in zip(entries, sides, strict=True)
            if s == side
        ]
        for side in SPLITS
    }
    # One part after another: pages of a mapped file count as memory as long as somebody holds its table.
    tables = {side: map(read_arrow, paths) for side, paths in files_of.items()}
    module.check_counts(sum_counts(entry.counts for entry in entries), run.config.split)
    run.unpublish()
    paths = write_dataset(run.folder, tables, batch_rows=run.config.split.shard_rows)
    files = tuple(file_entry(path, folder=run.folder, num_rows=rows) for path, rows in paths)
    return run.finish(key, entries, inputs=inputs_from(before), files=files)


def run_pack(run: StageRun, module: ModuleType) -> StageResult:
    """06_shards -> 07_plan."""
    folder, before = stage_before(run)
    config = run.config
    capacity = config.pack.capacity or config.split.max_tokens
    epochs = {"train": config.train.epochs, "validation": 1, "test": 1}
    key = run.key(before.key, capacity, epochs)
    if (result := run.skip(key)) is not None:
        return result
    if run.dry:
        raise PartsToRun(sum(epochs.values()), 0)
    run.unpublish()
    files: list[FileEntry] = []
    counts: dict[str, int] = {}
    for side in SPLITS:
        table = _open_split(folder, before, side)
        plans = [_plan(module, config.pack, table, side, epoch, capacity) for epoch in range(epochs[side])]
        for epoch, plan in enumerate(plans):
            path = run.folder / f"{side}-epoch-{epoch:04d}.arrow"
            files.append(file_entry(path, folder=run.folder, num_rows=write_arrow(path, plan)))
        summary = module.packing_summary(plans[0], capacity)
        counts |= {f"{side}_bins": int(summary["num_bins"]), f"{side}_tokens": int(summary["num_tokens"])}
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
    return run.finish(key, [part], inputs=inputs_from(before), files=tuple(files), counts=counts)


def _plan(
    module: ModuleType, config: PackConfig, table: pa.Table, side: str, epoch: int, capacity: int
) -> pa.Table:
    lengths, keys = table["num_tokens"].to_numpy(), module.row_keys(table)
    # Held-out sides are measured as they are: weights are for training alone.
    weights = config.weights if side == "train" else {}
    names = [str(source).split("/", 1)[0] for source in table["source"].to_pylist()]
    examples, keys = module.weighted_examples(names, keys, weights, seed=config.seed, epoch=epoch)
    plan = module.plan_epoch(lengths[examples], keys, capacity=capacity, seed=config.seed, epoch=epoch)
    chosen = pa.array(examples[plan["example"].to_numpy()], pa.int32())
    return plan.set_column(plan.schema.get_field_index("example"), "example", chosen).cast(PLAN)


def _open_split(folder: Path, manifest: Manifest, side: str) -> pa.Table:
    from pipelines.shards import open_split

    for file in manifest.files:
        if file.path.startswith(f"{side}/"):
            check_file(folder, file)
    return open_split(folder, side)
