"""Stage filter: order of roles, and one row for every reason to drop."""

import copy
import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import filter as filter_stage
from pipelines.rules.languages import load_detector
from pipelines.rules.repetition import has_broken_numbering
from pipelines.rules.turns import in_order
from schemas.conversation import Conversation, Drop, Message
from schemas.pipeline_config import FilterConfig, PipelineConfig
from schemas.source_config import SourceConfig

ENGLISH = "The quick brown fox jumps over the lazy dog while everybody watches from afar."
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund, während alle aus der Ferne zusehen."


def chat(*turns: tuple[str, str], **meta: Any) -> Conversation:
    return Conversation("row", "s/f.json", 0, [Message(role, text) for role, text in turns], meta)


def judged(conversation: Conversation, **settings: Any) -> Conversation | Drop:
    return filter_stage.judge(conversation, FilterConfig(**settings), detector=load_detector())


def asked(answer: str, question: str = "?") -> Conversation:
    return chat(("user", question), ("assistant", answer))


@pytest.mark.parametrize(
    ("conversation", "settings", "reason"),
    [
        (chat(), {}, "empty"),
        (chat(("user", "q")), {}, "empty"),
        (chat(("user", "q"), ("assistant", " \n")), {}, "empty"),
        (chat(("assistant", "a")), {}, "wrong_role_order"),
        (
            chat(("user", "q"), ("assistant", "a"), ("system", "s"), ("user", "q"), ("assistant", "a")),
            {},
            "wrong_role_order",
        ),
        (chat(("user", "q"), ("tool", "t"), ("assistant", "a")), {}, "wrong_role_order"),
        (chat(("user", "q"), ("user", "q"), ("assistant", "a")), {"alternation": "drop"}, "wrong_role_order"),
        (chat(("user", "q"), ("assistant", "a"), ("user", "q")), {"alternation": "drop"}, "wrong_role_order"),
        (asked("a"), {"min_chars": 2}, "too_short"),
        (asked("long answer"), {"max_chars": 10}, "too_long"),
        (chat(*[("user", "q"), ("assistant", "a")] * 3), {"max_turns": 5}, "too_many_turns"),
        (asked("it is 3.33333333"), {"max_digit_run": 7}, "digit_repetition"),
        (asked("1. a\n1. b\n1. c"), {}, "broken_numbering"),
        (asked(GERMAN), {"keep_languages": ["en", "fr"]}, "language_not_kept"),
        (asked(GERMAN), {"skip_languages": ["de"]}, "language_skipped"),
        (asked("12 + 30 = 42"), {"keep_languages": ["en"]}, "language_not_kept"),
        (
            asked(f"{ENGLISH} {ENGLISH}", GERMAN),
            {"keep_languages": ["en"], "min_language_share": 0.9},
            "language_not_kept",
        ),
    ],
)
def test_each_fault_drops_with_its_reason(
    conversation: Conversation, settings: dict[str, Any], reason: str
) -> None:
    outcome = judged(conversation, **settings)
    assert isinstance(outcome, Drop)
    assert outcome.reason == reason
    assert outcome.detail


@pytest.mark.parametrize(
    ("conversation", "settings"),
    [
        (asked("a"), {"min_chars": 1, "max_chars": 2, "max_turns": 2}),
        (chat(("system", "s"), *[("user", "q"), ("assistant", "a")] * 2), {"max_turns": 4}),
        (asked("it is 3.3333333"), {"max_digit_run": 7}),
        (asked("99999999999"), {}),
        (asked("1. a\n1. b\n1. c"), {"broken_numbering": "keep"}),
        (asked(ENGLISH), {"keep_languages": ["en", "fr"]}),
        (asked(ENGLISH), {"skip_languages": ["de"]}),
        (asked("12 + 30 = 42"), {"skip_languages": ["en"]}),
        (asked(ENGLISH, GERMAN), {"skip_languages": ["de"], "min_language_share": 0.9}),
        (
            chat(("user", "q"), ("assistant", "a"), ("tool", "1"), ("tool", "2"), ("assistant", "b")),
            {"alternation": "drop"},
        ),
    ],
)
def test_what_stays_within_the_limits_is_kept_as_it_is(
    conversation: Conversation, settings: dict[str, Any]
) -> None:
    outcome = judged(conversation, **settings)
    assert isinstance(outcome, Conversation)
    assert outcome.messages == conversation.messages
    assert set(outcome.meta) == {"language"}


