"""Who stands in an epoch: weights are exact numbers, epochs take turns, keys hang on row and piece alone."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.epochs import Sources, epoch_weights, examples_of_epoch, read_sources, row_keys


def sources_of(**counts: int) -> Sources:
    return Sources(tuple(counts), np.repeat(np.arange(len(counts)), list(counts.values())).astype(np.int32))


def keys_of(sources: Sources) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, len(sources.codes), dtype=np.uint64)


def copies_in(sources: Sources, weights: dict[str, float], epoch: int) -> np.ndarray:
    examples, _ = examples_of_epoch(sources, keys_of(sources), weights, seed=1, epoch=epoch)
    return np.bincount(examples, minlength=len(sources.codes))


@given(weight=st.floats(0, 4), count=st.integers(1, 300), epoch=st.integers(0, 5))
def test_a_weight_gives_exactly_that_many_examples_of_an_epoch(weight: float, count: int, epoch: int) -> None:
    sources = sources_of(a=count, b=7)
    copies = copies_in(sources, {"a": weight}, epoch)
    assert (copies[count:] == 1).all()
    assert set(copies[:count]) <= {int(weight), int(weight) + 1}
    assert abs(copies[:count].sum() - weight * count) < 1
    all_so_far = sum(copies_in(sources, {"a": weight}, e)[:count].sum() for e in range(epoch + 1))
    assert abs(all_so_far - (epoch + 1) * weight * count) <= 0.5 + 1e-6, "epochs together are exact too"


def test_a_fifth_in_five_epochs_is_everything_once() -> None:
    sources = sources_of(a=100)
    copies = [copies_in(sources, {"a": 0.2}, epoch) for epoch in range(5)]
    assert [int(found.sum()) for found in copies] == [20] * 5
    assert (sum(copies) == 1).all()


def test_copies_of_an_example_have_keys_of_their_own() -> None:
    sources = sources_of(a=50)
    examples, keys = examples_of_epoch(sources, keys_of(sources), {"a": 3.5}, seed=0, epoch=0)
    assert len(examples) == len(set(keys.tolist())) == 175


def test_without_weights_nothing_is_copied() -> None:
    sources = sources_of(a=5, b=3)
    keys = keys_of(sources)
    examples, same_keys = examples_of_epoch(sources, keys, {}, seed=0, epoch=3)
    assert examples.tolist() == list(range(8))
    assert same_keys is keys


def test_who_has_a_turn_hangs_on_keys_and_not_on_places() -> None:
    sources = sources_of(a=60)
    keys = keys_of(sources)
    moved = np.random.default_rng(4).permutation(60)
    one, _ = examples_of_epoch(sources, keys, {"a": 0.3}, seed=0, epoch=1)
    other, _ = examples_of_epoch(sources, keys[moved], {"a": 0.3}, seed=0, epoch=1)
    assert sorted(one.tolist()) == sorted(moved[other].tolist())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 100.0])
def test_shares_of_sources_are_as_their_sizes_to_the_power_one_by_temperature(temperature: float) -> None:
    sizes = {"large": 90_000, "middle": 9_000, "small": 1_000}
    weights = epoch_weights(sources_of(**sizes), {}, temperature=temperature)
    stand = np.array([weights[name] * size for name, size in sizes.items()])
    assert stand.sum() == pytest.approx(100_000)
    expected = np.array(list(sizes.values())) ** (1 / temperature)
    assert stand / stand.sum() == pytest.approx(expected / expected.sum())


def test_temperature_counts_weighted_examples_and_leaves_out_what_has_no_weight() -> None:
    sources = sources_of(a=400, b=100, c=50)
    weights = epoch_weights(sources, {"b": 4.0, "c": 0.0}, temperature=3.0)
    assert weights["a"] * 400 == pytest.approx(weights["b"] * 100) == pytest.approx(400)
    assert weights["c"] == 0.0


# From the shards --------------------------------------------------------------------------------------------


def test_sources_are_names_without_their_files() -> None:
    column = pa.chunked_array([["b/x.json", "a/y.json"], ["b/z/1.json", "a/y.json", "c/n"]])
    sources = read_sources(pa.table({"source": column}))
    assert [sources.names[code] for code in sources.codes] == ["b", "a", "b", "a", "c"]
    assert read_sources(pa.table({"source": pa.array([], pa.string())})).counts().tolist() == []


@given(
    st.lists(st.tuples(st.text(max_size=40), st.integers(0, 3)), unique=True, max_size=30), st.integers(1, 9)
)
def test_keys_hang_on_row_and_piece_alone(rows: list[tuple[str, int]], batch_rows: int) -> None:
    schema = pa.schema([("row_id", pa.string()), ("piece", pa.int32())])
    table = pa.Table.from_pylist([{"row_id": name, "piece": piece} for name, piece in rows], schema=schema)
    batches = table.to_batches(max_chunksize=batch_rows)
    keys = row_keys(pa.Table.from_batches(batches, schema=schema))
    assert len(set(keys.tolist())) == len(rows)
    assert [int(row_keys(table.slice(place, 1))[0]) for place in range(len(rows))] == keys.tolist()


def test_keys_are_the_ones_written_down_here() -> None:
    table = pa.table({"row_id": ["0123456789abcdef" * 2, "a", ""], "piece": pa.array([0, 1, 2], pa.int32())})
    assert [f"{key:016x}" for key in row_keys(table).tolist()] == [
        "a8093cc9429fbae9",
        "7b0f6782beb6625f",
        "f893a2eefb32555e",
    ]
