"""Every verdict is the one of a plain reading of the rules, whatever the order of rows and parts."""

import gzip
import json
import random
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from selectolax.lexbor import LexborHTMLParser

from pipelines import dedup
from pipelines.cluster_report import largest_clusters
from schemas.conversation import Conversation, Message
from schemas.pipeline_config import DedupConfig, PipelineConfig
from schemas.source_config import SourceConfig

Verdicts = dict[str, tuple[str, str]]


def config_with(**settings: Any) -> PipelineConfig:
    sources = [SourceConfig(name=name, path=f"{name}.json") for name in ("s", "good", "best")]
    return PipelineConfig(run_root=Path("/nowhere"), sources=sources, dedup=DedupConfig(**settings))


def chat(row_id: str, *turns: str | tuple[str, str], **meta: Any) -> Conversation:
    """Bare texts are user and assistant turns by turns."""
    roles = ("user", "assistant")
    messages = [
        Message(*(turn if isinstance(turn, tuple) else (roles[number % 2], turn)))  # type: ignore[arg-type]
        for number, turn in enumerate(turns)
    ]
    return Conversation(row_id, meta.pop("source", "s/file.json"), 0, messages, meta)


def verdict_table(rows: list[Conversation], **settings: Any) -> pa.Table:
    config = config_with(**settings)
    verdicts = dedup.decide(dedup.features(rows, config), config).verdicts
    assert verdicts.schema == dedup.VERDICTS
    return verdicts


def verdicts_of(rows: list[Conversation], **settings: Any) -> Verdicts:
    table = verdict_table(rows, **settings)
    return {row["row_id"]: (row["reason"], row["survivor"]) for row in table.to_pylist()}


# --- exact --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copy",
    [
        chat("b", "Hello  there\n", "Hi."),
        chat("b", ("system", ""), ("user", "Hello there"), ("assistant", "Hi.")),
        chat("b", "Hello there", "Hi.", language=[["en", 1.0]]),
    ],
    ids=["white space", "empty system prompt", "meta"],
)
def test_equal_turns_are_duplicates(copy: Conversation) -> None:
    assert verdicts_of([chat("a", "Hello there", "Hi."), copy], near=False) == {"b": ("duplicate", "a")}


@pytest.mark.parametrize(
    "other",
    [
        chat("b", ("system", "Be brief."), ("user", "Hello there"), ("assistant", "Hi.")),
        chat("b", ("assistant", "Hello there"), ("user", "Hi.")),
        chat("b", "Hello", "there Hi."),
        chat("b", "hello there", "Hi."),
        chat("b", "Hello there", "Hi.", tools=[{"name": "clock"}]),
    ],
    ids=["system prompt", "roles", "border of turns", "case", "tools"],
)
def test_other_turns_are_no_duplicates(other: Conversation) -> None:
    assert verdicts_of([chat("a", "Hello there", "Hi."), other], near=False) == {}


def test_system_prompts_do_not_count_for_near_duplicates() -> None:
    rows = [
        chat("a", ("system", "Be brief."), ("user", "a b c d"), ("assistant", "e f g h")),
        chat("b", ("system", "You are a pirate."), ("user", "a b c d"), ("assistant", "e f g h")),
    ]
    assert verdicts_of(rows) == {"b": ("near_duplicate", "a")}


def test_other_tool_calls_are_neither_exact_nor_near_duplicates() -> None:
    rows = [chat(name, "What is the weather there?", "") for name in "ab"]
    for row, city in zip(rows, ("Paris", "Rome"), strict=True):
        row.messages[1].extras["tool_calls"] = [{"name": "weather", "arguments": {"city": city}}]
    assert verdicts_of(rows) == {}


