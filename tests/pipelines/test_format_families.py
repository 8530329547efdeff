"""Families of one round, of labels, of people, of papers, and of any shape: a record and the chat that it is."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.formats.families import FORMATS
from pipelines.formats.turns import Chats, Reading
from schemas.conversation import Drop, Message
from schemas.source_config import FieldPaths, SourceConfig


def read(record: dict[str, Any], **source: Any) -> Reading:
    wanted = SourceConfig(name="s", path="x", **source)
    name = next(name for name in FORMATS if FORMATS[name].matches(record))
    return FORMATS[name].reading(record, wanted)


def name_of(record: dict[str, Any]) -> str:
    return next(name for name in FORMATS if FORMATS[name].matches(record))


def said(reading: Reading) -> list[tuple[str, str]]:
    """(first letter of the role, text) of a chat."""
    assert isinstance(reading, list), reading
    return [(message.role[0], message.content) for message in reading]


ROUND = [("u", "q"), ("a", "b")]
HUMAN = [{"from": "human", "value": "q"}]
USER = [{"role": "user", "content": "q"}]

RECORDS: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("prompt", {"prompt": "q", "completion": "b"}, ROUND),
    ("prompt", {"query": "q", "response": "b", "history": [["x", "y"]]}, [("u", "x"), ("a", "y"), *ROUND]),
    ("prompt", {"question": "q", "answer": "b", "system": "s"}, [("s", "s"), *ROUND]),
    ("prompt", {"prompt": USER, "completion": [{"role": "assistant", "content": "b"}]}, ROUND),
    ("prompt", {"prompt": json.dumps(USER), "response": "b"}, ROUND),
    ("prompt", {"prompt": "[1] is a list", "response": "b"}, [("u", "[1] is a list"), ("a", "b")]),
    ("alpaca", {"kind": "QA", "input": "q", "target": "b"}, ROUND),
    (
        "alpaca",
        {"instruction": "Human:x\nAssistant:y\nHuman:q\nAssistant:", "input": "", "output": "b"},
        [("u", "x"), ("a", "y"), *ROUND],
    ),
    (
        "alpaca",
        {"instruction": "What is this?", "input": "Human: x\nAssistant: y", "output": "b"},
        [("u", "What is this?\n\nHuman: x\nAssistant: y"), ("a", "b")],
    ),
    ("preference", {"prompt": "q", "chosen": "b", "rejected": "c"}, ROUND),
    ("preference", {"question": "q", "system": "s", "chosen": "b", "rejected": "c"}, [("s", "s"), *ROUND]),
    ("preference", {"instruction": "q", "input": "i", "chosen": "b", "rejected": "c"}, [("u", "q\n\ni"), ("a", "b")]),
    ("preference", {"conversations": HUMAN, "chosen": {"from": "gpt", "value": "b"}, "rejected": {}}, ROUND),
    ("preference", {"conversations": HUMAN, "chosen": "b", "rejected": "c"}, ROUND),
    ("preference", {"messages": USER, "chosen": {"role": "assistant", "content": "b"}, "rejected": {}}, ROUND),
    (
        "preference",
        {"prompt": "q", "chosen": [*USER, {"role": "assistant", "content": "b"}], "rejected": []},
        ROUND,
    ),
    (
        "preference",
        {"chosen": "\n\nHuman: q\n\nAssistant: b", "rejected": "\n\nHuman: q\n\nAssistant: c"},
        ROUND,
    ),
    ("preference", {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " b", "rejected": "c"}, [("u", "q"), ("a", " b")]),
    ("kto", {"prompt": "q", "completion": "b", "label": True}, ROUND),
    ("kto", {"messages": [*USER, {"role": "assistant", "content": "b"}], "label": True}, ROUND),
    ("messages", {"messages": json.dumps(USER)}, ROUND[:1]),
    ("sharegpt", {"conversations": json.dumps(HUMAN)}, ROUND[:1]),
    ("sharegpt", {"items": [{"from": "user", "markdown": "q"}, {"from": "bard", "text": "b"}], "plugins": []}, ROUND),
    ("text", {"text": "### Human: q### Assistant: b"}, ROUND),
    ("text", {"text": "q\nb"}, ROUND),
    ("text", {"title": "q", "text": "b"}, ROUND),
    ("text", {"title": "q", "content": "q\nb"}, ROUND),
    (
        "moss",
        {
            "meta_instruction": "s",
            "chat": {
                "turn_10": {"Human": "<|Human|>: z<eoh>\n", "MOSS": "<|MOSS|>: e<eom>\n", "Commands": "<|Commands|>: None<eoc>\n"},
                "turn_2": {
                    "Human": "<|Human|>: q<eoh>\n",
                    "Inner Thoughts": "<|Inner Thoughts|>: hm<eot>\n",
                    "Commands": "<|Commands|>: Calculate(\"1\")<eoc>\n",
                    "Tool Responses": "<|Results|>:\n1<eor>\n",
                    "MOSS": "<|MOSS|>: b<eom>\n",
                },
            },
        },
        [("s", "s"), ("u", "q"), ("a", 'Calculate("1")'), ("t", "1"), ("a", "b"), ("u", "z"), ("a", "e")],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "chat"), RECORDS)
def test_each_shape_is_told_by_its_keys_and_read(
    name: str, record: dict[str, Any], chat: list[tuple[str, str]]
) -> None:
    assert name_of(record) == name
    assert said(read(json.loads(json.dumps(record)))) == chat


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "completion": "b", "label": False}, "labelled_false"),
        ({"prompt": 5, "completion": "b"}, "bad_value"),
        ({"prompt": "q", "chosen": 7, "rejected": "c"}, "bad_value"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, "bad_value"),
        ({"chat": {"turn_1": {"Human": "x"}}}, "bad_value"),
        ({"chat": {"turn_1": "x"}}, "bad_value"),
        ({"instruction": "x", "instances": []}, "no_messages"),
        ({"text": "Only one sentence stands here."}, "text_too_short"),
        ({"text": " "}, "text_too_short"),
    ],
)
def test_what_has_no_chat_says_why(record: dict[str, Any], reason: str) -> None:
    reading = read(record)
    drop = Drop("no_messages") if reading == [] else reading
    assert isinstance(drop, Drop)
    assert drop.reason in (reason, "no_messages")


def test_a_task_with_instances_is_a_chat_each_and_a_broken_one_is_a_drop() -> None:
    record = {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, 7, {"output": "4"}]}
    reading = read(record)
    assert isinstance(reading, Chats)
    (first, no_drop), (nothing, drop), (third, _) = reading.chats
    assert said(first) == [("u", "Add.\n\n1 2"), ("a", "3")]
    assert (no_drop, nothing, drop and drop.reason) == (None, [], "bad_value")
    assert said(third) == [("u", "Add."), ("a", "4")]


def test_parts_of_reasoning_and_calls_stand_beside_the_text() -> None:
    call = {"name": "weather", "arguments": {"city": "Bern"}}
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "Let me look."},
        {"type": "tool_call", "value": json.dumps(call)},
        {"type": "tool_use", "id": "t1", "name": "clock", "input": {}},
    ]
    reading = read({"messages": [{"role": "assistant", "content": parts, "name": "Ada"}]})
    assert reading == [
        Message(
            "assistant",
            "Let me look.",
            {
                "name": "Ada",
                "reasoning_content": "hm",
                "tool_calls": [
                    {"type": "function", "function": call},
                    {"id": "t1", "type": "function", "function": {"name": "clock", "arguments": {}}},
                ],
            },
        )
    ]


# People -----------------------------------------------------------------------------------------------------

TALK = {
    "messages": [
        [{"sender": "ann", "text": "hi"}, {"sender": "ann", "text": "you there?"}],
        [{"sender": "bob", "text": "yes"}],
        [{"sender": "ann", "text": "good"}],
    ]
}


@pytest.mark.parametrize(
    ("side", "letters"), [("first", "aua"), ("second", "uau"), ("ann", "aua"), ("bob", "uau")]
)
def test_the_named_side_of_a_talk_becomes_the_assistant(side: str, letters: str) -> None:
    reading = read(TALK, assistant_side=side)
    assert said(reading) == list(zip(letters, ["hi\nyou there?", "yes", "good"], strict=True))
    assert isinstance(reading, list)
    assert [message.extras for message in reading] == [{"name": "ann"}, {"name": "bob"}, {"name": "ann"}]


@pytest.mark.parametrize(("side", "told"), [("", "2 people"), ("eve", "'eve', speakers are ann, bob")])
def test_a_talk_without_an_assistant_is_dropped(side: str, told: str) -> None:
    drop = read(TALK, assistant_side=side)
    assert isinstance(drop, Drop)
    assert drop.reason == "no_assistant_side"
    assert told in drop.detail


# Texts ------------------------------------------------------------------------------------------------------

PARAGRAPHS = st.lists(
    st.sampled_from(
        [
            "# A heading\n",
            "\\section{Methods}\n",
            "```python\n# no heading\n\nx = 1\n```\n",
            "\n",
            "\n\n",
            "One sentence. Another one follows. ",
            "A line\n",
            "词语很多。还有一句！",
            "word " * 90,
            "x" * 700,
            "$$a^2$$\n",
            "| a | b |\n",
        ]
    ),
    max_size=30,
)


def without_space(text: str) -> str:
    return re.sub(r"\s", "", text)


@given(PARAGRAPHS.map("".join), st.integers(100, 900))
def test_a_text_is_there_whole_and_its_rounds_are_short(text: str, text_chars: int) -> None:
    reading = FORMATS["text"].reading({"text": text}, SourceConfig(name="s", path="x", text_chars=text_chars))
    if isinstance(reading, Drop):
        assert reading.reason == "text_too_short"
        return
    chat = said(reading)
    assert without_space("".join(content for _, content in chat)) == without_space(text)
    assert "".join(role for role, _ in chat) == "ua" * (len(chat) // 2)
    assert all(content.strip() for _, content in chat)
    assert all(len(content) <= 5 * text_chars for _, content in chat)


@pytest.mark.real_data
def test_a_paper_is_cut_at_its_headings(real_data: Path) -> None:
    paper = (real_data / "text" / "switch_trans.md").read_text()
    chat = said(FORMATS["text"].reading({"text": paper}, SourceConfig(name="s", path="x")))
    assert without_space("".join(content for _, content in chat)) == without_space(paper)
    assert len(chat) > 40
    assert max(len(content) for _, content in chat) < 12_000
    headings = sum(content.startswith("#") for role, content in chat if role == "u")
    assert headings > len(chat) // 4


# Any shape --------------------------------------------------------------------------------------------------


def custom(record: dict[str, Any], **fields: Any) -> Reading:
    from pipelines.formats.families import CHOSEN

    source = SourceConfig(name="s", path="x", format="custom", fields=FieldPaths(**fields))
    return CHOSEN["custom"].reading(record, source)


ODD = {
    "data": {"turns": [{"who": {"is": "customer"}, "what": ["q"]}, {"who": {"is": "agent"}, "what": ["b"]}]},
    "a.b": {"c": "s"},
    "en": {"q": "q", "context": ""},
    "answers": [{"text": "b"}],
}
SPEAKERS = {"customer": "user", "agent": "assistant"}


def test_a_record_of_any_shape_is_read_by_its_field_paths() -> None:
    turns = {"messages": "data.turns", "role": "who.is", "content": "what.0", "roles": SPEAKERS}
    assert said(custom(ODD, **turns)) == ROUND
    assert said(custom(ODD, **turns, system="a.b.c")) == [("s", "s"), *ROUND]
    assert said(custom(ODD, prompt=["en.q", "en.context"], answer="answers.0.text")) == ROUND
    assert said(custom({"t": json.dumps(USER)}, messages="t")) == ROUND[:1]


@pytest.mark.parametrize(
    ("fields", "reason", "detail"),
    [
        ({"messages": "data.nothing"}, "missing_field", "'data.nothing'"),
        ({"messages": "data.turns", "role": "who.is", "content": "what.0"}, "unknown_role", "'customer'"),
        ({"messages": "data.turns", "role": "whom", "content": "what.0"}, "unknown_role", "'whom' is absent"),
        (
            {"messages": "data.turns", "role": "who.is", "roles": SPEAKERS, "content": "what"},
            "bad_value",
            "list",
        ),
        ({"prompt": ["en.nothing"], "answer": "answers.0.text"}, "missing_field", "en.nothing"),
        ({"prompt": ["en.q"], "answer": "answers.1.text"}, "missing_field", "answers.1.text"),
    ],
)
def test_a_path_that_leads_nowhere_says_so(fields: dict[str, Any], reason: str, detail: str) -> None:
    drop = custom(ODD, **fields)
    assert isinstance(drop, Drop)
    assert (drop.reason, detail in drop.detail) == (reason, True), drop


@pytest.mark.parametrize(
    "source",
    [
        {"format": "custom"},
        {"fields": {"messages": "a"}},
        {"format": "custom", "fields": {}},
        {"format": "custom", "fields": {"prompt": ["a"]}},
        {"format": "custom", "fields": {"messages": "a", "prompt": ["a"], "answer": "b"}},
        {"format": "custom", "fields": {"messages": "a", "roles": {"x": "boss"}}},
    ],
)
def test_half_a_mapping_is_refused(source: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SourceConfig(name="s", path="x", **source)


# Published --------------------------------------------------------------------------------------------------


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "family", "kept", "dropped"),
    [
        ("llama_factory/kto_en_demo.json.gz", "kto", 150, 150),
        ("llama_factory/dpo_en_demo.json.gz", "preference", 300, 0),
        ("dpo_zh_500.jsonl.gz", "preference", 500, 0),
        ("gsm8k_train.jsonl.gz", "prompt", 7473, 0),
        ("lang/moss_samples.jsonl.gz", "moss", 222, 0),
        ("lang/seed_tasks_fr.jsonl", "alpaca", 175, 0),
        ("llama_factory/c4_demo.jsonl.gz", "text", 300, 0),
        ("text/arxiv.jsonl", "text", 10, 1),
        ("llama_factory/reason_tool_use_demo_50.jsonl", "messages", 50, 0),
    ],
)
def test_published_sets_are_of_their_family(
    real_data: Path, name: str, family: str, kept: int, dropped: int
) -> None:
    data = (real_data / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    records = (
        json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    )
    assert {name_of(record) for record in records} == {family}
    drops = [reading for record in records if isinstance(reading := read(record), Drop)]
    assert (len(records) - len(drops), len(drops)) == (kept, dropped)
