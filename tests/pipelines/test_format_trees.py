"""Trees of messages: every leaf is a row or a drop, and no answer is trained twice."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.formats import tree
from pipelines.formats.families import FORMATS
from pipelines.formats.turns import Chats, Reading
from pipelines.merge import read_part
from schemas.conversation import Drop, Message
from schemas.pipeline_config import PipelineConfig
from schemas.source_config import SourceConfig
from tests.pipelines.test_merge import plan

Chat = tuple[list[Message], Drop | None]


def read(record: dict[str, Any], tree_paths: str = "all") -> Reading:
    name = next(name for name in FORMATS if FORMATS[name].matches(record))
    return FORMATS[name].reading(record, SourceConfig(name="s", path="x", tree_paths=tree_paths))  # type: ignore[arg-type]


def chats(record: dict[str, Any], tree_paths: str = "all") -> list[Chat]:
    reading = read(record, tree_paths)
    assert isinstance(reading, Chats), reading
    return reading.chats


def shown(chat: Chat) -> str:
    """Texts from root to leaf, untrained answers in brackets, and the reason of a drop."""
    messages, drop = chat
    texts = [f"({m.content})" if m.extras.get("weight") == 0 else m.content for m in messages]
    return " ".join([*texts, f"!{drop.reason}"] if drop else texts)


def reply(text: str, *replies: Any, **more: Any) -> dict[str, Any]:
    """Capitals are answers."""
    role = "assistant" if text[:1].isupper() else "prompter"
    return {"message_id": text, "text": text, "role": role, "replies": list(replies), **more}


def oasst(root: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": "t1", "tree_state": "ready_for_export", "prompt": root}


TREES = {
    "two answers": (reply("q", reply("A"), reply("B")), ["q A", "q B"]),
    "by rank": (reply("q", reply("A", rank=1), reply("B", rank=0), reply("C")), ["q B", "q A", "q C"]),
    "a shared answer is trained once": (
        reply("q", reply("A", reply("r", reply("B")), reply("s", reply("C")))),
        ["q A r B", "q (A) s C"],
    ),
    "an unanswered question behind an answer that goes on": (
        reply("q", reply("A", reply("r"), reply("s", reply("C")))),
        ["q A r !path_adds_no_answer", "q A s C"],
    ),
    "only unanswered questions": (
        reply("q", reply("A", reply("r"), reply("s"))),
        ["q A r", "q A s !path_adds_no_answer"],
    ),
    "the same answer twice": (reply("q", reply("A"), reply("A")), ["q A", "q A !path_adds_no_answer"]),
    "no answer": (reply("q"), ["q"]),
    "deleted": (reply("q", reply("A", reply("r", reply("B")), deleted=True), reply("C")), ["q C"]),
    "a reply that can't be read": (
        reply("q", reply("A", 7, reply("r", {"role": "critic", "text": "x"}))),
        ["q A !bad_value", "q A r !unknown_role"],
    ),
    "a reply that can't be read and one that can": (
        reply("q", reply("A", 7, reply("r", reply("B")))),
        ["q A !bad_value", "q A r B"],
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_every_leaf_is_a_row_or_a_drop(name: str) -> None:
    root, paths = TREES[name]
    assert [shown(chat) for chat in chats(oasst(root))] == paths


def test_the_best_path_takes_the_best_ranked_reply_at_each_step_and_counts_the_others() -> None:
    root = reply(
        "q", reply("A", rank=1), reply("B", reply("r", reply("C", rank=3), reply("D", rank=2)), rank=0)
    )
    assert [shown(chat) for chat in chats(oasst(root), "best")] == ["q B r D"]
    reading = read(oasst(root), "best")
    assert isinstance(reading, Chats)
    assert reading.meta == {"repairs": {"paths_left_out": 2}, "id": "t1"}


def random_tree(draw: random.Random, size: int) -> dict[str, Any]:
    nodes = [reply("q")]
    for number in range(size):
        parent = draw.choice(nodes)
        letter = draw.choice("abc")
        node = reply((letter.upper() if parent["role"] == "prompter" else letter) + str(number % 5))
        parent["replies"].append(node)
        nodes.append(node)
    return nodes[0]


def leaf_texts(node: dict[str, Any], before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    path = (*before, node["text"])
    if not node["replies"]:
        return [path]
    return [texts for child in node["replies"] for texts in leaf_texts(child, path)]


@given(st.integers(0, 10_000), st.integers(0, 40))
def test_in_any_tree_each_answer_that_a_leaf_leads_to_is_trained_once(seed: int, size: int) -> None:
    root = random_tree(random.Random(seed), size)
    found = chats(oasst(root))
    leaves = leaf_texts(root)
    assert [tuple(m.content for m in messages) for messages, _ in found] == leaves
    trained = [
        tuple(m.content for m in messages[: place + 1])
        for messages, drop in found
        if drop is None
        for place, message in enumerate(messages)
        if message.role == "assistant" and message.extras.get("weight") != 0
    ]
    wanted = {leaf[: place + 1] for leaf in leaves for place, text in enumerate(leaf) if text[0].isupper()}
    assert sorted(trained) == sorted(wanted)


def test_a_tree_whose_paths_would_fill_the_memory_is_cut_with_a_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_SHARED_CHARS", 3000)
    root = reply("q", reply("A" * 1000, *(reply(f"q{n}", reply(f"B{n}")) for n in range(9))))
    found = chats(oasst(root))
    assert len(found) == 3
    assert found[-1][1] is not None
    assert found[-1][1].reason == "tree_too_large"
    assert "7 of 9 paths" in found[-1][1].detail


# ChatGPT's export -------------------------------------------------------------------------------------------


def node(
    parent: str | None, children: str, role: str = "user", text: Any = "", **message: Any
) -> dict[str, Any]:
    content = text if isinstance(text, dict) else {"content_type": "text", "parts": [text]}
    said = {"author": {"role": role}, "content": content, "recipient": "all", "metadata": {}} | message
    return {"message": said, "parent": parent, "children": children.split()}


EXPORT: dict[str, Any] = {
    "title": "A chat",
    "create_time": 1708776632.9,
    "update_time": 1709328759.3,
    "conversation_id": "c1",
    "current_node": "a2",
    "mapping": {
        "root": {"message": None, "parent": None, "children": ["sys"]},
        "sys": node("root", "u1 u2", "system"),
        "u1": node("sys", "a1 code", text="q"),
        "a1": node("u1", "", "assistant", "A", metadata={"model_slug": "gpt-4"}),
        "code": node("u1", "tool", "assistant", {"content_type": "code", "text": "1+1"}, recipient="python"),
        "tool": node("code", "hidden", "tool", {"content_type": "execution_output", "text": "2"}),
        "hidden": node("tool", "a2", "system", "hm", metadata={"is_visually_hidden_from_conversation": True}),
        "a2": node("hidden", "", "assistant", "B", metadata={"model_slug": "gpt-4o"}),
        "u2": node(
            "sys", "a3 a4", text={"content_type": "multimodal_text", "parts": [{"asset_pointer": "x"}, "w"]}
        ),
        "a3": node("u2", "", "assistant", "C"),
        "a4": node("u2", "", "assistant", "D"),
    },
}


def test_an_export_is_a_chat_a_branch_without_what_the_page_hides() -> None:
    found = chats(EXPORT)
    assert [shown(chat) for chat in found] == [
        "q A",
        "q 1+1 2 B",
        "C !unsupported_content",
        "D !unsupported_content",
    ]
    assert [message.role for message in found[1][0]] == ["user", "assistant", "tool", "assistant"]
    assert found[1][0][1].extras == {"recipient": "python", "kind": "function_call"}
    reading = read(EXPORT)
    assert isinstance(reading, Chats)
    assert reading.meta == {"answers": "text", "date": "2024-03-01T21:32:39+00:00", "model": "gpt-4o"}
    assert [shown(chat) for chat in chats(EXPORT, "best")] == ["q 1+1 2 B"]


@pytest.mark.parametrize(
    ("mapping", "told"),
    [
        ({"a": node("b", "b"), "b": node("a", "a")}, "circle"),
        ({"a": node("a", "a")}, "circle"),
        ({"a": {"message": None, "parent": None, "children": ["a", "b", 7, None]}}, "none of them a turn"),
    ],
)
def test_a_mapping_that_is_no_tree_is_a_drop(mapping: dict[str, Any], told: str) -> None:
    drop = read({"mapping": mapping})
    assert isinstance(drop, Drop)
    assert told in drop.detail


def test_a_child_that_its_parent_forgot_and_one_that_it_names_twice_stand_once() -> None:
    mapping = {
        "a": node(None, "b b", text="q"),
        "b": node("a", "", "assistant", "A"),
        "c": node("a", "", "assistant", "B"),
        "d": node("lost", "", "user", "alone"),
    }
    assert [shown(chat) for chat in chats({"mapping": mapping})] == ["q A", "q B", "alone"]


def test_a_chain_of_ten_thousand_nodes_is_one_chat() -> None:
    mapping = {
        str(n): node(str(n - 1) if n else None, str(n + 1), "user assistant".split()[n % 2], "x")
        for n in range(10_000)
    }
    ((messages, drop),) = chats({"mapping": mapping})
    assert (len(messages), drop) == (10_000, None)


def rows_of(tmp_path: Path, records: list[Any], **source: Any) -> list[tuple[Any, Drop | None]]:
    (tmp_path / "a.json").write_text(json.dumps(records))
    config = PipelineConfig(
        run_root=Path("run"), sources=[SourceConfig(name="src", path=str(tmp_path / "a.json"), **source)]
    )
    return [row for part in plan(config, tmp_path) for row in read_part(part, config)]


def test_the_chats_of_one_record_share_record_group_and_side_and_have_ids_of_their_own(
    tmp_path: Path,
) -> None:
    edited = reply("q", reply("A", reply("r", reply("B"))), reply("C"))
    rows = rows_of(tmp_path, [{"prompt": "x", "completion": "y"}, oasst(edited), EXPORT])
    assert [row.record for row, _ in rows] == [0, 1, 1, 2, 2, 2, 2]
    groups = [None] + [rows[1][0].row_id] * 2 + [rows[3][0].row_id] * 4
    assert [row.meta.get("group") for row, _ in rows] == groups
    assert len({row.meta["holdout_key"] for row, _ in rows[3:]}) == 1
    assert len({row.row_id for row, _ in rows}) == 7
    assert [row.meta["id"] for row, _ in rows[1:4]] == ["t1", "t1", "c1"]
    assert rows[3][0].meta["date"].startswith("2024-03-01")


def test_what_was_left_out_of_a_tree_is_counted_once(tmp_path: Path) -> None:
    root = reply("q", reply("A", deleted=True), reply("B"), reply("C"))
    rows = rows_of(tmp_path, [oasst(root)])
    assert [row.meta.get("repairs") for row, _ in rows] == [{"deleted_messages": 1}, None]
    ((row, _),) = rows_of(tmp_path, [oasst(root)], tree_paths="best")
    assert row.meta["repairs"] == {"paths_left_out": 1, "deleted_messages": 1}


@pytest.mark.real_data
def test_a_real_export_has_a_chat_for_each_of_its_leaves(real_data: Path) -> None:
    (record,) = json.loads((real_data / "sharegpt_shapes" / "openai_export.json").read_text())
    leaves = [key for key, value in record["mapping"].items() if not value["children"]]
    found = chats(record)
    assert len(found) == len(leaves) == 5
    assert all(drop is None for _, drop in found)
    texts = {
        value["message"]["content"]["parts"][0]
        for value in record["mapping"].values()
        if value["message"] and value["message"]["author"]["role"] == "assistant"
    }
    trained = [
        m.content
        for messages, _ in found
        for m in messages
        if m.role == "assistant" and "weight" not in m.extras
    ]
    assert sorted(trained) == sorted(texts)
