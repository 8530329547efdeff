"""From shards to plans: the sums that a loss is divided by, windows of documents, orders and scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import pack
from pipelines.plans import Split, plan_split, read_examples, window_starts
from pipelines.scores import read_scores
from schemas.dataset import PLAN, SHARD
from schemas.errors import InputError
from schemas.pipeline_config import PackConfig


def shard_row(number: int, *, length: int, source: str = "chats/a.json") -> dict[str, Any]:
    """Two trained spans of different weights, or none in the shortest."""
    half = length // 2
    spans = [(1, half, 1.0), (half + 1, length, 0.25)] if length > 3 else []
    starts, ends, weights = zip(*spans, strict=True) if spans else ((), (), ())
    return dict.fromkeys(SHARD.names, 0) | {
        "input_ids": [0] * length,
        "span_starts": starts,
        "span_ends": ends,
        "span_weights": weights,
        "num_tokens": length,
        "num_trained_tokens": sum(ends) - sum(starts),
        "row_id": f"row {number}",
        "source": source,
        "language": "en",
    }


def shard_table(lengths: list[int], *, source: str = "chats/a.json") -> pa.Table:
    rows = [shard_row(number, length=length, source=source) for number, length in enumerate(lengths)]
    return pa.Table.from_pylist(rows, schema=SHARD)


def no_scores() -> np.ndarray:
    raise AssertionError("scores are read for order: score alone")


def planned(
    table: pa.Table,
    *,
    capacity: int = 64,
    epoch: int = 0,
    document_sources: tuple[str, ...] = (),
    is_trained: bool = True,
    files: int = 1,
    scores: Any = no_scores,
    **config: Any,
) -> pa.Table:
    size = -(-table.num_rows // files)
    tables = [table.slice(start, size) for start in range(0, table.num_rows, max(size, 1))]
    split = Split(
        read_examples(tables), is_trained, capacity, lambda: table, scores, frozenset(document_sources)
    )
    return plan_split(pack, PackConfig(**config), split, epoch)


def sums_by_hand(row: dict[str, Any], first: int, num_tokens: int) -> tuple[int, float]:
    weights = [
        weight
        for start, end, weight in zip(row["span_starts"], row["span_ends"], row["span_weights"], strict=True)
        for token in range(start, end)
        if first < token < first + num_tokens
    ]
    return len(weights), sum(weights)


@pytest.mark.parametrize("config", [{}, {"documents": "window", "window_tokens": 9}, {"mode": "unpacked"}])
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30), cut=st.booleans(), files=st.integers(1, 3)
)
def test_sums_of_each_piece_are_those_of_its_tokens(
    config: dict[str, Any], lengths: list[int], cut: bool, files: int
) -> None:
    table = shard_table(lengths)
    plan = planned(table, document_sources=("chats",) if cut else (), files=files, **config)
    assert plan.schema.equals(PLAN)
    rows = table.to_pylist()
    for piece in plan.to_pylist():
        expected = sums_by_hand(rows[piece["example"]], piece["first_token"], piece["num_tokens"])
        assert (piece["num_trained_tokens"], piece["weight_sum"]) == pytest.approx(expected)
    if not cut:
        assert plan["num_trained_tokens"].to_numpy().sum() == table["num_trained_tokens"].to_numpy().sum()


def test_weights_copy_training_examples_and_leave_held_out_sides_alone() -> None:
    table = pa.concat_tables([shard_table([20] * 40), shard_table([20] * 10, source="few/b.json")])
    counts = [
        np.bincount(planned(table, weights={"few": 2.5}, is_trained=trained)["example"].to_numpy())
        for trained in (True, False)
    ]
    assert counts[0][:40].tolist() == [1] * 40
    assert counts[0][40:].sum() == 25
    assert counts[1].tolist() == [1] * 50


# Windows ----------------------------------------------------------------------------------------------------


def test_a_window_is_a_function_of_seed_epoch_and_document() -> None:
    draws = np.random.default_rng(0)
    keys = draws.integers(0, 2**64, 500, dtype=np.uint64)
    lengths = draws.integers(1, 3000, 500)

    def starts(places: np.ndarray, seed: int = 0, epoch: int = 0) -> np.ndarray:
        return window_starts(lengths[places], keys[places], 128, seed=seed, epoch=epoch)

    everyone, moved = np.arange(500), draws.permutation(500)
    first = starts(everyone)
    assert starts(moved).tolist() == first[moved].tolist()
    assert ((first >= 0) & (first + np.minimum(128, lengths) <= lengths)).all()
    assert (first[lengths <= 128] == 0).all()
    long = lengths > 500
    for other in (starts(everyone, epoch=1), starts(everyone, seed=1)):
        assert np.mean(other[long] == first[long]) < 0.02
        assert abs(np.corrcoef(other[long] / lengths[long], first[long] / lengths[long])[0, 1]) < 0.2


def test_all_places_of_a_window_are_equally_likely() -> None:
    keys = np.random.default_rng(1).integers(0, 2**64, 20_000, dtype=np.uint64)
    found = np.bincount(window_starts(np.full(20_000, 19), keys, 10, seed=0, epoch=0), minlength=10)
    assert len(found) == 10
    assert np.abs(found - 2000).max() < 5 * np.sqrt(2000)


def test_each_document_gives_one_window_an_epoch_and_chats_stay_whole() -> None:
    table = pa.concat_tables([shard_table([30, 500, 9000, 7]), shard_table([60, 61], source="talk/b.json")])
    windows = []
    for epoch in range(3):
        settings: dict[str, Any] = {"documents": "window", "window_tokens": 32, "epoch": epoch}
        plan = planned(table, document_sources=("chats",), **settings)
        assert plan.equals(planned(table, document_sources=("chats",), **settings))
        by_example = {row["example"]: (row["first_token"], row["num_tokens"]) for row in plan.to_pylist()}
        assert plan.num_rows == len(by_example) == 6
        assert [by_example[n][1] for n in range(6)] == [30, 32, 32, 7, 60, 61]
        assert by_example[4][0] == by_example[5][0] == 0
        windows.append((by_example[1][0], by_example[2][0]))
    assert len(set(windows)) == 3, "other windows in each epoch"


def test_documents_fill_exact_blocks_beside_packed_chats() -> None:
    table = pa.concat_tables([shard_table([30, 500, 9000, 7]), shard_table([60, 61], source="talk/b.json")])
    plan = planned(table, document_sources=("chats",))
    fills = np.bincount(plan["bin"].to_numpy(), weights=plan["num_tokens"].to_numpy())
    assert sorted(fills.tolist()) == sorted([64.0] * (9537 // 64) + [9537 % 64, 60, 61])


# Orders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("order", ["length", "source", "score"])
def test_bins_come_in_the_order_that_is_asked_for(order: str, descending: bool) -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(2, 62)).tolist()
    scores = np.random.default_rng(1).normal(size=60)
    values = {"length": np.array(lengths), "source": np.arange(60), "score": scores}[order]
    plan = planned(
        shard_table(lengths), mode="unpacked", order=order, descending=descending, scores=lambda: scores
    )
    found = values[plan["example"].to_numpy()]
    assert found.tolist() == sorted(values.tolist(), reverse=descending)


def test_a_curriculum_is_not_for_held_out_sides() -> None:
    table = shard_table(list(range(2, 60)))
    assert planned(table, order="length", is_trained=False).equals(planned(table, is_trained=False))


def rows_with_meta(folder: Path, metas: list[dict[str, Any]]) -> list[Path]:
    ids = [f"row {number}" for number in range(len(metas))]
    frame = pl.DataFrame({"row_id": ids, "meta": [json.dumps(meta) for meta in metas]})
    paths = [folder / "one.parquet", folder / "two.parquet"]
    frame[:1].write_parquet(paths[0])
    frame[1:].write_parquet(paths[1])
    return paths


def test_scores_are_found_by_row_for_every_piece_of_it(tmp_path: Path) -> None:
    paths = rows_with_meta(tmp_path, [{"quality": 0.5}, {"quality": -1e-3, "n": 7}, {"quality": 3, "n": 8}])
    ids = pa.chunked_array([["row 2", "row 0"], ["row 0", "row 1"]])
    assert read_scores(paths, ids, "quality").tolist() == [3.0, 0.5, 0.5, -0.001]


def test_a_row_without_a_score_is_named(tmp_path: Path) -> None:
    paths = rows_with_meta(tmp_path, [{"quality": 0.5}, {"quality": "good"}, {}])
    with pytest.raises(InputError, match=r"row row 1 has no number meta.quality \(2 such examples\)"):
        read_scores(paths, pa.chunked_array([["row 0", "row 1", "row 2"]]), "quality")