# --- survivor order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "survivor"),
    [
        ({"row_id": "b"}, {"row_id": "a"}, "a"),
        ({"row_id": "a", "date": "2023-01-01"}, {"row_id": "b", "date": "2023-01-02"}, "b"),
        ({"row_id": "b", "date": "1901-01-01"}, {"row_id": "a"}, "b"),
        ({"row_id": "b", "source": "good/f"}, {"row_id": "a", "source": "other/f"}, "b"),
        ({"row_id": "b", "source": "best/f"}, {"row_id": "a", "source": "good/f"}, "b"),
        (
            {"row_id": "a", "source": "best/f"},
            {"row_id": "b", "source": "other/f", "date": "2023-01-01"},
            "b",
        ),
        ({"row_id": "b", "date": "2023-01-01"}, {"row_id": "a", "date": "yesterday"}, "b"),
        (
            {"row_id": "b", "date": "2023-01-01T23:30:00Z"},
            {"row_id": "a", "date": "2023-01-02T00:15:00+01:00"},
            "b",
        ),
    ],
    ids=["row id", "date", "no date", "source", "better source", "date first", "not a date", "zones"],
)
def test_the_latest_date_then_the_best_source_then_the_lowest_id_survives(
    first: dict[str, Any], second: dict[str, Any], survivor: str
) -> None:
    rows = [chat(meta.pop("row_id"), "question", "answer", **meta) for meta in (dict(first), dict(second))]
    kept = [kept for _, kept in verdicts_of(rows, source_rank=["best", "good"]).values()]
    assert kept == [survivor]


def test_the_longest_survives_before_date_and_id() -> None:
    words = " ".join(f"word{n}" for n in range(40))
    rows = [chat("a", "q", words, date="2024-01-01"), chat("b", "q", f"{words} more", date="2023-01-01")]
    assert verdicts_of(rows) == {"a": ("near_duplicate", "b")}


def test_padding_does_not_make_a_chat_longer() -> None:
    assert verdicts_of([chat("a", "q", "x y"), chat("b", "q", "x" + " " * 99 + "y")]) == {
        "b": ("duplicate", "a")
    }


# --- branches -----------------------------------------------------------------------------------------------


def test_a_beginning_goes_for_the_chat_that_none_extends() -> None:
    rows = [chat("a", "1", "2"), chat("b", "1", "2", "3", "4"), chat("c", "1", "2", "3", "4", "5", "6")]
    assert verdicts_of(rows) == {"a": ("branch_of_longer", "c"), "b": ("branch_of_longer", "c")}


def test_a_beginning_goes_for_the_end_of_the_chain_though_the_middle_comes_first_in_the_order() -> None:
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    rows = [chat("a", *turns[:2]), chat("b", *turns), chat("c", *turns, ("tool", "done"))]
    assert verdicts_of(rows) == {"a": ("branch_of_longer", "c"), "b": ("branch_of_longer", "c")}


def test_of_two_longer_chats_the_first_in_the_order_survives() -> None:
    rows = [chat("a", "1", "2"), chat("b", "1", "2", "3", "4"), chat("c", "1", "2", "3", "44")]
    assert verdicts_of(rows) == {"a": ("branch_of_longer", "c")}


def test_empty_turns_that_extend_a_chat_count() -> None:
    assert verdicts_of([chat("a", "1", "2"), chat("b", "1", "2", "", "")]) == {"a": ("branch_of_longer", "b")}


def test_a_beginning_that_breaks_off_inside_a_turn_is_no_branch() -> None:
    assert verdicts_of([chat("a", "1", "one two"), chat("b", "1", "one two three", "2", "3")]) == {}


def test_a_beginning_under_another_system_prompt_is_no_branch() -> None:
    rows = [chat("a", ("user", "1")), chat("b", ("system", "s"), ("user", "1"), ("assistant", "2"))]
    assert verdicts_of(rows) == {}


def test_chats_without_turns_are_copies_of_each_other_and_begin_nothing() -> None:
    assert verdicts_of([chat("a"), chat("b"), chat("c", "1", "2")]) == {"b": ("duplicate", "a")}


def test_copies_of_a_beginning_all_go_when_copies_are_kept() -> None:
    rows = [chat("a", "1", "2"), chat("b", "1", "2"), chat("c", "1", "2", "3"), chat("d", "1", "2", "3")]
    expected = {"a": ("branch_of_longer", "c"), "b": ("branch_of_longer", "c")}
    assert verdicts_of(rows, exact=False, near=False) == expected


# --- near ---------------------------------------------------------------------------------------------------


def text_with(words: range) -> str:
    return " ".join(f"w{n}" for n in words)


