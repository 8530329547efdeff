"""Stages 6 and 7: rows become examples in shards, and shards get a packing plan."""

from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

from pipelines.formats.document import document_sources
from pipelines.part_files import side_files
from pipelines.parts import PartsToRun, StageResult, StageRun, inputs_from, stage_before, sum_counts
from pipelines.plans import Split, plan_split, read_examples
from pipelines.storage import check_file, check_manifest, file_entry, read_arrow, write_arrow
from pipelines.work import split_part
from schemas.dataset import SPLITS
from schemas.run import STAGE_FOLDERS, FileEntry, Manifest, PartEntry


def run_split(run: StageRun, module: ModuleType) -> StageResult:
    """05_held_out -> 06_shards."""
    from pipelines.shards import write_dataset

    folder, before = stage_before(run)
    sides = [
        (side, part, file) for side in SPLITS for part in before.parts for file in side_files(part, side)
    ]
    made_before = run.parts_made_alike()
    tasks = [
        run.task(run.key(side, file.sha256), label, (folder, file, side, made_before.get(label)))
        for side, file, label in ((side, file, f"{side} {part.label}") for side, part, file in sides)
    ]
    key = run.key([[task.key, task.label] for task in tasks])
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
    module.check_hand_over(
        sum_counts(entry.counts for entry in entries),
        sum_counts(entry.drops for entry in entries),
        num_rows=sum(entry.num_rows_in for entry in entries),
        config=run.config.split,
    )
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
    key = run.key(before.key, capacity, epochs, sorted(document_sources(config)))
    if (result := run.skip(key)) is not None:
        return result
    if run.dry:
        raise PartsToRun(sum(epochs.values()), 0)
    run.unpublish()
    files: list[FileEntry] = []
    counts: dict[str, int] = {}
    for side in SPLITS:
        split = _split(run, folder, before, side, capacity)
        for epoch in range(epochs[side]):
            plan = plan_split(module, config.pack, split, epoch)
            path = run.folder / f"{side}-epoch-{epoch:04d}.arrow"
            files.append(file_entry(path, folder=run.folder, num_rows=write_arrow(path, plan)))
            if epoch == 0:
                summary = module.packing_summary(plan, capacity)
                counts |= {f"{side}_{shown}": int(summary[name]) for name, shown in _COUNTED.items()}
    run.num_parts_run, run.num_rows_run = len(files), before.num_rows_out
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


_COUNTED = {"num_bins": "bins", "num_tokens": "tokens", "fewest_bins": "fewest_bins"}


def _split(run: StageRun, folder: Path, manifest: Manifest, side: str, capacity: int) -> Split:
    from pipelines.shards import open_files, open_split

    for file in manifest.files:
        if file.path.startswith(f"{side}/"):
            check_file(folder, file)
    return Split(
        examples=read_examples(open_files(folder, side)),
        is_trained=side == "train",
        capacity=capacity,
        open_table=partial(open_split, folder, side),
        read_scores=partial(_read_scores, run, folder, side),
        document_sources=document_sources(run.config),
    )


def _read_scores(run: StageRun, folder: Path, side: str) -> np.ndarray:
    """A number from the meta of the row of each example, float64 [examples]."""
    from pipelines.scores import read_scores
    from pipelines.shards import open_split

    rows = run.config.run_root / STAGE_FOLDERS["holdout"]
    files = [
        check_file(rows, file)
        for part in check_manifest(rows, stage="holdout").parts
        for file in side_files(part, side)
    ]
    return read_scores(files, open_split(folder, side)["row_id"], run.config.pack.score)
