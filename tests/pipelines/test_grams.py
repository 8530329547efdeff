"""Gram sets mean what a slow reader of the definition would say, and keep their bytes for good."""

import hashlib
from itertools import chain, pairwise
from random import Random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.grams import (
    GRAMS_TYPE,
    JoinedSets,
    compared_text,
    concatenated,
    from_column,
    gram_sets,
    ragged,
    runs,
    set_digests,
    spoken,
    taken,
    to_column,
    words,
)
from schemas.conversation import Message

texts = st.lists(st.sampled_from(["a", "b", "c", "ß", "你", "好", "，"]), max_size=12).map(" ".join)
MASK = 2**64 - 1


def sets_of(values: list[str]) -> list[set[int]]:
    sets = gram_sets(values)
    return [set(part.tolist()) for part in np.split(sets.hashes, sets.starts[1:-1])] if values else []


def slow_hash(gram: list[str]) -> int:
    """The definition in Python's unbounded integers: splitmix64 over blake2b-64 of the words."""
    state = 0
    for word in [*gram, *[None] * (3 - len(gram))]:
        state += (
            0
            if word is None
            else int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        )
        state = (state + 0x9E3779B97F4A7C15) & MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state


def slow_set(found: list[str]) -> set[int]:
    if len(found) < 3:
        return {slow_hash(found)} if found else set()
    return {slow_hash(found[i : i + 3]) for i in range(len(found) - 2)}


def test_hashes_are_pinned() -> None:
    """The hold-out ledger keeps them: another value here orphans every ledger."""
    assert gram_sets(["The quick brown fox", "hi"]).hashes.tolist() == PINNED


PINNED = [13880457723604550246, 14555863365263475802, 5392401556564153317]


@given(st.lists(texts, max_size=6))
def test_sets_are_those_of_the_slow_definition(values: list[str]) -> None:
    assert sets_of(values) == [slow_set(value.split()) for value in values]