def test_a_chain_loses_only_the_row_next_to_a_survivor() -> None:
    rows = [
        chat(name, text_with(range(start, start + 20))) for name, start in (("a", 10), ("b", 11), ("c", 13))
    ]
    verdicts = verdict_table(rows, near_threshold=0.8).to_pylist()
    assert [(v["row_id"], v["survivor"], v["detail"]) for v in verdicts] == [("b", "a", "Jaccard 0.895")]


def test_chinese_is_compared_by_characters() -> None:
    text = "机器学习是人工智能的一个分支，它使计算机能够从数据中学习并改进其性能，而无需进行明确的编程。"
    rows = [chat("a", "什么是机器学习？", text), chat("b", "什么是机器学习？", text.replace("明确", "显式"))]
    assert verdicts_of(rows) == {"b": ("near_duplicate", "a")}
    assert verdicts_of([chat("a", "什么", text), chat("b", "什么", text[::-1])]) == {}


def test_short_texts_are_not_merged() -> None:
    assert verdicts_of(
        [chat("a", "cat"), chat("b", "dog"), chat("c", "Cat"), chat("d", "a b"), chat("e", "")]
    ) == {"c": ("near_duplicate", "a")}


def test_rows_without_text_are_never_near() -> None:
    rows = [chat("a", ("system", "x")), chat("b", ("tool", "y")), chat("c", "", "")]
    assert verdicts_of(rows) == {}


def test_paths_of_a_tree_are_near_others_but_not_each_other() -> None:
    text = text_with(range(30))
    rows = [chat(name, "q", f"{text} {name}", group="tree-1") for name in "abc"]
    assert verdicts_of(rows) == {}
    outsider = chat("z", "q", f"{text} longer", source="other/file")
    assert verdicts_of([*rows, outsider]) == dict.fromkeys("abc", ("near_duplicate", "z"))


def test_identity_rows_are_near_nothing_but_exact_copies_go() -> None:
    text = text_with(range(30))
    rows = [chat(name, "q", f"{text} {name}", near_exempt=True, set="train") for name in "abc"]
    outsider = chat("z", "q", f"{text} longer", source="other/file")
    assert verdicts_of([*rows, outsider]) == {}
    copy = chat("d", "q", f"{text} a", source="other/file")
    assert verdicts_of([*rows, copy]) == {"d": ("duplicate", "a")}


def test_exempt_rows_of_two_groups_are_compared() -> None:
    text = text_with(range(30))
    assert verdicts_of([chat("a", text, "x", group="1"), chat("b", text, "y", group="2")]) == {
        "b": ("near_duplicate", "a")
    }


@pytest.mark.parametrize("off", ["exact", "branches", "near"])
def test_each_step_can_be_switched_off(off: str) -> None:
    text = text_with(range(30))
    rows = [
        chat("a", text, "x"),
        chat("b", text, "x"),  # exact copy of a
        chat("c", text, "x", "and", " ".join(f"v{n}" for n in range(90))),  # continues a
        chat("d", text_with(range(50, 90)), "y"),
        chat("e", text_with(range(50, 90)), "Y"),  # near copy of d
    ]
    everything = verdicts_of(rows)
    assert {name: reason for name, (reason, _) in everything.items()} == {
        "a": "branch_of_longer",
        "b": "duplicate",
        "e": "near_duplicate",
    }
    reasons = {"exact": "duplicate", "branches": "branch_of_longer", "near": "near_duplicate"}
    assert reasons[off] not in {reason for reason, _ in verdicts_of(rows, **{off: False}).values()}


# --- system prompts and code ---------------------------------------------------------------------------------

CODE = "\n".join(f"    values[{n}] = measure(channel_{n}, gain={n % 7})" for n in range(60))
ASKED = ("Why is the third channel so noisy here?", "How would you write this as a loop over channels?")
SAID = ("Its gain is the highest of all.", "Put the calls into a comprehension over a range.")


