"""The packing plan: every example once, none over capacity, as full as best fit makes it, the same everywhere."""

import hashlib
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.pack import packing_summary, plan_epoch, row_keys, weighted_examples
from schemas.dataset import PLAN
from schemas.errors import LimitError

ROOT = Path(__file__).parent.parent.parent


def keys_of(num_examples: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 2**63, num_examples, dtype=np.uint64)


def plan_of(lengths: list[int], capacity: int, *, seed: int = 0, epoch: int = 0) -> pa.Table:
    return plan_epoch(np.array(lengths), keys_of(len(lengths)), capacity=capacity, seed=seed, epoch=epoch)


def fills_of_plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as in a textbook: one example after the other, all bins looked at."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [(fill, number) for number, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting)[1]] += length
        else:
            fills.append(length)
    return sorted(fills)


some_lengths = st.integers(4, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity))
)


@given(some_lengths)
def test_every_example_is_in_the_plan_once_and_no_bin_is_over_capacity(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    plan = plan_of(lengths, capacity)
    assert plan.schema.equals(PLAN)
    rows = plan.to_pylist()
    assert sorted(row["example"] for row in rows) == list(range(len(lengths)))
    ends: dict[int, int] = {}
    for row in rows:
        assert row["num_tokens"] == lengths[row["example"]]
        assert row["offset"] == ends.get(row["bin"], 0), "examples of a bin follow each other"
        ends[row["bin"]] = row["offset"] + row["num_tokens"]
    assert all(end <= capacity for end in ends.values())
    assert [row["bin"] for row in rows] == sorted(row["bin"] for row in rows)
    assert sorted(ends) == list(range(len(ends)))


@given(some_lengths)
def test_bins_are_as_full_as_those_of_plain_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    plan = plan_of(lengths, capacity)
    fills = np.zeros(len(plan["bin"].unique()), np.int64)
    np.add.at(fills, plan["bin"].to_numpy(), plan["num_tokens"].to_numpy())
    assert sorted(fills.tolist()) == fills_of_plain_best_fit(lengths, capacity)


def test_another_epoch_or_seed_shares_out_and_orders_anew() -> None:
    lengths = [3, 5, 8, 2] * 30
    plans = [plan_of(lengths, 16, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert plans[0].equals(plan_of(lengths, 16))
    neighbours = [
        {
            frozenset(plan["example"].to_numpy()[plan["bin"].to_numpy() == number].tolist())
            for number in range(20)
        }
        for plan in plans
    ]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not plans[one].equals(plans[other])
        assert len(neighbours[one] & neighbours[other]) < 10


def test_the_order_of_the_examples_changes_no_neighbours() -> None:
    """A new row elsewhere in the data, or parts in another order, must not reshuffle what is packed together."""
    lengths, keys = np.array([3, 5, 8, 2, 7, 1] * 20), keys_of(120)
    moved = np.random.default_rng(1).permutation(120)

    def content(order: np.ndarray) -> list[tuple[int, int, int]]:
        plan = plan_epoch(lengths[order], keys[order], capacity=16, seed=3, epoch=2)
        examples = order[plan["example"].to_numpy()]
        return list(zip(plan["bin"].to_pylist(), plan["offset"].to_pylist(), examples.tolist(), strict=True))

    assert content(moved) == content(np.arange(120))


def test_bins_do_not_come_in_the_order_of_their_longest_example() -> None:
    plan = plan_of(list(range(1, 200)), 256)
    longest = plan["num_tokens"].to_numpy()[plan["offset"].to_numpy() == 0]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.5


def test_an_example_over_capacity_is_named() -> None:
    with pytest.raises(LimitError, match=r"example 2 has 17 tokens, a bin takes 1 to 16"):
        plan_of([4, 16, 17, 20], 16)
    with pytest.raises(LimitError, match=r"example 1 has 0 tokens"):
        plan_of([4, 0], 16)


def test_a_plan_of_nothing_is_empty() -> None:
    plan = plan_of([], 16)
    assert plan.num_rows == 0
    assert packing_summary(plan, 16)["num_bins"] == 0


def test_the_summary_says_how_far_from_the_best_the_plan_is() -> None:
    summary = packing_summary(plan_of([9, 9, 9, 1], 16), 16)
    assert summary == {"num_bins": 3, "num_tokens": 28, "fewest_bins": 3, "fill_share": 28 / 48}


def test_keys_hang_on_row_and_piece_alone() -> None:
    table = pa.table({"row_id": ["a", "b", "a"], "piece": [0, 0, 1]})
    keys = row_keys(table)
    assert len(set(keys.tolist())) == 3
    assert row_keys(table.take([2, 0, 1])).tolist() == keys[[2, 0, 1]].tolist()


def test_keys_may_be_bytes() -> None:
    names = [b"one", b"two", b"three"]
    plan = plan_epoch(np.array([5, 5, 5]), names, capacity=8, seed=0, epoch=0)
    assert sorted(plan["example"].to_pylist()) == [0, 1, 2]


def test_the_plan_is_the_one_written_down_here() -> None:
    """Plans are never re-read by another version by accident: a change here needs a new STAGE_VERSION."""
    lengths = np.array([7, 3, 9, 4, 4, 12, 1, 1, 6, 16])
    plan = plan_epoch(lengths, np.arange(10, dtype=np.uint64), capacity=16, seed=5, epoch=1)
    content = np.stack([plan[name].to_numpy() for name in ("bin", "example", "offset")], axis=1)
    assert hashlib.sha256(content.astype("<i4").tobytes()).hexdigest()[:16] == "bb294c36d59a4408"


def test_planning_needs_neither_torch_nor_a_tokenizer() -> None:
    code = (
        "import sys; import pipelines.pack; print(*{'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [2048, 32768])
def test_a_million_examples_are_planned_in_seconds_and_nearly_full(capacity: int) -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 1_000_000), 1, capacity).astype(np.int64)
    started = time.monotonic()
    plan = plan_epoch(lengths, keys_of(1_000_000), capacity=capacity, seed=0, epoch=0)
    assert time.monotonic() - started < 15, "5 s on an idle machine; three times that where others work too"
    summary = packing_summary(plan, capacity)
    assert summary["num_bins"] <= summary["fewest_bins"] * 1.001 + 1


@given(weight=st.floats(0, 4), epoch=st.integers(0, 3))
def test_a_weight_gives_its_whole_part_and_one_more_for_its_fraction(weight: float, epoch: int) -> None:
    keys = np.random.default_rng(0).integers(0, 2**64, 400, dtype=np.uint64)
    sources = ["a", "b"] * 200
    examples, copy_keys = weighted_examples(sources, keys, {"a": weight}, seed=1, epoch=epoch)
    copies = np.bincount(examples, minlength=400)
    assert (copies[1::2] == 1).all()
    assert set(copies[::2]) <= {math.floor(weight), math.ceil(weight)}
    assert abs(copies[::2].mean() - weight) < 0.15
    assert len(set(copy_keys.tolist())) == len(copy_keys)
