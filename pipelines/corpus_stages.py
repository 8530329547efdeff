"""Stages 4 and 5: every row is judged beside all others, from features, then parts are cut to the verdicts."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.cluster_report import write_clusters
from pipelines.dedup_files import MANY_ROWS, decide_files, is_again
from pipelines.earlier_runs import earlier_features, earlier_manifests
from pipelines.executors import close_workers
from pipelines.feature_files import feature_files
from pipelines.leak_parts import benchmark_items, items_digest, leaks_in_parts
from pipelines.part_files import side_files
from pipelines.parts import REPLACED_MANIFEST_NAME, PartTask, StageResult, StageRun, inputs_from, stage_before
from pipelines.storage import (
    check_file,
    durable_file,
    file_entry,
    file_sha256,
    parquet_file,
    read_manifest,
    read_table,
)
from pipelines.work import features_part, holdout_features_part, packed_drops, rows_digest, verdict_part
from schemas.conversation import Drop
from schemas.dataset import SPLITS
from schemas.errors import IntegrityError
from schemas.run import HOLDOUT_LEDGER_NAME, FileEntry, Manifest, PartEntry

_SIDE_OR_NONE = (*SPLITS, None)  # by place in SPLITS; -1, the last, is no side


def run_dedup(run: StageRun, module: ModuleType) -> StageResult:
    """03_filtered -> 04_deduplicated."""
    folder, before = stage_before(run)
    items = benchmark_items(run.config)
    earlier = earlier_manifests(run)
    digest = items_digest(items)
    inputs = inputs_from(before) | ({"benchmarks": digest} if items.num_rows else {})
    inputs |= {f"earlier_runs.{number}": manifest.key for number, (_, manifest) in enumerate(earlier)}
    key = run.key([part.kept[0].sha256 for part in before.parts], inputs)
    if (result := run.skip(key)) is not None:
        return result
    leaks = leaks_in_parts(run, items, digest, folder, before)
    entries = _feature_entries(run, folder, before)
    paths = [check_file(run.folder, entry.kept[0]) for entry in entries]
    decided = decide_files(run, module, paths, leaks.drops, earlier_features(earlier))
    clusters_file, clusters = write_clusters(
        run, key, decided.verdicts, folder, before, decided.ids_of_parts()
    )
    # A part never spans sources, and its label begins with the name of its own.
    sources = [part.label.partition("/")[0] for part in before.parts]
    capped = decided.over_cap(sources, leaks.drops, run.config.dedup.caps)
    drops_of_parts = decided.drops_of_parts(dict(leaks.drops) | capped)
    tasks = [
        _verdict_task(run, folder, part, None, drops)
        for part, drops in zip(before.parts, drops_of_parts, strict=True)
    ]
    parts = run.run_parts(verdict_part, tasks, passes_rows=False)
    return run.finish(
        key,
        parts,
        inputs=inputs,
        files=(*(entry.kept[0] for entry in entries), *leaks.files, clusters_file),
        counts=dict(decided.counts) | _cluster_counts(clusters) | dict(leaks.counts),
    )


def _cluster_counts(clusters: list[dict[str, Any]]) -> dict[str, int]:
    return {
        f"cluster_{number:02}_rows": cluster["num_rows_dropped"] + 1
        for number, cluster in enumerate(clusters, start=1)
    }


def run_holdout(run: StageRun, module: ModuleType) -> StageResult:
    """04_deduplicated and the ledger -> 05_held_out and the ledger, grown."""
    folder, before = stage_before(run)
    ledger_path = run.config.run_root / HOLDOUT_LEDGER_NAME
    rows_key = run.key([[part.label, part.kept[0].sha256] for part in before.parts])
    made = read_manifest(run.folder) or read_manifest(run.folder, REPLACED_MANIFEST_NAME)
    ledger_digest = _given_ledger(run, rows_key, made, ledger_path)
    key = run.key(rows_key, ledger_digest)
    if (result := run.skip(key)) is not None:
        _publish_ledger(run, _ledger_entry(result.manifest), ledger_path)
        return result
    feature_entries = _holdout_feature_entries(run, folder, before)
    decided, num_rows = _decided_holdout(run, module, feature_entries, ledger_path)
    tasks = [
        _verdict_task(run, folder, part, sides, drops)
        for part, (sides, drops) in zip(before.parts, decided.of_parts(num_rows), strict=True)
    ]
    entries = run.run_parts(verdict_part, tasks, passes_rows=False)
    run.unpublish()
    ledger_file = _write_ledger(run, decided.ledger)
    counts = {
        f"{side}_rows": sum(f.num_rows for e in entries for f in side_files(e, side)) for side in SPLITS
    }
    result = run.finish(
        key,
        entries,
        inputs=inputs_from(before) | {HOLDOUT_LEDGER_NAME: ledger_digest},
        files=(*(entry.kept[0] for entry in feature_entries), ledger_file),
        counts=counts,
    )
    _publish_ledger(run, ledger_file, ledger_path)
    return result


def _decided_holdout(
    run: StageRun, module: ModuleType, entries: Sequence[PartEntry], ledger_path: Path
) -> tuple[Any, Sequence[int]]:
    """The module's verdicts on the rows of all parts, and how many rows each part has."""
    features = feature_files(module.FEATURES, [check_file(run.folder, entry.kept[0]) for entry in entries])
    if len(features) > MANY_ROWS:
        close_workers()
    present = ~is_again(features.column("row_id"))
    ledger = _read_ledger(ledger_path) if ledger_path.exists() else module.LEDGER.empty_table()
    return module.decide_rows(features, ledger, run.config, present=present), features.num_rows