@pytest.mark.parametrize("code", [f"```python\n{CODE}\n```", f"def read():\n{CODE}\n    return values"])
def test_shared_code_makes_no_chats_similar(code: str) -> None:
    rows = [chat(name, f"{ASKED[n]}\n\n{code}", f"{SAID[n]}\n\n{code}") for n, name in enumerate("ab")]
    plain = [chat(name, f"{ASKED[n]} {code.split()}", SAID[n]) for n, name in enumerate("ab")]
    assert verdicts_of(rows) == {}
    assert set(verdicts_of(plain)) == {"a"}, "without the rule for code they would be near"


def test_chats_with_code_are_near_where_their_prose_is_too() -> None:
    prose = text_with(range(30))
    fenced = f"```python\n{CODE}\n```"
    rows = [
        chat("a", f"{prose}\n\n{fenced}", "x"),
        chat("b", f"{prose}\n\n{fenced}", "y!"),
        chat("c", f"{prose}\n\n```\nother()\n```", "x"),  # the same prose about other code
        chat("d", fenced, fenced),  # nothing but code
        chat("e", fenced, f"{fenced}\n"),
    ]
    assert verdicts_of(rows) == {"a": ("near_duplicate", "b"), "e": ("duplicate", "d")}
    almost = fenced.replace("channel_7,", "channel_x,")
    assert verdicts_of([chat("d", fenced, fenced), chat("e", fenced, almost)]) == {
        "e": ("near_duplicate", "d")
    }


def test_shared_system_prompts_make_no_chats_similar() -> None:
    system = ("system", text_with(range(200)))
    rows = [chat(name, system, ("user", ASKED[n]), ("assistant", SAID[n])) for n, name in enumerate("ab")]
    assert verdicts_of(rows) == {}


# --- counts -------------------------------------------------------------------------------------------------


def test_rows_of_the_same_first_prompt_or_answers_are_counted() -> None:
    rows = [
        chat("a", "one and only", "first"),
        chat("b", "one and only", "second"),
        chat("c", "one and  only", "third", "more?", "yes"),
        chat("d", "two", "first"),
        chat("e", "three", "third", "and?", "yes"),
        chat("f", "three", "third", "and?", "yes"),  # a copy, and gone
        chat("g", ("assistant", "alone")),
        chat("h"),
        chat("i", ("system", "no turns")),
    ]
    config = config_with()
    counts = dedup.decide(dedup.features(rows, config), config).counts
    assert (counts["same_first_prompt_rows"], counts["same_answers_rows"]) == (3, 4)
    assert counts["near_largest_bucket_rows"] == 0


def test_the_largest_bucket_is_counted() -> None:
    rows = [chat(f"{n}", text_with(range(20)), f"answer {n}") for n in range(7)]
    config = config_with()
    assert dedup.decide(dedup.features(rows, config), config).counts["near_largest_bucket_rows"] == 7


turn_texts = st.lists(st.sampled_from("abcd"), max_size=5).map(" ".join)
any_chats = st.builds(
    lambda turns, meta, system: (([("system", system)] if system else []) + turns, meta),
    st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), turn_texts), max_size=4),
    st.fixed_dictionaries(
        {}, optional={"date": st.sampled_from(["2023-01-01", "2024-02-03T04:05:06"]), "group": st.just("g")}
    ),
    st.sampled_from(["", "", "", "be brief"]),
)
any_rows = st.lists(any_chats, max_size=12).map(
    lambda chats: [chat(f"{n:02}", *turns, **meta) for n, (turns, meta) in enumerate(chats)]
)
any_settings = st.fixed_dictionaries(
    {"near_threshold": st.sampled_from([0.3, 0.5, 0.8, 1.0])},
    optional={"exact": st.booleans(), "branches": st.booleans(), "near": st.booleans()},
)


# --- earlier runs -------------------------------------------------------------------------------------------


def against(
    rows: list[Conversation], earlier: list[Conversation], **settings: Any
) -> dict[str, tuple[str, str]]:
    config = config_with(**settings)
    tables = [dedup.features(rows, config) for rows in (rows, earlier)]
    verdicts = dedup.decide(tables[0], config, tables[1]).verdicts.to_pylist()
    assert all(
        row["detail"].endswith(", in an earlier run") == (row["survivor"] in "ABCX") for row in verdicts
    )
    return {row["row_id"]: (row["reason"], row["survivor"]) for row in verdicts}


