"""One chat is the same Conversation whatever format it came in; what can't be read says why."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.formats import alpaca, messages, sharegpt
from pipelines.formats.families import FORMATS
from pipelines.formats.turns import ROLE_NAMES, Chats, Reading
from schemas.conversation import ROLES, Drop, Message
from schemas.source_config import SourceConfig

SOURCE = SourceConfig(name="s", path="x")


def read(record: dict[str, Any], source: SourceConfig = SOURCE) -> Reading:
    """By the first family that takes the record."""
    name = next(name for name in FORMATS if FORMATS[name].matches(record))
    return FORMATS[name].reading(record, source)


TEXT = st.text(max_size=30)
ROUNDS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)
SYSTEM = st.one_of(st.none(), st.text(min_size=1, max_size=20).filter(str.strip))


def chat(rounds: list[tuple[str, str]], system: str | None) -> list[Message]:
    turns = [Message("system", system)] if system else []
    for question, answer in rounds:
        turns += [Message("user", question), Message("assistant", answer)]
    return turns


def as_sharegpt(turns: list[Message], names: dict[str, str], list_key: str) -> dict[str, Any]:
    return {list_key: [{"from": names[turn.role], "value": turn.content} for turn in turns]}


@given(
    ROUNDS,
    SYSTEM,
    st.sampled_from(["conversations", "conversation", "items"]),
    st.sampled_from(["human", "user", "prompter", "Human"]),
    st.sampled_from(["gpt", "assistant", "chatgpt", "bing", "bard", "model", "GPT"]),
)
def test_the_same_chat_is_the_same_messages_in_every_format(
    rounds: list[tuple[str, str]], system: str | None, list_key: str, user: str, assistant: str
) -> None:
    expected = chat(rounds, system)
    names = {"system": "system", "user": user, "assistant": assistant}
    plain = [{"role": turn.role, "content": turn.content} for turn in expected]
    parts = [
        {"role": turn.role, "content": [{"type": "text", "text": text} for text in turn.content]}
        for turn in expected
    ]
    *history, (question, answer) = rounds
    records: list[tuple[str, dict[str, Any]]] = [
        ("sharegpt", as_sharegpt(expected, names, list_key)),
        ("sharegpt", as_sharegpt(chat(rounds, None), names, list_key) | {"system": system}),
        ("sharegpt", {list_key: plain}),
        ("sharegpt", {"conversation": [{"human": q, "assistant": a} for q, a in rounds], "system": system}),
        ("messages", {"messages": plain}),
        ("messages", {"messages": parts}),
        (
            "alpaca",
            {
                "instruction": question,
                "input": "",
                "output": answer,
                "history": history_of(history),
                "system": system,
            },
        ),
        (
            "alpaca",
            {"instruction": question, "response": answer, "history": history_of(history), "system": system},
        ),
    ]
    for name, record in records:
        assert [f for f in FORMATS if FORMATS[f].matches(record)] == [name]
        assert FORMATS[name].reading(json.loads(json.dumps(record)), SOURCE) == expected


def history_of(rounds: list[tuple[str, str]]) -> list[list[str]]:
    return [list(pair) for pair in rounds]


def test_every_known_name_means_one_of_the_four_roles() -> None:
    assert set(ROLE_NAMES.values()) == set(ROLES)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n\n1 2"),
        ({"instruction": "Add.", "input": "x", "output": "3"}, "Add.\n\nx"),
        ({"instruction": "Add.", "input": " \n", "output": "3"}, "Add."),
        ({"instruction": "Add.", "input": None, "output": "3"}, "Add."),
        ({"instruction": "Add.", "output": "3"}, "Add."),
        ({"input": "1 2", "output": "3"}, "1 2"),
        ({"instruction": "", "input": "1 2", "output": "3"}, "1 2"),
        *(
            ({"instruction": "Add.", "input": given, "output": "3"}, "Add.")
            for given in (
                "<noinput>",
                "No input",
                "noinput",
                '"<noinput>"',
                "< noinput >",
                "No input required.",
                "<noinput",
            )
        ),
        ({"instruction": "Add.", "input": "no inputs", "output": "3"}, "Add.\n\nno inputs"),
        (
            {"instruction": "Why?", "input": "There is no input here.", "output": "3"},
            "Why?\n\nThere is no input here.",
        ),
    ],
)
def test_an_alpaca_question_is_the_instruction_and_the_input_if_there_is_one(
    record: dict[str, Any], text: str
) -> None:
    assert alpaca.read(record) == [Message("user", text), Message("assistant", "3")]


def test_an_empty_answer_is_left_for_the_filter() -> None:
    record: dict[str, Any] = {"instruction": "Say nothing.", "input": "", "output": ""}
    assert alpaca.read(record) == [Message("user", "Say nothing."), Message("assistant", "")]
    assert alpaca.read(record | {"output": None}) == alpaca.read(record)
    assert sharegpt.read({"conversations": [{"from": "gpt", "value": None}]}) == [Message("assistant", "")]


def test_calls_and_observations_keep_what_they_are() -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather"}'},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains."},
        ]
    }
    assert sharegpt.read(record) == [
        Message("user", "Weather?"),
        Message("assistant", '{"name": "weather"}', {"kind": "function_call"}),
        Message("tool", "rain"),
        Message("assistant", "It rains."),
    ]
    call = [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "rain", "tool_call_id": "c1"},
    ]
    assert messages.read({"messages": turns}) == [
        Message("system", "Be brief."),
        Message("assistant", "", {"tool_calls": call}),
        Message("tool", "rain", {"tool_call_id": "c1"}),
    ]


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_kept_whatever_its_length(key: str) -> None:
    turn = {"role": "assistant", "content": "a", key: "well " * 1000}
    chat = messages.read({"messages": [{"role": "user", "content": "q"}, turn]})
    assert isinstance(chat, list)
    assert chat[1].extras == {key: "well " * 1000}


def test_small_plain_extras_are_kept_and_large_or_nested_ones_left_out() -> None:
    small = {"model": "x", "weight": 0.5, "n": 3, "edited": True}
    other = {
        "html": "x" * 1025,
        "accents": "é" * 600,
        "scores": {"a": 1},
        "tags": ["a"],
        "none": None,
        "inf": float("inf"),
    }
    turn = {"from": "gpt", "value": "hi"} | small | other
    assert sharegpt.read({"conversations": [turn]}) == [Message("assistant", "hi", small)]


DEEP = json.loads("[" * 300 + "]" * 300)


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "unknown_role", "narrator"),
        ({"conversations": [{"value": "x"}]}, "unknown_role", "None"),
        ({"conversations": [{"from": 3, "value": "x"}]}, "unknown_role", "int 3"),
        ({"conversations": [{"from": "gpt", "value": 7}]}, "bad_value", "int 7"),
        ({"conversations": [{"from": "gpt", "value": ["x"]}]}, "bad_value", "list"),
        ({"conversations": ["hello"]}, "bad_value", "str"),
        ({"conversations": [{"human": 5, "assistant": "x"}]}, "bad_value", "int 5"),
        ({"messages": [{"role": "critic", "content": "x"}]}, "unknown_role", "critic"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "bad_value", "dict"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "unsupported_content",
            "image_url",
        ),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "unsupported_content", "str"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": DEEP}]}, "bad_value", "tool_calls"),
        ({"messages": [None]}, "bad_value", "NoneType"),
        ({"instruction": 3, "output": "x"}, "bad_value", "int 3"),
        ({"instruction": "x", "output": ["a", "b"]}, "bad_value", "list"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "bad_value", "history"),
        ({"instruction": "x", "output": "y", "history": "abc"}, "bad_value", "history"),
    ],
)
def test_what_can_not_be_read_says_why(record: dict[str, Any], reason: str, detail: str) -> None:
    drop = read(record)
    assert isinstance(drop, Drop)
    assert drop.reason == reason
    assert detail in drop.detail
    assert len(drop.detail) < 400


@pytest.mark.parametrize(
    "record",
    [{}, {"messages": "x"}, {"conversations": {}}, {"instruction": "x"}, {"output": "x"}],
)
def test_other_records_belong_to_no_format(record: dict[str, Any]) -> None:
    assert [name for name in FORMATS if FORMATS[name].matches(record)] == []


KEYS = (
    "conversations messages instruction output history system instances chosen rejected prompt completion label "
    "mapping chat dialogue text title query response input target"
).split()
INNER_KEYS = (
    "from value role content human assistant text sender replies rank deleted message parent children author parts "
    "content_type turn_1 Human MOSS type name"
).split()
ANYTHING = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.sampled_from(["user", "gpt", "a"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(INNER_KEYS), inner, max_size=3)
    ),
)
OPTIONS = [
    SOURCE,
    SourceConfig(name="s", path="x", tree_paths="best", assistant_side="second", text_chars=100),
]


@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING), st.sampled_from(OPTIONS))
def test_any_json_gives_messages_or_a_drop(record: dict[str, Any], source: SourceConfig) -> None:
    for reader in FORMATS.values():
        if reader.matches(record):
            found = reader.reading(record, source)
            chats = (
                found.chats
                if isinstance(found, Chats)
                else []
                if isinstance(found, Drop)
                else [(found, None)]
            )
            assert all(isinstance(message.content, str) for chat, _ in chats for message in chat)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "reader", "num_messages"),
    [
        ("sharegpt_html.json.gz", "sharegpt", 1935),
        ("lima.json.gz", "alpaca", None),
        ("llama_factory/glaive_toolcall_en_demo.json.gz", "sharegpt", None),
        ("gpteacher_toolformer.json.gz", "alpaca", None),
    ],
)
def test_published_sets_are_read_whole(
    real_data: Path, name: str, reader: str, num_messages: int | None
) -> None:
    records = json.loads(gzip.decompress((real_data / name).read_bytes()))
    chats = [read(record) for record in records if FORMATS[reader].matches(record)]
    assert len(chats) == len(records)
    assert all(isinstance(found, list) for found in chats)
    assert num_messages in (None, sum(len(found) for found in chats if isinstance(found, list)))
