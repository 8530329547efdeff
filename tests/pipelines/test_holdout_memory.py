"""What the hold-out keeps of each row while it decides: numbers, no Python objects."""

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines import holdout
from pipelines.feature_files import FeatureTable
from pipelines.grams import to_column
from schemas.pipeline_config import HoldoutConfig, PipelineConfig
from schemas.source_config import SourceConfig

MAX_BYTES_A_ROW = 420
"""Of Python's and NumPy's memory, index and all. It takes 334; with ids and keys as Python strings it took 503."""


@pytest.mark.slow
def test_a_row_more_costs_numbers_and_no_strings() -> None:
    few, many = (peak_bytes(num_rows) for num_rows in (2**14, 2**16))
    assert (many - few) / (2**16 - 2**14) < MAX_BYTES_A_ROW


def peak_bytes(num_rows: int) -> int:
    """Most that stands in memory while the sides of so many rows are drawn, each with a key of its own."""
    config = PipelineConfig(
        run_root=Path("/nowhere"), sources=[SourceConfig(name="s", path="s.json")], holdout=HoldoutConfig()
    )
    features = FeatureTable(some_features(num_rows))
    gc.collect()
    tracemalloc.start()
    try:
        decided = holdout.decide_rows(features, holdout.LEDGER.empty_table(), config)
        assert (decided.sides != holdout.NO_SIDE).all()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def some_features(num_rows: int) -> pa.Table:
    draw = np.random.default_rng(0)
    ids = [f"{number:032x}" for number in range(num_rows)]
    grams = np.sort(draw.integers(0, 2**64, (num_rows, 4), np.uint64), axis=1)
    columns = {
        "row_id": ids,
        "holdout_key": ids[::-1],
        "train_only": np.zeros(num_rows, bool),
        "grams": to_column(np.arange(0, grams.size + 1, 4), grams.ravel()),
    }
    return pa.table(columns, schema=holdout.FEATURES)