def test_what_an_earlier_run_has_is_not_taken_again() -> None:
    text, other = text_with(range(30)), text_with(range(40, 80))
    earlier = [chat("A", text, "x"), chat("B", "1", "2", "3", "4"), chat("C", text, "x")]
    rows = [
        chat("a", text, "x"),
        chat("b", "1", "2"),
        chat("c", f"{text} and more", "x"),  # longer, but what is there stays
        chat("d", "1", "2", "3", "4", "5", text_with(range(90, 99))),  # goes on where B ends: new
        chat("e", other, "y"),
        chat("f", other, "y!"),
    ]
    assert against(rows, earlier) == {
        "a": ("duplicate", "A"),
        "b": ("branch_of_longer", "d"),
        "c": ("near_duplicate", "A"),
        "e": ("near_duplicate", "f"),
    }


def test_a_row_that_an_earlier_run_has_too_is_its_own_survivor() -> None:
    rows = [chat("X", text_with(range(30)), "x"), chat("y", text_with(range(30)), "y")]
    verdicts = against(rows, rows[:1])
    assert verdicts == {"X": ("duplicate", "X"), "y": ("near_duplicate", "X")}
    table = pa.Table.from_pylist(
        [
            {"row_id": row, "reason": why, "detail": "", "survivor": kept}
            for row, (why, kept) in verdicts.items()
        ]
    )
    (cluster,) = largest_clusters(table)
    assert (cluster["survivor"], cluster["num_rows_dropped"]) == ("X", 2)


@given(any_rows, any_rows, any_settings)
def test_against_nothing_and_against_itself(
    rows: list[Conversation], others: list[Conversation], settings: dict[str, Any]
) -> None:
    """No row of ours stays that says exactly what an earlier one says, and earlier rows only take rows away."""
    config = config_with(**(settings | {"exact": True}))
    ours, earlier = dedup.features(rows, config), dedup.features(others, config)
    left = {row.row_id for row in rows} - set(
        dedup.decide(ours, config, earlier).verdicts["row_id"].to_pylist()
    )
    known = {tuple(turns_of(row)) for row in others}
    assert not any(tuple(turns_of(row)) in known for row in rows if row.row_id in left)
    assert set(dedup.decide(ours, config, ours).verdicts["row_id"].to_pylist()) == {
        row.row_id for row in rows
    }


# --- any rows, any order ------------------------------------------------------------------------------------


@given(any_rows, any_settings)
def test_verdicts_are_those_of_a_plain_reading_of_the_rules(
    rows: list[Conversation], settings: dict[str, Any]
) -> None:
    assert verdicts_of(rows, **settings) == plain_reading(rows, DedupConfig(**settings))


@given(any_rows, any_settings, st.randoms(use_true_random=False))
def test_neither_order_nor_parts_matter(
    rows: list[Conversation], settings: dict[str, Any], shuffler: random.Random
) -> None:
    config = config_with(**settings)
    expected = dedup.decide(dedup.features(rows, config), config)
    shuffled = shuffler.sample(rows, len(rows))
    cuts = sorted(shuffler.randint(0, len(rows)) for _ in range(2))
    parts = [shuffled[: cuts[0]], shuffled[cuts[0] : cuts[1]], shuffled[cuts[1] :]]
    features = pa.concat_tables([dedup.features(part, config) for part in parts])
    found = dedup.decide(features, config)
    assert found.verdicts.equals(expected.verdicts)
    assert found.counts == expected.counts


def plain_reading(rows: list[Conversation], config: DedupConfig) -> Verdicts:
    """The rules, row by row on strings; texts here are single-spaced and lower-case."""
    order = sorted(rows, key=survivor_order)
    verdicts: Verdicts = {}
    if config.exact:
        first: dict[Any, str] = {}
        for row in order:
            survivor = first.setdefault(tuple(turns_of(row)), row.row_id)
            if survivor != row.row_id:
                verdicts[row.row_id] = ("duplicate", survivor)
    if config.branches:
        left = [row for row in order if row.row_id not in verdicts]
        short = {row.row_id for row in left if any(begins(row, other) for other in left)}
        for row in left:
            if row.row_id in short:
                longer = [o.row_id for o in left if begins(row, o) and o.row_id not in short]
                verdicts[row.row_id] = ("branch_of_longer", longer[0])
    if config.near:
        stay: list[Conversation] = []
        for row in order:
            if row.row_id in verdicts:
                continue
            near = [other for other in stay if are_near(row, other, config.near_threshold)]
            if near:
                verdicts[row.row_id] = ("near_duplicate", near[0].row_id)
            else:
                stay.append(row)
    return verdicts