@given(st.lists(st.text(max_size=30), max_size=6))
def test_sets_are_ascending_distinct_and_independent_of_the_neighbours(values: list[str]) -> None:
    sets = gram_sets(values)
    assert len(sets) == len(values)
    for i, value in enumerate(values):
        hashes = sets.hashes[sets.starts[i] : sets.starts[i + 1]].tolist()
        assert all(a < b for a, b in pairwise(hashes))
        assert hashes == gram_sets([value]).hashes.tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  QUICK\n\tfox", ["the", "quick", "fox"]),
        ("你好，world 再见", ["你", "好", "，", "world", "再", "见"]),
        ("カタカナ", ["カ", "タ", "カ", "ナ"]),
        ("안녕 하세요", ["안녕", "하세요"]),
        ("สวัสดี", list("สวัสดี")),
        ("𠀀𠀁x", ["𠀀", "𠀁", "x"]),
        ("ÉTÉ d'été", ["été", "d'été"]),
        (" \n\u3000\t", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_a_text_of_fewer_than_three_words_is_one_gram() -> None:
    cat, dog, cats, cat_dog = sets_of(["cat", "dog", "Cat ", "cat dog"])
    assert len(cat) == len(dog) == len(cat_dog) == 1
    assert cat == cats
    assert len(cat | dog | cat_dog) == 3


def test_a_lone_surrogate_is_hashed() -> None:
    assert sets_of(["a \ud800 b"]) != sets_of(["a \ud801 b"])


def test_what_two_saves_of_a_page_share_is_compared() -> None:
    assert spoken(Message("user", " a\n    b\u00a0c e\u0301")) == "a b c é"


def test_calls_with_other_arguments_are_other_turns() -> None:
    calls = [Message("assistant", "", {"tool_calls": [{"name": "f", "arguments": n}]}) for n in (1, 2)]
    assert spoken(calls[0]) != spoken(calls[1])
    assert spoken(Message("assistant", "x", {"model": "m"})) == spoken(Message("assistant", "x"))


def test_only_user_and_assistant_turns_are_compared() -> None:
    assert compared_text([("system", "s"), ("user", "u"), ("tool", "t"), ("assistant", "a")]) == "u a"


@given(st.lists(texts, max_size=6), st.data())
def test_columns_give_sets_back_whatever_their_chunks(values: list[str], data: st.DataObject) -> None:
    sets = gram_sets(values)
    column = to_column(sets.starts, sets.hashes)
    assert column.type == GRAMS_TYPE
    cut = data.draw(st.integers(0, len(values)))
    back = from_column(pa.chunked_array([column[:cut], column[cut:]], GRAMS_TYPE))
    assert back.starts.tolist() == sets.starts.tolist()
    assert back.hashes.tolist() == sets.hashes.tolist()
    slice_alone = from_column(pa.chunked_array([column[cut:]], GRAMS_TYPE))
    assert slice_alone.starts.tolist() == gram_sets(values[cut:]).starts.tolist()
    assert slice_alone.hashes.tolist() == gram_sets(values[cut:]).hashes.tolist()
    assert len(from_column(pa.chunked_array([], GRAMS_TYPE))) == 0


@given(st.lists(texts, min_size=1, max_size=5), st.lists(texts, max_size=5))
def test_taken_concatenated_and_digests_agree(first: list[str], second: list[str]) -> None:
    both = concatenated(gram_sets(first), gram_sets(second))
    whole = gram_sets(first + second)
    assert both.starts.tolist() == whole.starts.tolist()
    assert both.hashes.tolist() == whole.hashes.tolist()
    order = np.arange(len(whole))[::-1]
    assert taken(whole, order).hashes.tolist() == gram_sets((first + second)[::-1]).hashes.tolist()
    digests, contents = set_digests(whole).tolist(), [frozenset(s) for s in sets_of(first + second)]
    assert len(set(zip(digests, contents, strict=True))) == len(set(digests)) == len(set(contents))


@given(
    st.lists(texts, max_size=5),
    st.lists(texts, max_size=5),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_joined_sets_are_the_sets_of_both(
    first: list[str], second: list[str], limit: int, draw: Random
) -> None:
    joined, whole = JoinedSets(gram_sets(first), gram_sets(second)), gram_sets(first + second)
    rows = np.array(draw.choices(range(len(whole)), k=7) if len(whole) else [], np.int64)
    assert len(joined) == len(whole)
    assert joined.sizes.tolist() == whole.sizes.tolist()
    assert joined.of_rows(rows).hashes.tolist() == taken(whole, rows).hashes.tolist()
    assert joined.of_rows(rows).starts.tolist() == taken(whole, rows).starts.tolist()
    read = [(number, block.starts.tolist()) for number, block in joined.blocks(limit)]
    assert [number for number, _ in read] == [sum(len(s) - 1 for _, s in read[:n]) for n in range(len(read))]
    hashes = chain.from_iterable(block.hashes.tolist() for _, block in joined.blocks(limit))
    assert list(hashes) == whole.hashes.tolist()
    assert set_digests(joined).tolist() == set_digests(whole).tolist()


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5)), max_size=8))
def test_ragged_lists_the_indices_of_slices(slices: list[tuple[int, int]]) -> None:
    starts, lengths = np.array([s for s, _ in slices], np.int64), np.array([n for _, n in slices], np.int64)
    assert ragged(starts, lengths).tolist() == [s + i for s, n in slices for i in range(n)]


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 20), st.one_of(st.none(), st.integers(1, 4)))
def test_runs_cover_all_and_keep_the_limit(weights: list[int], limit: int, max_items: int | None) -> None:
    found = list(runs(np.array(weights, np.int64), limit=limit, max_items=max_items))
    assert [i for start, end in found for i in range(start, end)] == list(range(len(weights)))
    for start, end in found:
        assert sum(weights[start:end]) <= limit or end - start == 1
        assert max_items is None or end - start <= max_items
