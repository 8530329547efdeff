"""Scores of examples: a number that an earlier stage or the source itself put into the meta of each row."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from schemas.errors import InputError


def read_scores(parts: Sequence[Path], row_ids: pa.ChunkedArray, name: str) -> np.ndarray:
    """The number `name` in the meta of the row of each example, float64 [examples].

    `parts` are Parquet files of rows. Raises InputError, naming a row, where one has no such number.
    """
    wanted = pl.DataFrame({"row_id": pl.Series(pl.from_arrow(row_ids), dtype=pl.String)})
    rows = pl.concat(
        [
            pl.DataFrame(schema={"row_id": pl.String, "score": pl.Float64}),
            *(_scores_of(part, name) for part in parts),
        ]
    )
    found = wanted.join(rows, on="row_id", how="left", maintain_order="left")
    missing = found.filter(pl.col("score").is_null() | ~pl.col("score").is_finite())
    if len(missing):
        raise InputError(
            f"row {missing['row_id'][0]} has no number meta.{name} ({len(missing)} such examples), which "
            "pack.order: score goes by: set filter.quality, name another key of meta in pack.score, or set pack.order"
        )
    scores: np.ndarray = found["score"].to_numpy()
    return scores


def _scores_of(part: Path, name: str) -> pl.DataFrame:
    score = pl.col("meta").str.json_path_match(f"$.{name}").cast(pl.Float64, strict=False)
    return pl.read_parquet(part, columns=["row_id", "meta"]).select("row_id", score.alias("score"))