def survivor_order(row: Conversation) -> tuple[int, float, str]:
    date = row.meta.get("date")
    seconds = datetime.fromisoformat(date).replace(tzinfo=timezone.utc).timestamp() if date else float("-inf")
    num_chars = sum(len(m.content) for m in row.messages if m.role in ("user", "assistant"))
    return (-num_chars, -seconds, row.row_id)


def turns_of(row: Conversation) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in row.messages if m.role != "system" or m.content]


def begins(row: Conversation, other: Conversation) -> bool:
    turns, others = turns_of(row), turns_of(other)
    return 0 < len(turns) < len(others) and others[: len(turns)] == turns


def compared(row: Conversation) -> str:
    return " ".join(m.content for m in row.messages if m.role in ("user", "assistant"))


def are_near(row: Conversation, other: Conversation, threshold: float) -> bool:
    if row.meta.get("group") and row.meta.get("group") == other.meta.get("group"):
        return False
    one, two = grams_of(compared(row)), grams_of(compared(other))
    return bool(one and two) and len(one & two) / len(one | two) >= threshold


def grams_of(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))} if words else set()


# --- clusters -----------------------------------------------------------------------------------------------


def test_the_largest_clusters_follow_survivors_to_the_end() -> None:
    text = text_with(range(30))
    rows = [
        chat("a", text, "x y z"),
        chat("b", text, "x y z"),  # copy of a
        chat("c", text, "x y z longer"),  # a is near to it
        *(chat(f"k{n}", "other", "words") for n in range(4)),
    ]
    table = verdict_table(rows)
    clusters = largest_clusters(table)
    assert [(cluster["survivor"], cluster["num_rows_dropped"]) for cluster in clusters] == [
        ("k0", 3),
        ("c", 2),
    ]
    assert clusters[1]["reasons"] == {"duplicate": 1, "near_duplicate": 1}
    assert [row["row_id"] for row in clusters[0]["rows"]] == ["k0", "k1", "k2"]
    assert largest_clusters(table, n=1) == clusters[:1]
    assert largest_clusters(verdict_table([])) == []


def test_equal_row_ids_are_refused() -> None:
    with pytest.raises(AssertionError, match="row ids must be different"):
        verdict_table([chat("a", "1"), chat("a", "2")])


# --- real data ----------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_real_chats_that_were_saved_twice_lose_the_earlier_save(real_data: Path) -> None:
    """Two pairs among 80 real pages; one save is indented, so only folded white space shows that it is a branch."""
    chats = json.loads(gzip.decompress((real_data / "sharegpt_html.json.gz").read_bytes()))
    rows = []
    for record in chats:
        turns = [
            ("user", turn["value"])
            if turn["from"] == "human"
            else ("assistant", LexborHTMLParser(turn["value"]).text(separator=" "))
            for turn in record["conversations"]
        ]
        rows.append(chat(record["id"][:7], *turns))
    assert verdicts_of(rows) == {
        "60dfa9d": ("branch_of_longer", "cd373ec"),
        "5703a84": ("branch_of_longer", "d108791"),
    }


@pytest.mark.real_data
@pytest.mark.slow
def test_alpaca_has_three_near_pairs(real_data: Path) -> None:
    """Counted before by another program: 3 pairs of 52,002 rows with Jaccard >= 0.8, and no two rows are equal."""
    records = json.loads(gzip.decompress((real_data / "alpaca_data.json.gz").read_bytes()))
    rows = [
        chat(f"{n:05}", f"{record['instruction']} {record['input']}", record["output"])
        for n, record in enumerate(records)
    ]
    reasons = [reason for reason, _ in verdicts_of(rows).values()]
    assert reasons == ["near_duplicate"] * 3
