"""Rows that earlier runs kept after dedup, read from their run roots: what they say is not taken again."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.parts import StageRun
from pipelines.storage import check_file, check_manifest
from schemas.errors import InputError
from schemas.run import STAGE_FOLDERS, Manifest


def earlier_manifests(run: StageRun) -> list[tuple[Path, Manifest]]:
    """Folder and manifest of the stage in each of config.earlier_runs.

    Raises InputError: no run, this run itself, or one whose features can't be compared with ours.
    """
    found = []
    for root in map(Path, run.config.earlier_runs):
        if root.resolve() == run.config.run_root.resolve():
            raise InputError(
                f"earlier_runs names {root}, the run_root of this run: name the roots of other runs"
            )
        folder = root / STAGE_FOLDERS[run.name]
        manifest = check_manifest(folder, stage=run.name)
        _check(run, folder, manifest)
        found.append((folder, manifest))
    return found


def earlier_features(found: list[tuple[Path, Manifest]]) -> list[tuple[Path, Path]]:
    """Files of these runs: features of parts, each with what was kept of its part."""
    # The first files beside the parts are their features, in the order of the parts.
    return [
        (check_file(folder, file), check_file(folder, part.kept[0]))
        for folder, manifest in found
        for part, file in zip(manifest.parts, manifest.files, strict=False)
    ]


def check_files_are_there(found: list[tuple[Path, Manifest]]) -> None:
    """Raises InputError for a file of these runs that is missing or cut short; what is in them is read by the stage."""
    for folder, manifest in found:
        for part, features in zip(manifest.parts, manifest.files, strict=False):
            for file in (features, part.kept[0]):
                path = folder / file.path
                num_bytes = path.stat().st_size if path.is_file() else 0
                if num_bytes != file.num_bytes:
                    raise InputError(
                        f"{path} has {num_bytes} bytes, its manifest names {file.num_bytes}: run the config of that "
                        "run again, or take it out of earlier_runs"
                    )


def kept_rows(row_ids: pa.Array | pa.ChunkedArray, part: Path) -> npt.NDArray[np.bool_]:
    """Which of these rows a part holds."""
    kept = pq.read_table(part, columns=["row_id"])["row_id"].cast(pa.large_string())
    return pc.is_in(row_ids, value_set=kept).to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]


def _check(run: StageRun, folder: Path, manifest: Manifest) -> None:
    if manifest.stage_version != run.version or manifest.versions != run.versions:
        raise InputError(
            f"{folder} was made by version {manifest.stage_version} of the stage with {manifest.versions}, "
            f"expected {run.version} with {run.versions}: run that config again, then this one"
        )
    if run.config.dedup.near and not manifest.config.get("dedup", {}).get("near"):  # type: ignore[attr-defined]
        raise InputError(
            f"{folder} was made with dedup.near: false, so near-duplicates of its rows can't be found: run it "
            "again with dedup.near: true, or set false here"
        )