def _given_ledger(run: StageRun, rows_key: str, made: Manifest | None, ledger_path: Path) -> str:
    """Digest of the ledger that the work begins with, "none" for none; one that was lost is brought back.

    Work that was done before began with the ledger that its manifest names, though the one on the disk has grown
    by it since: with the grown one it ends the same. Raises IntegrityError for a ledger that no run has left here.
    """
    if made is None:
        return file_sha256(ledger_path) if ledger_path.exists() else "none"
    given, grown = made.inputs[HOLDOUT_LEDGER_NAME], _ledger_entry(made)
    if not ledger_path.exists():
        _publish_ledger(run, grown, ledger_path)
    found = file_sha256(ledger_path) if ledger_path.exists() else grown.sha256
    if found not in (given, grown.sha256):
        raise IntegrityError(
            f"{ledger_path} (sha256 {found[:12]}...) is not the ledger that {run.folder} was made with "
            f"(sha256 {grown.sha256[:12]}...): delete it to take the copy in {run.folder}, or delete that folder to "
            "draw the sides of all rows by the ledger as it is"
        )
    return given if made.key == run.key(rows_key, given) else found


def _read_ledger(path: Path) -> pa.Table:
    # Where no run has left it here, no digest is known: the pages' own checksums are all there is.
    try:
        return read_table(path)
    except (OSError, pa.ArrowException) as error:
        why = " ".join(str(error).split())
        raise IntegrityError(
            f"{path} can't be read ({why}): bring a whole copy back, then run again"
        ) from error


def _ledger_entry(manifest: Manifest) -> FileEntry:
    return next(file for file in manifest.files if file.path == HOLDOUT_LEDGER_NAME)


def _write_ledger(run: StageRun, ledger: pa.Table) -> FileEntry:
    path = run.folder / HOLDOUT_LEDGER_NAME
    with parquet_file(path, ledger.schema) as write:
        num_rows = write(ledger)
    return file_entry(path, folder=run.folder, num_rows=num_rows)


def _publish_ledger(run: StageRun, ledger_file: FileEntry, ledger_path: Path) -> None:
    # After the manifest; after a kill in between the next run does it, though it finds the stage finished.
    if not run.dry and not (ledger_path.exists() and file_sha256(ledger_path) == ledger_file.sha256):
        cure = (
            f"bring a copy of {ledger_path} back, or delete {run.folder} to draw the sides of all rows anew"
        )
        grown = check_file(run.folder, ledger_file, cure=cure)
        with durable_file(ledger_path) as temporary:
            shutil.copyfile(grown, temporary)


def _feature_entries(run: StageRun, folder: Path, before: Manifest) -> list[PartEntry]:
    tasks = [
        run.task(run.key("features", part.kept[0].sha256), part.label, (folder, part.kept[0]))
        for part in before.parts
    ]
    return run.run_parts(features_part, tasks)


def _holdout_feature_entries(run: StageRun, folder: Path, before: Manifest) -> list[PartEntry]:
    """Stage 4 names the features of its parts first, in the order of the parts."""
    tasks = [
        run.task(run.key("features", part.kept[0].sha256), part.label, (folder, part.kept[0], file))
        for part, file in zip(before.parts, before.files, strict=False)
    ]
    return run.run_parts(holdout_features_part, tasks)


def _verdict_task(
    run: StageRun,
    folder: Path,
    part: PartEntry,
    sides: npt.NDArray[np.int8] | None,
    drops: dict[int, Drop],
) -> PartTask:
    file = part.kept[0]
    names = [] if sides is None else [_SIDE_OR_NONE[side] for side in sides.tolist()]
    verdicts = rows_digest([*names, *sorted(drops.items())])
    return run.task(run.key(file.sha256, verdicts), part.label, (folder, file, sides, packed_drops(drops)))
