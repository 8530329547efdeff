"""The join finds every pair and nothing else: brute force on Python sets is the judge."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import near_duplicates, overlap, prefix_index, prefixes
from pipelines.grams import GramSets, Ints, gram_sets
from pipelines.near_duplicates import greedy_survivors, joined, near_pairs, pairs_between
from pipelines.overlap import Bools
from pipelines.prefix_index import Pairs, PrefixIndex

small_sets = st.lists(st.sets(st.integers(0, 14), max_size=10), max_size=14)
thresholds = st.sampled_from([0.05, 0.3, 0.5, 0.55, 0.7, 0.8, 0.9, 1.0])


@contextmanager
def tiny_blocks() -> Iterator[None]:
    """Many blocks, chunks and passes where there is one otherwise."""
    with (
        mock.patch.multiple(
            near_duplicates,
            _MAX_BLOCK_ROWS=3,
            _MAX_BLOCK_GRAMS=12,
            _MAX_GROWN_ROWS=5,
            _MAX_INSIDE_MEETINGS=3,
        ),
        mock.patch.multiple(prefix_index, _MAX_EXPANDED=7),
        mock.patch.multiple(prefixes, _MAX_READ_GRAMS=12, _MAX_PASS_ENTRIES=9),
        mock.patch.multiple(overlap, _MAX_COUNTED=20),
    ):
        yield


def gram_sets_of(sets: list[set[int]]) -> GramSets:
    """Members as they are in the low bits, spread over the high ones: both ends of a hash are looked at."""
    spread = [sorted(((n * 0x9E3779B97F4A7C15) & (2**64 - 1)) for n in members) for members in sets]
    starts = np.concatenate([[0], np.cumsum([len(s) for s in spread], dtype=np.int64)])
    return GramSets(starts=starts, hashes=np.array([h for s in spread for h in s], np.uint64))


def similarity(a: set[int], b: set[int]) -> Fraction:
    return Fraction(len(a & b), len(a | b)) if a or b else Fraction(0)


def brute_pairs(sets: list[set[int]], threshold: float) -> dict[tuple[int, int], float]:
    exact = Fraction(str(threshold))
    return {
        (i, j): float(similarity(sets[i], sets[j]))
        for i in range(len(sets))
        for j in range(i)
        if similarity(sets[i], sets[j]) >= exact
    }


def found_pairs(sets: GramSets, threshold: float) -> dict[tuple[int, int], float]:
    index = PrefixIndex(sets, threshold=threshold)
    return as_dict(near_pairs(index, np.arange(len(sets))))


def as_dict(found: Iterable[Pairs]) -> dict[tuple[int, int], float]:
    pairs = joined(found)
    keys = list(zip(pairs.left.tolist(), pairs.right.tolist(), strict=True))
    assert len(keys) == len(set(keys)), "a pair was given twice"
    return dict(zip(keys, pairs.jaccard.tolist(), strict=True))


def brute_survivors(sets: list[set[int]], order: list[int], threshold: float) -> list[int]:
    survivor = [-1] * len(sets)
    stay: list[int] = []
    for row in order:
        near = [other for other in stay if similarity(sets[row], sets[other]) >= Fraction(str(threshold))]
        if near:
            survivor[row] = near[0]
        else:
            stay.append(row)
    return survivor


@given(small_sets, thresholds)
def test_pairs_are_those_of_brute_force(sets: list[set[int]], threshold: float) -> None:
    with tiny_blocks():
        assert found_pairs(gram_sets_of(sets), threshold) == brute_pairs(sets, threshold)
    assert found_pairs(gram_sets_of(sets), threshold) == brute_pairs(sets, threshold)


@given(small_sets, thresholds, st.randoms(use_true_random=False))
def test_survivors_are_those_of_a_walk_in_order(
    sets: list[set[int]], threshold: float, shuffler: random.Random
) -> None:
    order = list(range(len(sets)))
    shuffler.shuffle(order)
    with tiny_blocks():
        index = PrefixIndex(gram_sets_of(sets), threshold=threshold)
        survivor, jaccard = greedy_survivors(index, np.array(order, np.int64))
    assert survivor.tolist() == brute_survivors(sets, order, threshold)
    for row, other in enumerate(survivor.tolist()):
        if other >= 0:
            assert jaccard[row] == pytest.approx(float(similarity(sets[row], sets[other])))
            assert jaccard[row] >= threshold


@given(small_sets, thresholds, st.randoms(use_true_random=False))
def test_pairs_inside_a_cluster_are_left_out_and_no_others(
    sets: list[set[int]], threshold: float, chance: random.Random
) -> None:
    group = [chance.randrange(4) for _ in sets]  # 0: no cluster
    members = [np.array([row for row, g in enumerate(group) if g == number], np.int64) for number in range(4)]
    with tiny_blocks():
        index = PrefixIndex(gram_sets_of(sets), threshold=threshold)
        found = as_dict(near_pairs(index, members[0], clusters=members[1:]))
        between = as_dict(pairs_between(index, members[1], members[2]))
    expected = brute_pairs(sets, threshold)
    assert {frozenset(pair): value for pair, value in found.items()} == {
        frozenset((i, j)): value
        for (i, j), value in expected.items()
        if group[i] == 0 or group[i] != group[j]
    }
    assert between == {
        (i, j): value
        for pair, value in expected.items()
        for i, j in (pair, pair[::-1])
        if (group[i], group[j]) == (1, 2)
    }


@pytest.mark.parametrize("hundredths", range(1, 101))
def test_a_pair_exactly_at_the_threshold_is_near(hundredths: int) -> None:
    """|A ∩ B| / |A ∪ B| is the decimal itself: rounding must lose no pair at the border, and gain none below."""
    threshold = hundredths / 100
    whole = set(range(100))
    at, below = set(range(hundredths)), set(range(hundredths - 1))
    assert found_pairs(gram_sets_of([whole, at]), threshold) == {(1, 0): threshold}
    assert found_pairs(gram_sets_of([whole, below]), threshold) == {}


def test_the_empty_set_is_near_nothing() -> None:
    assert found_pairs(gram_sets(["", " ", "a b c"]), 0.01) == {}


def test_a_chain_is_not_closed() -> None:
    """a~b~c, but not a~c: c stays, for its own survivor would have to be near to it."""
    a, b, c = set(range(18)), set(range(1, 19)), set(range(3, 21))
    assert similarity(a, b) >= Fraction("0.8") > similarity(a, c)
    assert similarity(b, c) >= Fraction("0.8")
    survivor, _ = greedy_survivors(PrefixIndex(gram_sets_of([a, b, c]), threshold=0.8), np.arange(3))
    assert survivor.tolist() == [-1, 0, -1]


def test_unwanted_pairs_are_not_near() -> None:
    sets = gram_sets(["a b c d", "a b c d", "a b c d"])

    def not_of_the_first(left: Ints, right: Ints) -> Bools:
        return (left != 0) & (right != 0)

    survivor, _ = greedy_survivors(PrefixIndex(sets, threshold=0.8), np.arange(3), wanted=not_of_the_first)
    assert survivor.tolist() == [-1, -1, 1]


def test_a_template_of_many_copies_costs_no_square() -> None:
    """4,000 texts that differ in their last word: all pairs, 12 shared rare grams each, would be 96 million."""
    template = " ".join(f"word{n}" for n in range(60))
    sets = gram_sets(f"{template} {n}" for n in range(4000))
    looked_at = 0

    def counting(left: Ints, right: Ints) -> Bools:
        nonlocal looked_at
        looked_at += len(left)
        return np.ones(len(left), bool)

    survivor, _ = greedy_survivors(PrefixIndex(sets, threshold=0.8), np.arange(4000), wanted=counting)
    assert survivor.tolist() == [-1] + [0] * 3999
    assert looked_at < 5_000_000


def planted_texts(num_rows: int, seed: int) -> list[str]:
    """Random sentences, a quarter of them edited copies of others by 0 to 10 % of their words."""
    draw = random.Random(seed)
    vocabulary = [f"w{n}" for n in range(3000)]
    base = [" ".join(draw.choices(vocabulary, k=draw.randint(1, 90))) for _ in range(num_rows * 3 // 4)]
    copies = []
    for _ in range(num_rows - len(base)):
        rate = draw.choice([0, 0.01, 0.03, 0.1])
        words = draw.choice(base).split()
        copies.append(" ".join(draw.choice(vocabulary) if draw.random() < rate else w for w in words))
    texts = base + copies
    draw.shuffle(texts)
    return texts


def counted_pairs(texts: list[str], threshold: float) -> dict[tuple[int, int], float]:
    """All pairs by counting, for each text, how often each other one holds one of its grams as strings."""
    grams = []
    for text in texts:
        words = text.split()
        grams.append({tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))})
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    near = {}
    for row, members in enumerate(grams):
        for other, common in Counter(o for gram in members for o in holders[gram]).items():
            jaccard = common / (len(members) + len(grams[other]) - common)
            if jaccard >= threshold:
                near[row, other] = jaccard
        for gram in members:
            holders[gram].append(row)
    return near


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_recall_and_precision_are_one_on_planted_copies(threshold: float) -> None:
    texts = planted_texts(5000, seed=3)
    expected = counted_pairs(texts, threshold)
    assert len(expected) > 800
    assert found_pairs(gram_sets(texts), threshold) == pytest.approx(expected)
