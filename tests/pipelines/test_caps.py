"""Caps of sources: the lowest ids stay, whatever the order of rows and parts."""

from hypothesis import given
from hypothesis import strategies as st

from pipelines.caps import over_cap

IDS = st.lists(st.integers(0, 10**6).map(lambda n: f"{n:032x}"), unique=True, max_size=60)


@given(IDS, st.integers(1, 40), st.integers(1, 5), st.randoms(use_true_random=False))
def test_the_lowest_ids_of_a_source_stay_however_they_lie(
    ids: list[str], cap: int, num_parts: int, draw
) -> None:  # type: ignore[no-untyped-def]
    gone = set(draw.sample(ids, len(ids) // 3))
    shuffled = draw.sample(ids, len(ids))
    parts = [("a", shuffled[n::num_parts]) for n in range(num_parts)] + [
        ("b", ["f" * 32]),
        ("a", shuffled[:2]),
    ]
    drops = over_cap(parts, gone, {"a": cap})
    left = sorted(set(ids) - gone)
    assert set(drops) == set(left[cap:])
    assert all(drop.reason == "over_cap" for drop in drops.values())


def test_a_source_without_a_cap_keeps_all() -> None:
    assert over_cap([("a", ["1", "2"]), ("b", ["3"])], set(), {"c": 1}) == {}
