"""Limits of a stage: room on the disk before it starts, and how much of the rows it may drop."""

import shutil

from schemas.errors import LimitError
from schemas.pipeline_config import PipelineConfig
from schemas.run import Manifest

GIB = 2**30


def check_free_disk(config: PipelineConfig) -> None:
    """Raises LimitError before a stage starts that would fill the disk."""
    config.run_root.mkdir(parents=True, exist_ok=True)
    free_gib = shutil.disk_usage(config.run_root).free / GIB
    if free_gib < config.engine.min_free_gib:
        raise LimitError(
            f"{config.run_root} has {free_gib:.2f} GiB free, engine.min_free_gib asks for "
            f"{config.engine.min_free_gib}: free some space or move run_root"
        )


def check_limits(manifest: Manifest, config: PipelineConfig) -> None:
    """Raises LimitError when nothing is left, or more was dropped than the config allows."""
    num_dropped = sum(manifest.drops.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(manifest.drops.items())) or "none"
    if manifest.num_rows_out == 0:
        raise LimitError(
            f"{manifest.stage}: no row of {manifest.num_rows_in} is left; drops by reason: {reasons}"
        )
    if num_dropped > config.engine.max_drop_share * manifest.num_rows_in:
        raise LimitError(
            f"{manifest.stage}: {num_dropped} of {manifest.num_rows_in} rows dropped, engine.max_drop_share "
            f"allows {config.engine.max_drop_share:.0%}; drops by reason: {reasons}"
        )