@pytest.mark.parametrize(
    ("turns", "expected", "repairs"),
    [
        ("u1 a1 a2", "u1 a1+a2", {"turns_merged": 1}),
        ("u1 u2 u3 a1", "u1+u2+u3 a1", {"turns_merged": 2}),
        ("s1 s2 u1 a1", "s1+s2 u1 a1", {"turns_merged": 1}),
        ("a1 u1 a2", "u1 a2", {"leading_turns_cut": 1}),
        ("s1 a1 t1 u1 a2", "s1 u1 a2", {"leading_turns_cut": 2}),
        ("u1 a1 u2", "u1 a1", {"trailing_turns_cut": 1}),
        ("u1 a1 t1", "u1 a1", {"trailing_turns_cut": 1}),
        ("u1 a u2 a1", "u1+u2 a1", {"empty_turns_removed": 1, "turns_merged": 1}),
        ("u u1 a1 u a2", "u1 a1+a2", {"empty_turns_removed": 2, "turns_merged": 1}),
        ("u1 a1 t1 t2 a2 u2", "u1 a1 t1 t2 a2", {"trailing_turns_cut": 1}),
    ],
)
def test_roles_are_put_in_order_and_every_repair_is_counted(
    turns: str, expected: str, repairs: dict[str, int]
) -> None:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    outcome = judged(chat(*[(roles[turn[0]], turn[1:]) for turn in turns.split()], repairs={"html": 1}))
    assert isinstance(outcome, Conversation)
    written = [
        message.role[0] + message.content.replace("\n\n", f"+{message.role[0]}")
        for message in outcome.messages
    ]
    assert " ".join(written) == expected
    assert outcome.meta["repairs"] == {"html": 1, **repairs}


def test_a_tool_call_without_words_is_no_empty_turn_and_calls_are_merged() -> None:
    calls = [Message("assistant", "", {"tool_calls": [name]}) for name in ("one", "two")]
    messages = [Message("user", "q"), *calls, Message("tool", "1"), Message("assistant", "a")]
    outcome = judged(Conversation("row", "s/f", 0, messages))
    assert isinstance(outcome, Conversation)
    assert [m.role for m in outcome.messages] == ["user", "assistant", "tool", "assistant"]
    assert outcome.messages[1] == Message("assistant", "", {"tool_calls": ["one", "two"]})


@pytest.mark.parametrize(
    ("text", "is_broken"),
    [
        ("1. a\n1. b\n1. c", True),
        ("Steps:\n\n1. a\n\n1. b\n\n1. c", True),
        ("1. a\n* x\n* y\n1. b\n* x\n1. c\n* z", True),
        ("1. a\n```\nx = 1\n```\n1. b\n```\ny\n```\n1. c", True),
        ("> 1. a\n> 1. b\n> 1. c", True),
        ("- x\n  1. a\n  1. b\n  1. c", True),
        ("1. a\n2. b\n3. c", False),
        ("1. a\n1. b", False),
        ("1. a\n\nThen:\n\n1. b\n\nAnd:\n\n1. c", False),
        ("- x\n  1. a\n- y\n  1. b\n- z\n  1. c", False),
        ("```\n1. a\n1. b\n1. c\n```", False),
        ("1. a\n2. b\n\n1. a\n2. b\n\n1. a\n2. b", False),
        ("1.5 l\n1.5 kg\n1.5 m", False),
        ("## 1. One\n## 1. Two\n## 1. Three", False),
    ],
)
def test_lists_that_lost_their_numbers_are_found(text: str, is_broken: bool) -> None:
    assert has_broken_numbering(text) == is_broken


_turns = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.sampled_from(["", " ", "a", "b"])),
    max_size=8,
)


@settings(max_examples=400)
@given(_turns)
def test_an_ordered_chat_is_in_order_and_stays_as_it_is(turns: list[tuple[str, str]]) -> None:
    conversation = chat(*turns)
    before = copy.deepcopy(conversation)
    outcome = in_order(conversation, FilterConfig())
    assert conversation == before
    if isinstance(outcome, Drop):
        return
    roles = [message.role for message in outcome.messages]
    assert roles[0] == "user" or roles[:2] == ["system", "user"]
    assert roles[-1] == "assistant"
    assert "system" not in roles[1:]
    assert all(a != b or a == "tool" for a, b in pairwise(roles))
    assert in_order(outcome, FilterConfig(alternation="drop")) is outcome
    words = [text for _, text in turns if text.strip()]
    assert not "".join("".join(m.content.split()) for m in outcome.messages).strip("".join(words) or " ")


def test_prepare_gives_a_step_and_versions_name_the_models(tmp_path: Path) -> None:
    config = PipelineConfig(run_root=tmp_path, sources=[SourceConfig(name="s", path="x")])
    step: Callable[[Conversation], Conversation | Drop] = filter_stage.prepare(config)
    once = step(asked(ENGLISH))
    assert isinstance(once, Conversation)
    assert once.meta["language"] == [["en", 1.0]]
    assert step(once) == once
    versions = filter_stage.versions(config)
    assert len(versions["lid.176.ftz"]) == 64
    assert set(versions) == {"lid.176.ftz", "fasttext-predict", "langdetect"}


@pytest.mark.real_data
@pytest.mark.slow
def test_real_chats_drop_for_few_reasons(real_data: Path) -> None:
    chats = json.loads(gzip.decompress((real_data / "sharegpt_v3_sample.json.gz").read_bytes()))
    outcomes = [
        judged(
            chat(
                *[
                    ("user" if t["from"] == "human" else "assistant", t["value"])
                    for t in record["conversations"]
                ]
            )
        )
        for record in chats
    ]
    drops = [outcome.reason for outcome in outcomes if isinstance(outcome, Drop)]
    assert set(drops) <= {"broken_numbering", "wrong_role_order"}
    assert len(drops) < 0.04 * len(outcomes)
