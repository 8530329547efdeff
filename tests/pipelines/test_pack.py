"""The packing plan: every example once, none over capacity, as full as best fit makes it, the same everywhere."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.bins import FILLERS
from pipelines.pack import PLACES, packing_summary, plan_epoch
from pipelines.plans import bin_costs
from schemas.errors import LimitError

ROOT = Path(__file__).parent.parent.parent


def keys_of(num_examples: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 2**63, num_examples, dtype=np.uint64)


def plan_of(
    lengths: list[int] | np.ndarray, capacity: int, *, seed: int = 0, epoch: int = 0, **options: Any
) -> pa.Table:
    keys = keys_of(len(lengths))
    return plan_epoch(np.array(lengths), keys, capacity=capacity, seed=seed, epoch=epoch, **options)


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


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("mode", FILLERS)
@given(case=some_lengths)
def test_every_example_is_in_the_plan_once_and_no_bin_is_over_capacity(
    mode: str, ordered: bool, case: tuple[list[int], int]
) -> None:
    lengths, capacity = case
    plan = plan_of(lengths, capacity, mode=mode, order=np.array(lengths) if ordered else None)
    assert plan.schema.equals(PLACES)
    rows = plan.to_pylist()
    assert sorted(row["example"] for row in rows) == list(range(len(lengths)))
    ends: dict[int, int] = {}
    for row in rows:
        assert row["num_tokens"] == lengths[row["example"]]
        assert row["first_token"] == 0
        assert row["offset"] == ends.get(row["bin"], 0), "examples of a bin follow each other"
        ends[row["bin"]] = row["offset"] + row["num_tokens"]
    assert all(end <= capacity for end in ends.values())
    assert [row["bin"] for row in rows] == sorted(row["bin"] for row in rows)
    assert sorted(ends) == list(range(len(ends)))


@given(some_lengths)
def test_bins_are_no_more_than_those_of_plain_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    num_bins = packing_summary(plan_of(lengths, capacity), capacity)["num_bins"]
    assert num_bins <= len(fills_of_plain_best_fit(lengths, capacity))


def alpaca_like(num_examples: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(4.6, 0.45, num_examples), 40, 4096).astype(int)


def with_chats(num_examples: int) -> np.ndarray:
    """Nine tenths instructions; chats that were cut at 4,096 and what was left of them."""
    draws = np.random.default_rng(1)
    chats = np.concatenate([draws.integers(3000, 4097, num_examples // 20), draws.integers(60, 4097, 2000)])
    return np.concatenate([alpaca_like(num_examples), chats])


@pytest.mark.parametrize("lengths", [alpaca_like(22_000), with_chats(20_000)], ids=["alpaca", "with chats"])
def test_less_than_three_in_a_thousand_are_padding(lengths: np.ndarray) -> None:
    summary = packing_summary(plan_of(lengths, 4096), 4096)
    assert 1 - summary["fill_share"] < 0.003
    assert summary["num_bins"] - summary["fewest_bins"] <= 0.002 * summary["num_bins"]


def partners(plan: pa.Table) -> set[tuple[int, int]]:
    members: dict[int, list[int]] = {}
    for number, example in zip(plan["bin"].to_pylist(), plan["example"].to_pylist(), strict=True):
        members.setdefault(number, []).append(example)
    return {(a, b) for bin_of in members.values() for a in bin_of for b in bin_of if a < b}


@pytest.mark.parametrize(("mode", "share"), [("packed", 0.02), ("token_budget", 0.04)])
def test_partners_of_one_epoch_are_hardly_ever_partners_in_the_next(mode: str, share: float) -> None:
    lengths = with_chats(8000)
    first, second = (partners(plan_of(lengths, 4096, epoch=epoch, mode=mode)) for epoch in (0, 1))
    assert len(first & second) / len(first) < share, "pure best-fit decreasing: a tenth and more"


@pytest.mark.parametrize("mode", FILLERS)
def test_where_an_example_stands_in_an_epoch_has_nothing_to_do_with_its_length(mode: str) -> None:
    lengths = with_chats(8000)
    plan = plan_of(lengths, 4096, mode=mode)
    bins = plan["bin"].to_numpy()
    means = np.bincount(bins, weights=plan["num_tokens"].to_numpy()) / np.bincount(bins)
    limit = 4 / np.sqrt(len(means))  # four standard deviations of chance
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < limit
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < limit, "neither do neighbours"


def test_bins_cost_attention_more_equally_than_those_of_best_fit_decreasing() -> None:
    """Sum of squared lengths: best-fit decreasing fills whole bins with equal lengths."""
    lengths = alpaca_like(20_000)
    plan = plan_of(lengths, 4096)
    costs = bin_costs(plan)
    assert costs.std() / costs.mean() < 0.25, "0.5 and more with best-fit decreasing"


@pytest.mark.parametrize("mode", FILLERS)
def test_a_curriculum_goes_from_low_to_high(mode: str) -> None:
    lengths = with_chats(4000)
    values = np.random.default_rng(3).normal(size=len(lengths))
    plan = plan_of(lengths, 4096, mode=mode, order=values)
    bins, found = plan["bin"].to_numpy(), values[plan["example"].to_numpy()]
    means = np.bincount(bins, weights=found) / np.bincount(bins)
    assert np.corrcoef(means, np.arange(len(means)))[0, 1] > 0.9
    if mode == "unpacked":
        assert (np.diff(found) >= 0).all()
    assert not plan.equals(plan_of(lengths, 4096, mode=mode, order=values, epoch=1)) or mode == "unpacked"


def test_unpacked_is_a_bin_for_each_example_in_another_order_each_epoch() -> None:
    plans = [plan_of([5, 5, 5, 9, 9] * 9, 16, mode="unpacked", epoch=epoch) for epoch in (0, 1)]
    assert all(plan["bin"].to_pylist() == list(range(45)) for plan in plans)
    assert plans[0]["example"].to_pylist() != plans[1]["example"].to_pylist()


def test_a_token_budget_counts_what_padding_to_the_longest_would_take() -> None:
    lengths = with_chats(6000)
    plan = plan_of(lengths, 4096, mode="token_budget")
    bins, found = plan["bin"].to_numpy(), plan["num_tokens"].to_numpy()
    longest = np.zeros(bins.max() + 1, int)
    np.maximum.at(longest, bins, found)
    padded = np.bincount(bins) * longest
    assert padded.max() <= 4096
    assert found.sum() / padded.sum() > 0.95, "examples of a batch have like lengths"


# Exact blocks -----------------------------------------------------------------------------------------------

some_documents = st.lists(st.tuples(st.integers(1, 100), st.booleans()), max_size=40)


@given(some_documents, st.integers(4, 40))
def test_every_token_of_every_document_stands_in_the_blocks_exactly_once(
    cases: list[tuple[int, bool]], capacity: int
) -> None:
    """Documents may be of any length; beside them stand examples that are not cut."""
    is_document = np.array([document for _, document in cases], bool)
    lengths = [n if document else min(n, capacity) for n, document in cases]
    plan = plan_of(lengths, capacity, is_document=is_document)
    tokens = [
        (row["example"], row["first_token"] + place)
        for row in plan.to_pylist()
        for place in range(row["num_tokens"])
    ]
    assert sorted(tokens) == [(example, place) for example, n in enumerate(lengths) for place in range(n)]
    fills: dict[int, int] = {}
    cut_bins: set[int] = set()
    for row in plan.to_pylist():
        assert row["offset"] == fills.get(row["bin"], 0)
        fills[row["bin"]] = row["offset"] + row["num_tokens"]
        cut_bins |= {row["bin"]} if is_document[row["example"]] else set()
    assert all(fill <= capacity for fill in fills.values())
    assert sum(fills[number] < capacity for number in cut_bins) <= 1, "all blocks are exact but one"


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


def test_keys_may_be_bytes() -> None:
    names = [b"one", b"two", b"three"]
    plan = plan_epoch(np.array([5, 5, 5]), names, capacity=8, seed=0, epoch=0)
    assert sorted(plan["example"].to_pylist()) == [0, 1, 2]


def test_the_plan_is_the_one_written_down_here() -> None:
    """Plans are never re-read by another version by accident: a change here needs a new STAGE_VERSION."""
    lengths = np.array([7, 3, 9, 4, 4, 12, 1, 1, 6, 16])
    plan = plan_epoch(lengths, np.arange(10, dtype=np.uint64), capacity=16, seed=5, epoch=1)
    content = np.stack([plan[name].to_numpy() for name in ("bin", "example", "offset")], axis=1)
    assert hashlib.sha256(content.astype("<i4").tobytes()).hexdigest()[:16] == "93fc227afe2c7060"


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
    started = time.process_time()
    plan = plan_epoch(lengths, keys_of(1_000_000), capacity=capacity, seed=0, epoch=0)
    assert time.process_time() - started < 5, "0.7 s on an idle machine"
    summary = packing_summary(plan, capacity)
    assert summary["num_bins"] <= summary["fewest_bins"] * 1.001 + 1
