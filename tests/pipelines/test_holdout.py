"""No chat on two sides, nothing old moves, and neither order nor repetition changes a verdict."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import dedup, holdout, holdout_sides
from pipelines.feature_files import FeatureTable
from pipelines.holdout import LEDGER, HoldoutDecision
from pipelines.holdout_sides import draw_side
from schemas.conversation import Conversation, Message, holdout_key
from schemas.errors import InputError, IntegrityError
from schemas.pipeline_config import DedupConfig, HoldoutConfig, PipelineConfig
from schemas.source_config import SourceConfig

Sides: TypeAlias = dict[str, str]
EMPTY = LEDGER.empty_table()


def config_with(**settings: Any) -> PipelineConfig:
    source = SourceConfig(name="s", path="s.json")
    return PipelineConfig(run_root=Path("/nowhere"), sources=[source], holdout=HoldoutConfig(**settings))


def chat(row_id: str, first_turn: str, answer: str = "", **meta: Any) -> Conversation:
    messages = [Message("user", first_turn), Message("assistant", answer)]
    return Conversation(row_id, "s/f", 0, messages, {"holdout_key": holdout_key(messages)} | meta)


def decide(rows: list[Conversation], ledger: pa.Table, config: PipelineConfig) -> HoldoutDecision:
    return holdout.decide(holdout.features(rows, config), ledger, config)


def sides_of(decision: HoldoutDecision) -> Sides:
    return dict(zip(decision.sides["row_id"].to_pylist(), decision.sides["side"].to_pylist(), strict=True))


def drops_of(decision: HoldoutDecision) -> dict[str, str | None]:
    drops = decision.drops
    assert set(drops["reason"].to_pylist()) <= {"near_holdout"}
    return dict(zip(drops["row_id"].to_pylist(), drops["survivor"].to_pylist(), strict=True))


def first_turn_on(side: str, config: PipelineConfig, number: int = 0, tail: str = "") -> str:
    """The number-th of some texts whose key the hash puts on this side; all are far from each other."""
    found = -1
    for n in range(10_000):
        text = " ".join(f"w{n}x{i}" for i in range(8)) + tail
        found += draw_side(holdout_key([Message("user", text)]), config.holdout) == side
        if found == number:
            return text
    raise AssertionError(f"no text for {side}")


# --- features -----------------------------------------------------------------------------------------------

WORDS = st.text("ab \n<é中", max_size=12)


@given(st.lists(st.tuples(WORDS, WORDS, st.booleans()), min_size=1, max_size=8), st.randoms())
def test_features_out_of_those_of_dedup_are_the_same(
    said: list[tuple[str, str, bool]], draw: random.Random
) -> None:
    config = config_with()
    rows = [
        chat(f"{number:032x}", question, answer, **({"set": "train"} if trains else {}))
        for number, (question, answer, trains) in enumerate(said)
    ]
    left = draw.sample(rows, draw.randint(1, len(rows)))
    ids, metas = [row.row_id for row in left], [row.meta for row in left]
    found = holdout.features_by_dedup(ids, metas, dedup.features(rows, config), config)
    assert found is not None
    assert found.equals(holdout.features(left, config))


def test_features_that_dedup_lacks_are_not_taken_from_it() -> None:
    config, rows = config_with(), [chat("1", "a b c d"), chat("2", "e f g h", near_exempt=True)]
    ids, metas = [row.row_id for row in rows], [row.meta for row in rows]
    assert holdout.features_by_dedup(ids, metas, dedup.features(rows, config), config) is None
    without = config.model_copy(update={"dedup": DedupConfig(near=False)})
    assert holdout.features_by_dedup(ids[:1], metas[:1], dedup.features(rows, without), without) is None


# --- the draw -----------------------------------------------------------------------------------------------


def test_shares_are_as_configured() -> None:
    config = HoldoutConfig(validation=0.1, test=0.2)
    sides = [draw_side(holdout_key([Message("user", f"question {n}")]), config) for n in range(20_000)]
    assert sides.count("validation") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert sides.count("test") / 20_000 == pytest.approx(0.2, abs=0.01)


def test_the_draw_is_pinned() -> None:
    """Another side here would move every row of a run root that lost its ledger."""
    config = HoldoutConfig(validation=0.3, test=0.3)
    sides = [draw_side(f"{n:032x}", config) for n in range(10)]
    assert sides == PINNED


PINNED = [
    "train",
    "test",
    "test",
    "train",
    "train",
    "train",
    "train",
    "validation",
    "validation",
    "validation",
]


def test_another_seed_draws_others() -> None:
    keys = [f"{n:032x}" for n in range(100)]
    one, two = ([draw_side(k, HoldoutConfig(validation=0.3, test=0.3, seed=s)) for k in keys] for s in (0, 1))
    assert one != two


def test_rows_alone_go_where_the_hash_says() -> None:
    config = config_with(validation=0.3, test=0.3)
    rows = [chat(f"{n:03}", f"q{n} a{n} b{n} c{n}") for n in range(100)]
    decision = decide(rows, EMPTY, config)
    assert sides_of(decision) == {
        row.row_id: draw_side(row.meta["holdout_key"], config.holdout) for row in rows
    }
    assert len(decision.drops) == 0
    assert set(sides_of(decision).values()) == {"train", "validation", "test"}


def test_without_shares_all_rows_are_train() -> None:
    rows = [chat(f"{n:03}", f"question {n}") for n in range(100)]
    assert set(sides_of(decide(rows, EMPTY, config_with(validation=0, test=0))).values()) == {"train"}


# --- cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["train", "validation", "test"])
def test_later_versions_of_a_chat_inherit_its_side(side: str) -> None:
    config = config_with(validation=0.3, test=0.3)
    first_turn = first_turn_on(side, config)
    ledger = decide([chat("a", first_turn, "one answer")], EMPTY, config).ledger
    later = chat("b", f"  {first_turn}\n", "quite another answer, much longer than the one of before")
    assert sides_of(decide([later], ledger, config)) == {"b": side}
    shares_gone = config_with(validation=0, test=0)
    assert sides_of(decide([later], ledger, shares_gone)) == {"b": side}


@pytest.mark.parametrize("side", ["validation", "test"])
def test_a_new_row_near_a_held_out_one_goes_to_its_side(side: str) -> None:
    config = config_with(validation=0.3, test=0.3, near_threshold=0.5)
    held_out = first_turn_on(side, config)
    ledger = decide([chat("a", held_out)], EMPTY, config).ledger
    tails = (f" z{n}" for n in range(100))
    near = next(held_out + t for t in tails if draw_of(held_out + t, config) == "train")
    for rows in ([chat("b", near)], [chat("a", held_out), chat("b", near)]):
        assert sides_of(decide(rows, ledger, config))["b"] == side


def draw_of(first_turn: str, config: PipelineConfig) -> str:
    return draw_side(holdout_key([Message("user", first_turn)]), config.holdout)


def test_near_rows_that_are_all_new_share_one_draw() -> None:
    """A template of 200 rows would else be held out for certain: each draw is another chance."""
    config = config_with(validation=0.1, test=0.1, near_threshold=0.5)
    rows = [chat(f"{n:03}", "one two three four five six seven eight nine", f"{n}") for n in range(200)]
    for n, row in enumerate(rows):
        row.meta["holdout_key"] = f"{n:032x}"
    decision = decide(rows, EMPTY, config)
    assert set(sides_of(decision).values()) == {draw_side(f"{0:032x}", config.holdout)}
    assert len(decision.sides) == 200


def test_a_row_near_two_held_out_sides_is_dropped() -> None:
    config = config_with(validation=0.3, test=0.3, near_threshold=0.3)
    one, two = first_turn_on("validation", config), first_turn_on("test", config)
    ledger = decide([chat("a", one), chat("b", two)], EMPTY, config).ledger
    decision = decide([chat("a", one), chat("b", two), chat("c", f"{one} {two}")], ledger, config)
    assert drops_of(decision) == {"c": "b"}
    assert decision.drops["detail"].to_pylist() == ["Jaccard 0.429 with a test row"]
    assert sides_of(decision) == {"a": "validation", "b": "test"}


def test_the_survivor_is_the_lowest_id_though_its_row_has_left_the_folder() -> None:
    config = config_with(validation=0.3, test=0.3, near_threshold=0.3)
    one, two = first_turn_on("validation", config), first_turn_on("validation", config, number=1)
    ledger = decide([chat("a", one), chat("z", two)], EMPTY, config).ledger
    identity = chat("m", f"{one} {two}", set="train")
    assert drops_of(decide([chat("z", two), identity], ledger, config)) == {"m": "a"}


def test_a_dropped_row_is_no_survivor() -> None:
    """Both new rows are near a; each is near the other one too, which has left for a as well."""
    config = config_with(validation=0.3, test=0.3, near_threshold=0.3)
    one, two, three = (first_turn_on(side, config) for side in ("validation", "test", "train"))
    ledger = decide([chat("a", one), chat("b", two), chat("c", three)], EMPTY, config).ledger
    later = [chat("0", two, f"{one} {one}x"), chat("1", three, f"{one} {one}x")]
    assert drops_of(decide(later, ledger, config)) == {"0": "a", "1": "a"}


def test_which_of_two_held_out_rows_goes_does_not_hang_on_which_is_there() -> None:
    """They have come to count as near by a lower threshold."""
    strict, loose = (config_with(validation=0.3, test=0.3, near_threshold=t) for t in (0.9, 0.3))
    one = first_turn_on("validation", strict)
    two = next(one + f" z{n}" for n in range(99) if draw_of(one + f" z{n}", strict) == "test")
    low, high = chat("a", one), chat("z", two)
    ledger = decide([low, high], EMPTY, strict).ledger
    assert drops_of(decide([low, high], ledger, loose)) == {"z": "a"}
    assert drops_of(decide([high], ledger, loose)) == {"z": "a"}
    assert drops_of(decide([low], ledger, loose)) == {}


def test_equal_held_out_rows_take_one_line_of_the_ledger() -> None:
    config = config_with(validation=0.3, test=0.3)
    question = first_turn_on("test", config)
    rows = [chat(row_id, question, "same") for row_id in "cab"] + [chat("0", question, "other answer here")]
    ledger = decide(rows, EMPTY, config).ledger
    assert ledger["row_id"].to_pylist() == ["0", "a", None]
    assert set(ledger["side"].to_pylist()) == {"test"}


@pytest.mark.parametrize("large_star", [2, 64])
@pytest.mark.parametrize("chain", range(20))
def test_a_chain_has_one_side_though_its_ends_are_far_apart(chain: int, large_star: int) -> None:
    """Only neighbours are near; ids are such that the middle link lies between two rows that both follow others."""
    config = config_with(validation=0.3, test=0.3, near_threshold=0.85)
    row_ids = {0: "a", 1: "y", 2: "z", 3: "b"}
    words = [f"c{chain}w{n}" for n in range(23)]
    rows = [chat(row_ids[start], " ".join(words[start : start + 20])) for start in range(4)]
    assert [are_near(rows[0], row, 0.85) for row in rows] == [True, True, False, False]
    with mock.patch.object(holdout_sides, "_LARGE_STAR", large_star):
        sides = sides_of(decide(rows, EMPTY, config))
    assert set(sides.values()) == {draw_side(min(r.meta["holdout_key"] for r in rows), config.holdout)}


def test_an_old_train_row_keeps_its_place_against_a_new_row_near_both() -> None:
    config = config_with(validation=0.3, test=0.3, near_threshold=0.3)
    held_out, trained = first_turn_on("validation", config), first_turn_on("train", config)
    ledger = decide([chat("a", held_out), chat("b", trained)], EMPTY, config).ledger
    decision = decide(
        [chat("a", held_out), chat("b", trained), chat("0", f"{held_out} {trained}")], ledger, config
    )
    assert sides_of(decision) == {"a": "validation", "b": "train"}
    assert drops_of(decision) == {"0": "b"}


def test_a_later_version_of_a_train_chat_that_came_near_a_held_out_one_is_dropped() -> None:
    config = config_with(validation=0.3, test=0.3, near_threshold=0.5)
    held_out, trained = first_turn_on("validation", config), first_turn_on("train", config)
    ledger = decide([chat("a", held_out, "x"), chat("b", trained, "y")], EMPTY, config).ledger
    decision = decide([chat("c", trained, f"{held_out} {held_out}".replace(" ", "  "))], ledger, config)
    assert sides_of(decision) | drops_of(decision) == {"c": "train"}
    nearer = chat("d", trained, held_out + " tail " + held_out)
    nearer.messages[0] = Message("user", "short")  # cleaning may change what merging gave a key to
    assert drops_of(decide([nearer], ledger, config)) == {"d": "a"}


def test_rows_for_training_only_are_never_held_out_and_take_their_key_with_them() -> None:
    config = config_with(validation=0.3, test=0.3)
    question = first_turn_on("validation", config)
    rows = [chat("a", question, "I am a robot", set="train"), chat("b", question, "far off " * 20)]
    assert sides_of(decide(rows, EMPTY, config)) == {"a": "train", "b": "train"}


def test_rows_for_training_only_are_dropped_where_their_question_is_held_out() -> None:
    config = config_with(validation=0.3, test=0.3)
    question = first_turn_on("validation", config)
    ledger = decide([chat("b", question, "far off " * 20)], EMPTY, config).ledger
    decision = decide([chat("a", question, "I am a robot of that firm", set="train")], ledger, config)
    assert drops_of(decision) == {"a": "b"}
    assert len(decision.sides) == 0


@pytest.mark.parametrize("side", ["train", "validation", "test"])
def test_what_is_barred_from_the_hold_out_pulls_and_pushes_nobody(side: str) -> None:
    config = config_with(validation=0.3, test=0.3, near_threshold=0.5)
    question = first_turn_on("validation", config)
    ledger = decide([chat("b", question, "far off " * 20)], EMPTY, config).ledger
    tails = (" ".join(f"t{n}y{i}" for i in range(12)) for n in range(1000))
    text = next(tail for tail in tails if draw_of(tail, config) == side)
    barred = chat("a", question, text, set="train")
    new = chat("c", text, "and so on")
    assert are_near(barred, new, 0.3)
    config = config_with(validation=0.3, test=0.3, near_threshold=0.3)
    decision = decide([barred, new], ledger, config)
    assert drops_of(decision) == {"a": "b"}
    assert sides_of(decision) == {"c": side}


def test_rows_for_training_only_near_a_held_out_row_are_dropped() -> None:
    config = config_with(validation=0.3, test=0.3, near_threshold=0.5)
    question = first_turn_on("test", config)
    ledger = decide([chat("b", question)], EMPTY, config).ledger
    decision = decide([chat("a", question + " indeed", set="train"), chat("b", question)], ledger, config)
    assert drops_of(decision) == {"a": "b"}
    assert sides_of(decision) == {"b": "test"}


def test_rows_without_text_follow_their_key() -> None:
    config = config_with(validation=0.3, test=0.3)
    rows = [chat(f"{n}", "") for n in range(5)]
    decision = decide(rows, EMPTY, config)
    assert set(sides_of(decision).values()) == {draw_of("", config)}
    assert decision.ledger.equals(decide(rows, decision.ledger, config).ledger)


def test_no_rows_and_no_ledger_make_an_empty_decision() -> None:
    decision = decide([], EMPTY, config_with())
    assert decision.sides.schema == holdout.SIDES
    assert decision.drops.schema == holdout.DROPPED
    assert decision.ledger.equals(EMPTY)


def test_a_row_without_a_key_is_refused() -> None:
    row = chat("a", "x")
    del row.meta["holdout_key"]
    with pytest.raises(InputError, match=r"row a .* no meta.holdout_key"):
        holdout.features([row], config_with())


@pytest.mark.parametrize("side", ["trian", None])
def test_a_ledger_with_an_unknown_side_is_refused(side: str | None) -> None:
    ledger = pa.table({"holdout_key": ["k"], "side": [side], "row_id": [None], "grams": [[]]})
    with pytest.raises(IntegrityError, match="expected one of train, validation, test"):
        decide([], ledger, config_with())


def test_a_ledger_with_a_key_on_two_sides_is_refused() -> None:
    lines = {"holdout_key": ["k", "k"], "side": ["train", "test"], "row_id": [None, "r"], "grams": [[], [1]]}
    with pytest.raises(IntegrityError, match="key k on side 'test' and 'train'"):
        decide([], pa.table(lines, schema=LEDGER), config_with())


def test_a_ledger_without_grams_is_refused() -> None:
    with pytest.raises(IntegrityError, match="no column 'grams'"):
        decide([], EMPTY.drop_columns(["grams"]), config_with())


def test_the_ledger_goes_through_parquet(tmp_path: Path) -> None:
    config = config_with(validation=0.3, test=0.3)
    rows = [chat(f"{n:03}", f"q{n} a{n} b{n} c{n}") for n in range(50)]
    decision = decide(rows, EMPTY, config)
    pq.write_table(decision.ledger, tmp_path / "holdout.parquet", compression="zstd", row_group_size=7)
    again = decide(rows, pq.read_table(tmp_path / "holdout.parquet"), config)
    assert again.ledger.equals(decision.ledger)
    assert again.sides.equals(decision.sides)


# --- any rows, any weeks ------------------------------------------------------------------------------------

# Few words and few keys: near rows, shared keys and chains are common.
any_text = st.lists(st.sampled_from("abcd"), max_size=7).map(" ".join)
any_row = st.tuples(any_text, any_text, st.sampled_from(["any", "any", "any", "train"]))
any_settings = st.fixed_dictionaries(
    {
        "validation": st.sampled_from([0.0, 0.2, 0.4]),
        "test": st.sampled_from([0.0, 0.3, 0.45]),
        "near_threshold": st.sampled_from([0.3, 0.5, 0.8]),
        "seed": st.integers(0, 3),
    }
)


@st.composite
def any_rows(draw: st.DrawFn, prefix: str = "", max_size: int = 12) -> list[Conversation]:
    """Row ids are drawn, so that new rows come before and behind old ones."""
    contents = draw(st.lists(any_row, max_size=max_size))
    numbers = draw(st.lists(st.integers(0, 99), min_size=len(contents), max_size=len(contents), unique=True))
    rows = []
    for number, (first_turn, answer, side) in zip(numbers, contents, strict=True):
        row = chat(f"{number:02}{prefix}", first_turn, answer)
        rows.append(row if side == "any" else chat(row.row_id, first_turn, answer, set="train"))
    return rows


def grams(row: Conversation) -> set[tuple[str, ...]]:
    words = " ".join(message.content for message in row.messages).split()
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))} if words else set()


def are_near(one: Conversation, two: Conversation, threshold: float) -> bool:
    a, b = grams(one), grams(two)
    return bool(a and b) and len(a & b) / len(a | b) >= threshold


def check_promises(rows: list[Conversation], decision: HoldoutDecision, config: PipelineConfig) -> None:
    sides, drops = sides_of(decision), drops_of(decision)
    assert sorted([*sides, *drops]) == sorted(row.row_id for row in rows)
    kept = [row for row in rows if row.row_id in sides]
    for one in kept:
        assert one.meta.get("set") != "train" or sides[one.row_id] == "train"
        for two in kept:
            same_key = one.meta["holdout_key"] == two.meta["holdout_key"]
            if same_key or are_near(one, two, config.holdout.near_threshold):
                assert sides[one.row_id] == sides[two.row_id]
    by_id = {row.row_id: row for row in rows}
    held_out = {row_id for row_id in decision.ledger["row_id"].to_pylist() if row_id is not None}
    for row_id, survivor in drops.items():
        assert survivor not in drops
        assert survivor is None or survivor in sides or survivor in held_out
        if survivor in sides:
            one, two = by_id[row_id], by_id[survivor]
            same_key = one.meta["holdout_key"] == two.meta["holdout_key"]
            assert same_key or are_near(one, two, config.holdout.near_threshold)


def same(one: HoldoutDecision, two: HoldoutDecision) -> bool:
    return one.sides.equals(two.sides) and one.drops.equals(two.drops) and one.ledger.equals(two.ledger)


@given(any_rows(), any_settings)
def test_a_first_run_keeps_the_promises_and_drops_nothing(
    rows: list[Conversation], settings: dict[str, Any]
) -> None:
    config = config_with(**settings)
    decision = decide(rows, EMPTY, config)
    check_promises(rows, decision, config)
    assert len(decision.drops) == 0


@given(any_rows(), any_settings)
def test_a_first_run_draws_once_for_what_hangs_together(
    rows: list[Conversation], settings: dict[str, Any]
) -> None:
    config = config_with(**settings)
    with mock.patch.object(holdout_sides, "_LARGE_STAR", 2):
        sides = sides_of(decide(rows, EMPTY, config))
    for group in plain_components(rows, config.holdout.near_threshold):
        if any(row.meta.get("set") == "train" for row in group):
            expected = "train"
        else:
            expected = draw_side(min(row.meta["holdout_key"] for row in group), config.holdout)
        assert {sides[row.row_id] for row in group} == {expected}


def plain_components(rows: list[Conversation], threshold: float) -> list[list[Conversation]]:
    """Grown one by one: rows of one key, or near, hang together."""
    groups: list[list[Conversation]] = []
    for row in rows:
        linked = [
            g
            for g in groups
            if any(row.meta["holdout_key"] == o.meta["holdout_key"] or are_near(row, o, threshold) for o in g)
        ]
        groups = [g for g in groups if g not in linked] + [[row, *(o for g in linked for o in g)]]
    return groups


@given(
    any_rows("a"), any_rows("b"), any_rows("c"), any_settings, any_settings, st.randoms(use_true_random=False)
)
def test_weeks_keep_the_promises_and_move_nothing(
    first: list[Conversation],
    second: list[Conversation],
    third: list[Conversation],
    settings: dict[str, Any],
    other_settings: dict[str, Any],
    chance: random.Random,
) -> None:
    """Rows come and go, shares and seed change: the threshold alone stays."""
    ledger, old_sides, rows = EMPTY, {}, []
    held_out: list[tuple[Conversation, str]] = []  # of all weeks, still in the folder or not
    for week, new_rows in enumerate((first, second, third)):
        shares = (settings, other_settings)[week % 2] | {"near_threshold": settings["near_threshold"]}
        config = config_with(**shares)
        rows = [row for row in rows if chance.random() < 0.8] + new_rows
        decision = decide(rows, ledger, config)
        check_promises(rows, decision, config)
        sides = sides_of(decision)
        for row in rows:
            assert sides.get(row.row_id) == old_sides.get(row.row_id, sides.get(row.row_id))
        held_out += [(row, sides[row.row_id]) for row in rows if sides.get(row.row_id, "train") != "train"]
        for row, old, side in ((row, *line) for row in rows for line in held_out if row.row_id in sides):
            assert sides[row.row_id] == side or not are_near(row, old, config.holdout.near_threshold)
        assert same(decide(rows, decision.ledger, config), decision), "deciding again decides otherwise"
        assert set(ledger_lines(ledger)) <= set(ledger_lines(decision.ledger)), "the ledger lost a line"
        ledger, old_sides = decision.ledger, old_sides | sides


@given(any_rows("a"), any_rows("b"), any_settings, any_settings, st.randoms(use_true_random=False))
def test_neither_order_nor_parts_matter(
    first: list[Conversation],
    second: list[Conversation],
    settings: dict[str, Any],
    later: dict[str, Any],
    shuffler: random.Random,
) -> None:
    config = config_with(**later)
    ledger = decide(first, EMPTY, config_with(**settings)).ledger
    rows = first + second
    expected = decide(rows, ledger, config)
    shuffled = shuffler.sample(rows, len(rows))
    cut = shuffler.randint(0, len(rows))
    features = pa.concat_tables([holdout.features(part, config) for part in (shuffled[:cut], shuffled[cut:])])
    lines = pa.array(shuffler.sample(range(len(ledger)), len(ledger)), pa.int64())
    assert same(holdout.decide(features, ledger.take(lines), config), expected)
    again = shuffler.sample(range(len(rows)), len(rows) // 2)
    with_copies = FeatureTable(pa.concat_tables([features, features.take(pa.array(again, pa.int64()))]))
    present = np.arange(len(with_copies)) < len(rows)
    decided = holdout.decide_rows(with_copies, ledger, config, present=present)
    sides = holdout.sides_by_id(features["row_id"], decided.sides[: len(rows)])
    assert same(HoldoutDecision(sides, decided.drops, decided.ledger), expected)
    assert decided.sides[len(rows) :].tolist() == decided.sides[again].tolist(), "copies go with their row"
    parts = list(decided.of_parts([cut, len(with_copies) - cut]))
    assert np.concatenate([sides for sides, _ in parts]).tolist() == decided.sides.tolist()
    told = parts[0][1] | {cut + number: drop for number, drop in parts[1][1].items()}
    lines = {line["row_id"]: line for line in expected.drops.to_pylist()}
    ids = with_copies.column("row_id").to_pylist()
    dropped = {number: lines[row_id] for number, row_id in enumerate(ids) if row_id in lines}
    assert {number: asdict(drop) for number, drop in told.items()} == {
        number: {name: line[name] for name in ("reason", "detail", "survivor")}
        for number, line in dropped.items()
    }


@given(any_rows("a"), any_rows("b"), any_settings, any_settings)
def test_the_promises_hold_when_the_threshold_changes(
    first: list[Conversation], second: list[Conversation], settings: dict[str, Any], later: dict[str, Any]
) -> None:
    """Rows that count as near only now may be dropped, yet none changes sides."""
    before = decide(first, EMPTY, config_with(**settings))
    config = config_with(**later)
    decision = decide(first + second, before.ledger, config)
    check_promises(first + second, decision, config)
    old, new = sides_of(before), sides_of(decision)
    assert all(new[row_id] == side for row_id, side in old.items() if row_id in new)
    assert same(decide(first + second, decision.ledger, config), decision)


def ledger_lines(ledger: pa.Table) -> list[tuple[Any, ...]]:
    return [(*list(line.values())[:3], tuple(line["grams"])) for line in ledger.to_pylist()]
